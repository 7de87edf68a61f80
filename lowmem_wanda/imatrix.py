"""llama.cpp's importance matrix: for each weight, the sum over tokens of each input channel's square.

Two formats (llama.cpp, tools/imatrix): GGUF, with `<weight>.in_sum2` and `<weight>.counts` in float32, and the older
.dat, which ik_llama.cpp reads, with means times a number of chunks. Weights are named as in a GGUF.
"""

import io
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lowmem_wanda.errors import CheckpointError, OutputError
from lowmem_wanda.gguf_names import package
from lowmem_wanda.reading import opened
from lowmem_wanda.writer import named_partial, replacing, write_bytes

SUFFIXES = (".gguf", ".dat")
SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST = 4096  # bytes of a name in a .dat: what is longer is no name


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


def check_target(path: str | Path, what: str) -> None:
    """Raises OutputError for a name that says neither format, or a file that is there."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{what} {path}: give a name that ends in .gguf, or in .dat for the older format")
    if path.exists():
        raise OutputError(f"{what} {path}: exists; give another name or remove it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{what} {path}: there is no such directory; make it first")


def write(path: Path, shapes: Shapes, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    """Writes the entries, which come one at a time in the order of `shapes`, in the format of the path's suffix."""
    if path.suffix == ".dat":
        _write_legacy(path, len(shapes), entries, about)
    else:
        _write_gguf(path, shapes, entries, about)


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

    with named_partial(path) as partial:
        writer = Writer(partial, "")
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
        writer.close()


def _write_legacy(path: Path, count: int, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    with replacing(path) as file:
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
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    entries = {}
    for name in (name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)):
        sums, counts = tensors[name + SUMS], tensors.get(name + COUNTS)
        if counts is None or sums.dtype != np.float32 or counts.dtype != np.float32 or sums.size % counts.size:
            raise CheckpointError(f"{path}: {name} has no {COUNTS} that go with its {SUMS}; get the file again")
        entries[name] = Entry(sums.reshape(counts.size, -1), np.rint(counts.reshape(-1)).astype(np.int64))
    if not entries:
        raise CheckpointError(f"{path}: holds no {SUMS} tensors, so it is no importance matrix")

    def value(key: str, otherwise: Any) -> Any:
        field = reader.get_field(key)
        return field.contents() if field else otherwise

    chunks, length = value("imatrix.chunk_count", 0), value("imatrix.chunk_size", 0)
    return entries, About(tuple(value("imatrix.datasets", ()) or ()), int(chunks), int(length))


def _read_legacy(path: Path) -> tuple[dict[str, Entry], About]:
    """Sums are means times `ncall`, and counts `ncall`. Raises struct.error or ValueError where it is none."""
    with opened(path) as file:
        content = io.BytesIO(file.read())

    def number() -> int:
        return int(struct.unpack("<i", content.read(4))[0])

    def taken(count: int, most: int) -> bytes:
        data = content.read(count) if 0 <= count <= most else b""
        if len(data) != count:
            raise ValueError(count)
        return data

    entries, whole = {}, len(content.getbuffer())
    for _ in range(number()):
        name = taken(number(), LONGEST).decode()
        calls, size = number(), number()
        values = np.frombuffer(taken(4 * size, whole), "<f4")
        entries[name] = Entry(values[None], np.array([max(calls, 1)]))
    if not entries:
        raise ValueError("no entries")
    rest = content.read()  # chunks and the text's name; older files end here
    chunks = struct.unpack_from("<i", rest)[0] if len(rest) >= 4 else 0
    return entries, About((rest[8:].decode("utf-8", "replace"),) if len(rest) > 8 else (), chunks, 0)


def open_gguf(path: Path) -> Any:
    """A memory-mapped reader of a GGUF file. Raises CheckpointError where it is none."""
    gguf = package("reading a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is no whole GGUF file ({str(error)[:100]}); get it again") from None


class Store:
    """Entries of blocks that are done, a file for each in a hidden directory of the job."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".imatrix"

    def has(self, index: int) -> bool:
        return self._file(index).exists()

    def put(self, index: int, entries: Mapping[str, Entry]) -> None:
        """Keeps {file tensor: entry} of a block."""
        arrays = {name + SUMS: entry.sums for name, entry in entries.items()}
        arrays |= {name + COUNTS: entry.counts for name, entry in entries.items()}
        self.path.mkdir(exist_ok=True)
        write_bytes(self._file(index), save(arrays))

    def get(self, index: int) -> dict[str, Entry]:
        """What was kept of a block. Raises CheckpointError."""
        try:
            found = load(self._file(index).read_bytes())
        except (OSError, SafetensorError):
            raise CheckpointError(
                f"{self._file(index)}: is damaged; delete it and run the same command again"
            ) from None
        names = (name.removesuffix(SUMS) for name in found if name.endswith(SUMS))
        return {name: Entry(found[name + SUMS], found[name + COUNTS]) for name in names}

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.path / f"{index:05d}.safetensors"
