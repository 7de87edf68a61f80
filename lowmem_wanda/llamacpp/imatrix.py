"""Reads and writes llama.cpp's importance matrix: for each weight, each input channel's square summed over tokens.

There are two formats (llama.cpp, tools/imatrix). A GGUF holds `<weight>.in_sum2` and `<weight>.counts` in float32. The
older .dat, which ik_llama.cpp reads, holds means times a number of chunks. Weights have the names of a GGUF.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.output import require_outside
from lowmem_wanda.checkpoint.reader import opened
from lowmem_wanda.checkpoint.writer import named_partial
from lowmem_wanda.errors import CheckpointError, OutputError
from lowmem_wanda.llamacpp.gguf_file import mapped, read_gguf
from lowmem_wanda.llamacpp.names import package

SUFFIXES = (".gguf", ".dat")
SUMS, COUNTS = ".in_sum2", ".counts"
MOST_TOKENS = 1e15
MOST_NAMES = 1 << 16  # bytes of the names of texts that are read


@dataclass(frozen=True)
class Entry:
    """What an importance matrix holds of one weight.

    `sums` are the sums of its inputs' squares, float32 or float64 (experts, inputs); `counts` are the tokens in these
    sums, int64 (experts,). A weight that is not a stack of experts has one expert.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """The mean squares (experts, inputs); 1 for an expert that saw no token, as in llama.cpp."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1.0)

    @property
    def is_sound(self) -> bool:
        """Whether its numbers can be sums of squares and counts of tokens."""
        return bool(np.isfinite(self.sums).all() and (self.sums >= 0).all() and (self.counts >= 0).all())


@dataclass(frozen=True)
class About:
    """What an importance matrix was computed on: `chunks` sequences of `length` tokens from the texts `datasets`."""

    datasets: tuple[str, ...]
    chunks: int
    length: int


Shapes = Mapping[str, tuple[int, int]]  # GGUF name of a weight -> (experts, inputs)


def require_matrix_target(path: str | Path, what: str, source: Path, made: Path | None = None) -> None:
    """Raises OutputError if an importance matrix cannot be written to `path`.

    Its name must end in .gguf or .dat, and it must not lie in the source. Its directory must exist, or be the directory
    `made`, which will be made later. `what` is the flag or argument that messages name.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{what} {path}: give a name that ends in .gguf, or in .dat for the older format")
    require_outside(path, source)
    parent = path.resolve().parent
    if not parent.is_dir() and (made is None or parent != made.resolve()):
        raise OutputError(f"{what} {path}: there is no such directory; make it first")
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise OutputError(f"{what} {path}: its directory cannot be written to; give another one")


def write(path: Path, shapes: Shapes, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    """Writes the entries, one at a time in the order of `shapes`, in the format that the path's suffix names.

    If `path` is a file of the same bytes, it is left as it is. Raises OutputError if it is any other file.
    """
    with named_partial(path) as partial:
        if path.suffix == ".dat":
            _write_legacy(partial, len(shapes), entries, about)
        else:
            _write_gguf(partial, shapes, entries, about)


def read(path: str | Path) -> tuple[dict[str, Entry], About]:
    """{GGUF name of a weight: entry} of a file of either format, and what it was computed on.

    The sums of a GGUF stay in the file until they are used. Raises CheckpointError for a file of neither format.
    """
    path = Path(path)
    with opened(path) as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return _read_gguf(path)
    try:
        return _read_legacy(path)
    except (struct.error, UnicodeDecodeError, ValueError):
        raise CheckpointError(f"{path}: is not an importance matrix, neither a whole .gguf nor a whole .dat") from None


def _write_gguf(path: Path, shapes: Shapes, entries: Iterable[tuple[str, Entry]], about: About) -> None:
    gguf = package("an importance matrix")

    class Writer(gguf.GGUFWriter):  # type: ignore[misc, name-defined]
        def add_architecture(self) -> None:
            """Writes nothing, because an importance matrix does not have an architecture."""

    with closing(Writer(path, "")) as writer:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [_utf8(name).decode() for name in about.datasets])
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
            calls = -(-int(entry.counts.max()) // about.length)  # chunks that the weight saw, rounded up and never 0
            text, values = name.encode(), (entry.means * calls).astype("<f4")
            file.write(struct.pack(f"<i{len(text)}sii", len(text), text, calls, values.size))
            file.write(values.tobytes())
        text = _utf8(about.datasets[-1])
        file.write(struct.pack(f"<ii{len(text)}s", about.chunks, len(text), text))


def _read_gguf(path: Path) -> tuple[dict[str, Entry], About]:
    file, entries = read_gguf(path), {}
    for name in (name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)):
        sums, counts = file.tensors[name + SUMS], file.tensors.get(name + COUNTS)
        if counts is None or {sums.dtype, counts.dtype} != {"F32"} or sums.numel % counts.numel:
            raise _unlike(path, name)
        seen = mapped(counts).view("<f4").reshape(-1)
        if not (np.abs(seen) < MOST_TOKENS).all():
            raise CheckpointError(
                f"{path}: {name}{COUNTS} holds what is no number of tokens (NaN, infinity, 1e30); get the file again"
            )
        entries[name] = Entry(mapped(sums).view("<f4").reshape(seen.size, -1), np.rint(seen).astype(np.int64))
    if not entries:
        raise CheckpointError(f"{path}: holds no {SUMS} tensors, so it is not an importance matrix")
    texts = file.fields.get("imatrix.datasets")
    named = texts.value if texts and len(texts.raw) <= MOST_NAMES else ()
    if not isinstance(named, (list, tuple)):
        raise CheckpointError(f"{path}: says in an unknown form what it was computed on; get the file again")
    numbers = (file.number(f"imatrix.{key}") for key in ("chunk_count", "chunk_size"))
    return entries, About(tuple(map(_shown, named)), *numbers)


def _unlike(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} has no {COUNTS} that go with its {SUMS}; get the file again")


def _read_legacy(path: Path) -> tuple[dict[str, Entry], About]:
    """{GGUF name: entry} of a .dat, and what it was computed on; sums are means times `ncall`, counts are `ncall`.

    Raises struct.error or ValueError for another kind of file.
    """
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
        chunks = number() if left else 0  # the text's name follows; older files have neither
        return entries, About((_shown(taken(number()).decode("utf-8", "replace")),) if left else (), chunks, 0)


def _utf8(name: str) -> bytes:
    """A name of a file, which may hold any byte, as UTF-8."""
    return name.encode("utf-8", "backslashreplace")


def _shown(text: Any) -> str:
    """A name from a file with its control characters replaced, because a file may hold anything."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(text))
