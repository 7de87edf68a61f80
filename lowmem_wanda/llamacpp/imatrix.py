"""llama.cpp's importance matrix: for each weight, the sum over tokens of each input channel's square.

Two formats (llama.cpp, tools/imatrix): GGUF, with `<weight>.in_sum2` and `<weight>.counts` in float32, and the older
.dat, which ik_llama.cpp reads, with means times a number of chunks. Weights are named as in a GGUF.
"""

import hashlib
import os
import shutil
import struct
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lowmem_wanda.checkpoint.output import refuse_within
from lowmem_wanda.checkpoint.reader import opened
from lowmem_wanda.checkpoint.writer import named_partial, write_bytes
from lowmem_wanda.errors import CheckpointError, OutputError
from lowmem_wanda.llamacpp.names import package

SUFFIXES = (".gguf", ".dat")
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Entry:
    """What is known of a weight's inputs: `sums` of squares (experts, inputs), float32 or float64, over `counts`
    tokens (experts,), int64. A weight that is no stack of experts has one."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Mean squares, (experts, inputs); 1 for an expert that saw no token, as llama.cpp has it."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1.0)


@dataclass(frozen=True)
class About:
    """Of what an importance matrix was computed: names of texts, and `chunks` sequences of `length` tokens."""

    datasets: tuple[str, ...]
    chunks: int
    length: int


Shapes = Mapping[str, tuple[int, int]]  # GGUF name of a weight -> (experts, inputs)


def check_target(path: str | Path, what: str, source: Path, made: Path | None = None) -> None:
    """Raises OutputError for a name that says neither format, a file in the source, or a directory that is not there
    and is not the one that will be `made`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{what} {path}: give a name that ends in .gguf, or in .dat for the older format")
    refuse_within(path, source)
    parent = path.resolve().parent
    if not parent.is_dir() and (made is None or parent != made.resolve()):
        raise OutputError(f"{what} {path}: there is no such directory; make it first")
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise OutputError(f"{what} {path}: its directory cannot be written to; give another one")


