"""Reads safetensors files: checks their headers, locates tensors and copies a tensor's bytes to memory.

A file (https://github.com/huggingface/safetensors#format) starts with eight bytes, the little-endian length of the
header. Then come the header, JSON {name: {dtype, shape, data_offsets}}, and the tensors' bytes. A file that has changed
since its header was read is an error.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowmem_wanda.errors import CheckpointError

PIECE = 16 << 20  # bytes that are read at a time
MAX_HEADER = 32 << 20  # bytes; 120 of them name a tensor, and take up to 1.5 KB of memory
MAX_JSON = 64 << 20  # bytes of an index, a configuration or a report
MAX_DIMENSIONS = 16
POINTER = b"version https://git-lfs.github.com/spec/"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# the bits of infinity; without its sign, a NaN is a larger number, and all that is finite a smaller one
EXPONENT = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
QUANTIZED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
ITEMSIZE = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
ITEMSIZE |= dict.fromkeys(QUANTIZED, 1)


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor in a file: `nbytes` bytes that begin `offset` bytes after the start of `file`.

    `stamp` is the file's size in bytes and its times of change in ns, as they were when its header was read.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: tuple[int, ...] | None = None

    @property
    def is_made(self) -> bool:
        """Whether its bytes do not lie in the file as they are, one after the other."""
        return False

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def pieces(self, size: int = PIECE, spans: Sequence[tuple[int, int]] | None = None) -> Iterator[bytearray]:
        """Yields the tensor's bytes, at most `size` at a time, or those of its `spans` (start, stop) one after another.

        Raises CheckpointError if the file has changed.
        """
        with opened(self.file) as file:
            for start, stop in ((0, self.nbytes),) if spans is None else spans:
                file.seek(self.offset + start)
                for at in range(start, stop, size):
                    piece = bytearray(min(size, stop - at))
                    fill(file, self, memoryview(piece))
                    yield piece
            self.check(file)

    def check(self, file: BinaryIO) -> None:
        """Raises CheckpointError if the open file has changed since its header was read."""
        if self.stamp is not None and stamp(file) != self.stamp:
            raise changed(self)


def in_pieces(made: Iterator[bytes | bytearray], nbytes: int, size: int) -> Iterator[bytearray]:
    """Yields the first `nbytes` bytes of what comes in parts of any size, at most `size` at a time."""
    left = memoryview(b"")
    for at in range(0, nbytes, size):
        piece, done = bytearray(min(size, nbytes - at)), 0
        while done < len(piece):
            left = left or memoryview(next(made))
            count = min(len(left), len(piece) - done)
            piece[done : done + count] = left[:count]
            done, left = done + count, left[count:]
        yield piece


def read_header(file: Path) -> dict[str, Tensor]:
    """{name: tensor} of one safetensors file. Raises CheckpointError unless they fill it exactly, without overlap."""
    require_no_pointer(file, f"download it to {file.parent}")
    with opened(file, f"download it to {file.parent}") as handle:
        size, *_ = when = stamp(handle)
        (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{file.name}: has no safetensors header ({length} bytes of {size}, at most {MAX_HEADER} are read); "
                "the file is truncated or not a safetensors file: download it again"
            )
        text = handle.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name}: its header is not valid JSON ({_told(error)}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: its header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, name, entry, 8 + length, when) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file.name}: tensor {tensor.name} starts at byte {tensor.offset} instead of {end}; download it again"
            )
        end += tensor.nbytes
    if end != size:
        kind = "truncated" if size < end else "too long"
        raise CheckpointError(
            f"{file.name}: is {kind}, {size} bytes where its header promises {end}; download it again"
        )
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if the file is missing or holds anything else."""
    require_no_pointer(file, "download it too")
    with opened(file, "download it too") as handle:
        if (size := stamp(handle)[0]) > MAX_JSON:
            raise CheckpointError(f"{file}: has {size} bytes, more than any such file; at most {MAX_JSON} are read")
        text = handle.read(MAX_JSON)
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: is not valid JSON ({_told(error)}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name}: is not a JSON object; download it again")
    return content