def write(path: Path, shapes: Shapes, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    """Writes the entries, which come one at a time in the order of `shapes`, in the format of the path's suffix.

    A file of the same bytes is left as it is. Raises OutputError for another one in its place.
    """
    with named_partial(path) as partial:
        if path.suffix == ".dat":
            _write_legacy(partial, len(shapes), entries, about)
        else:
            _write_gguf(partial, shapes, entries, about)


def read(path: str | Path) -> tuple[dict[str, Entry], About]:
    """{GGUF name of a weight: entry} of either format; sums of a GGUF stay in the file until they are used.

    Raises CheckpointError for a file that is neither.
    """
    path = Path(path)
    with opened(path) as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return _read_gguf(path)
    try:
        return _read_legacy(path)
    except (struct.error, UnicodeDecodeError, ValueError):
        raise CheckpointError(f"{path}: is no importance matrix, neither a whole .gguf nor a whole .dat") from None


def _write_gguf(path: Path, shapes: Shapes, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    gguf = package("an importance matrix")

    class Writer(gguf.GGUFWriter):  # type: ignore[misc, name-defined]
        def add_architecture(self) -> None:
            """An importance matrix has none."""

    with closing(Writer(path, "")) as writer:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(about.datasets))
        writer.add_uint32("imatrix.chunk_count", about.chunks)
        writer.add_uint32("imatrix.chunk_size", about.length)
        for name, (experts, inputs) in shapes.items():
            many = (experts,) if experts > 1 else ()
            writer.add_tensor_info(name + SUMS, (*many, inputs), np.dtype(np.float32), experts * inputs * 4)
            writer.add_tensor_info(name + COUNTS, (*many, 1), np.dtype(np.float32), experts * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, entry in entries:
            writer.write_tensor_data(entry.sums.astype("<f4"))
            writer.write_tensor_data(entry.counts.astype("<f4"))


def _write_legacy(path: Path, count: int, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<i", count))
        for name, entry in entries:
            calls = -(-int(entry.counts.max()) // about.length)  # of a chunk; rounded up, never 0
            text, values = name.encode(), (entry.means * calls).astype("<f4")
            file.write(struct.pack(f"<i{len(text)}sii", len(text), text, calls, values.size))
            file.write(values.tobytes())
        text = about.datasets[-1].encode()
        file.write(struct.pack(f"<ii{len(text)}s", about.chunks, len(text), text))


def _read_gguf(path: Path) -> tuple[dict[str, Entry], About]:
    reader = open_gguf(path)
    tensors, entries = {tensor.name: tensor.data for tensor in reader.tensors}, {}
    for name in (name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)):
        sums, counts = tensors[name + SUMS], tensors.get(name + COUNTS, np.empty(0))
        kinds = {sums.dtype, counts.dtype}
        if (
            kinds != {np.dtype(np.float32)}
            or not counts.size
            or sums.size % counts.size
            or not np.isfinite(counts).all()
        ):
            raise CheckpointError(f"{path}: {name} has no {COUNTS} that go with its {SUMS}; get the file again")
        entries[name] = Entry(sums.reshape(counts.size, -1), np.rint(counts.reshape(-1)).astype(np.int64))
    if not entries:
        raise CheckpointError(f"{path}: holds no {SUMS} tensors, so it is no importance matrix")
    found = {key: reader.get_field(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size")}
    try:
        values = {key: field.contents() for key, field in found.items() if field}
        texts = tuple(map(_shown, values.get("datasets") or ()))
        return entries, About(texts, int(values.get("chunk_count", 0)), int(values.get("chunk_size", 0)))
    except (ValueError, TypeError, OverflowError):
        raise CheckpointError(f"{path}: says of what it was computed in another form; get the file again") from None


def _read_legacy(path: Path) -> tuple[dict[str, Entry], About]:
    """Sums are means times `ncall`, and counts `ncall`. Raises struct.error or ValueError where it is none."""
    with opened(path) as file:
        left = os.fstat(file.fileno()).st_size

        def taken(count: int) -> bytes:
            nonlocal left
            if not 0 <= count <= left:
                raise ValueError(count)
            left -= count
            return file.read(count)

        def number() -> int:
            return int(struct.unpack("<i", taken(4))[0])

        entries = {}
        for _ in range(number()):
            name = taken(number()).decode()
            calls, size = number(), number()
            entries[name] = Entry(np.frombuffer(taken(4 * size), "<f4")[None], np.array([max(calls, 1)]))
        if not entries:
            raise ValueError("no entries")
        chunks = number() if left else 0  # it and the text's name; older files end here
        return entries, About((_shown(taken(number()).decode("utf-8", "replace")),) if left else (), chunks, 0)


def _shown(text: Any) -> str:
    """A name as it can be shown: files may hold anything."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(text))


def open_gguf(path: Path) -> Any:
    """A memory-mapped reader of a GGUF file. Raises CheckpointError where it is none."""
    gguf = package("reading a GGUF file")

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            """What lies in the file; GGUFReader itself goes on for as many items as a header says."""
            found = super()._get(offset, dtype, count, *rest, **named)
            if len(found) < count:
                raise ValueError("it ends before its header says")
            return found

    try:
        return Reader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no whole GGUF file ({str(error)[:100]}); get it again") from None


class Store:
    """Entries of blocks that are done, a file for each in a hidden directory of the job. Those of another `key`, as of
    another calibration, count as none."""

    def __init__(self, folder: Path, key: str = "") -> None:
        self.path = folder / ".imatrix"
        self._mark = hashlib.sha256(key.encode()).hexdigest()[:16]

    def has(self, index: int) -> bool:
        return self._file(index).exists()

    def put(self, index: int, entries: Mapping[str, Entry]) -> None:
        """Keeps {file tensor: entry} of a block."""
        arrays = {name + SUMS: entry.sums for name, entry in entries.items()}
        arrays |= {name + COUNTS: entry.counts for name, entry in entries.items()}
        self.path.mkdir(exist_ok=True)
        write_bytes(self._file(index), save(arrays))

    def get(self, index: int, names: Collection[str]) -> dict[str, Entry]:
        """What was kept of some tensors of a block. Raises CheckpointError, and removes what is damaged."""
        try:
            found = load(self._file(index).read_bytes())
            return {name: Entry(found[name + SUMS], found[name + COUNTS]) for name in names}
        except (OSError, SafetensorError, KeyError):
            self._file(index).unlink(missing_ok=True)
            raise CheckpointError(f"{self._file(index)}: was damaged; run the same command again") from None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.path / f"{index:05d}-{self._mark}.safetensors"