def _tensor(file: Path, name: str, entry: Any, data: int, when: tuple[int, ...]) -> Tensor:
    """The tensor of one header entry, which is checked; `data` is the byte at which the tensors' bytes start."""

    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if _naturals(*shape, start, stop):
            pass
        case _:
            raise CheckpointError(f"{file.name}: the header entry of tensor {name} is malformed; download it again")
    if dtype not in ITEMSIZE:
        raise CheckpointError(
            f"{file.name}: tensor {name} has dtype {dtype}, which is not read; get the unquantized (bf16, "
            "fp16, fp32) checkpoint"
        )
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if stop - start != nbytes:
        raise CheckpointError(
            f"{file.name}: tensor {name}, {dtype} {shape}, needs {nbytes} bytes but has "
            f"{stop - start}; download it again"
        )
    return Tensor(name, file, dtype, tuple(shape), data + start, nbytes, when)


def require_no_pointer(path: Path, move: str = "restore it and run again") -> None:
    """Raises CheckpointError if a file is a pointer of Git LFS."""
    with opened(path, move) as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS, not the file; run `git lfs install` and `git lfs pull` in {path.parent}"
        )


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _naturals(*values: Any) -> bool:
    return len(values) <= MAX_DIMENSIONS and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands in it twice")
    return content


def fill(file: BinaryIO, tensor: Tensor, out: memoryview) -> None:
    """Reads until `out` is full, because one read may give fewer bytes than it was asked for."""
    while out:
        count = file.readinto(out)  # type: ignore[attr-defined]
        if not count:
            raise changed(tensor)
        out = out[count:]


def nonfinite(piece: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Whether whole values of a dtype, as bytes, hold NaN or infinity. 4 GB/s; False for whole numbers."""
    if dtype not in EXPONENT or not len(piece):
        return False
    kind, exponent = EXPONENT[dtype]
    bits = np.frombuffer(piece, kind)
    sign = 1 << (8 * bits.itemsize - 1)
    return int((bits & (sign - 1)).max()) >= exponent


def stamp(file: BinaryIO) -> tuple[int, ...]:
    """What changes when an open file does: its size in bytes, the times of change of content and of entry in ns.

    A program can set the first time back, as `rsync -t` does, but not the second (on Windows it is that of creation).
    """
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def advise(file: BinaryIO, offset: int, nbytes: int, how: str) -> None:
    """Tells the system how a range of a file will be used (POSIX_FADV_...); 0 bytes: up to the end of the file.

    Where the system takes no such advice, nothing happens.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(file.fileno(), offset, nbytes, getattr(os, f"POSIX_FADV_{how}"))


@contextmanager
def opened(path: Path, move: str = "restore it and run again") -> Iterator[BinaryIO]:
    """The file, opened without a buffer. An error of the system while it is read becomes a CheckpointError.

    So does a folder, a pipe or a device in its place, which is not waited for. `move` is what to do then.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            require_regular(path, handle)
        except CheckpointError:
            os.close(handle)
            raise
        with open(handle, "rb", buffering=0) as file:
            yield file  # type: ignore[misc]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {move}") from None
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise CheckpointError(f"{str(path)!r}: is not a name that a file can have; {move}") from None


def require_regular(path: Path, handle: int) -> None:
    """Raises CheckpointError if an open file is a folder, a pipe or a device."""
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
        raise CheckpointError(f"{path}: is a {kind}, not a file; put the file itself in its place")


def changed(tensor: Tensor) -> CheckpointError:
    """The error for a file that has changed since its header was read."""
    return CheckpointError(
        f"{tensor.file.name}: was changed or cut short while this ran, found at tensor {tensor.name}; restore it "
        "and run again"
    )
