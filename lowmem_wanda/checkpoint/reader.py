"""Reads safetensors files: checks their headers, locates tensors and copies a tensor's bytes to memory.

A file (https://github.com/huggingface/safetensors#format) starts with eight bytes, the little-endian length of the
header. Then come the header, JSON {name: {dtype, shape, data_offsets}}, and the tensors' bytes. A tensor is copied to
memory in one of two ways:

pread   its bytes are read to their place, 16 MiB at a time (the default; nothing is ever mapped)
mmap    exactly its bytes are mapped read-only, copied and unmapped

Either way the tensor is copied once, and the system can have its pages back afterwards. A file that has changed since
its header was read is an error. If a file is cut short while its mapping is being copied, the system kills the process;
this is one reason for the default.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowmem_wanda.errors import CheckpointError

PIECE = 16 << 20  # bytes that are read at a time
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
QUANTIZED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
ITEMSIZE = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
ITEMSIZE |= dict.fromkeys(QUANTIZED, 1)


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor in a file: `nbytes` bytes that begin `offset` bytes after the start of `file`.

    `stamp` is the file's size in bytes and its time of change in ns, as they were when its header was read.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: tuple[int, int] | None = None

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
                    _fill(file, self, memoryview(piece))
                    yield piece
            self.check(file)

    def check(self, file: BinaryIO) -> None:
        """Raises CheckpointError if the open file has changed since its header was read."""
        if self.stamp is not None and stamp(file) != self.stamp:
            raise changed(self)


def read_header(file: Path) -> dict[str, Tensor]:
    """{name: tensor} of one safetensors file. Raises CheckpointError unless they fill it exactly, without overlap."""
    try:
        with open(file, "rb") as handle:
            size, _ = when = stamp(handle)
            (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file.name}: has no safetensors header ({length} bytes of {size}); the file is truncated "
                    "or not a safetensors file"
                )
            header = json.loads(handle.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror}); download it to {file.parent}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: its header is not valid JSON ({error}); download it again") from None
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
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{file.name}: cannot be read in {file.parent} ({error.strerror}); download it too"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name}: is not a JSON object; download it again")
    return content


def _tensor(file: Path, name: str, entry: Any, data: int, when: tuple[int, int]) -> Tensor:
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


def _naturals(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands in it twice")
    return content


def read(destinations: Sequence[tuple[Tensor, np.ndarray]], way: str = "pread", drop: bool = False) -> None:
    """Copies the bytes of each tensor into its array, uint8 (nbytes,), in the order in which they lie on disk.

    `way` is "pread" or "mmap". With `drop` the pages are given back to the system afterwards. Raises CheckpointError.
    """
    copy = _mapped if way == "mmap" else _read_at
    ordered = sorted(destinations, key=lambda pair: (pair[0].file, pair[0].offset))
    for path, group in groupby(ordered, key=lambda pair: pair[0].file):
        with opened(path) as file:
            advise(file, 0, 0, "SEQUENTIAL")  # a cold file: 1,130 MB/s with this advice, 580 without
            for tensor, out in group:
                tensor.check(file)
                if tensor.nbytes:
                    copy(file, tensor, out)
                tensor.check(file)
                if drop:
                    advise(file, tensor.offset, tensor.nbytes, "DONTNEED")


def _read_at(file: BinaryIO, tensor: Tensor, out: np.ndarray) -> None:
    file.seek(tensor.offset)
    for start in range(0, tensor.nbytes, PIECE):
        _fill(file, tensor, out[start : start + PIECE].data)


def _fill(file: BinaryIO, tensor: Tensor, out: memoryview) -> None:
    """Reads until `out` is full, because one read may give fewer bytes than it was asked for."""
    while out:
        count = file.readinto(out)  # type: ignore[attr-defined]
        if not count:
            raise changed(tensor)
        out = out[count:]


def _mapped(file: BinaryIO, tensor: Tensor, out: np.ndarray) -> None:
    start = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
    skip = tensor.offset - start
    if os.fstat(file.fileno()).st_size < tensor.offset + tensor.nbytes:  # past the end, a mapping raises SIGBUS
        raise changed(tensor)
    with mmap.mmap(file.fileno(), skip + tensor.nbytes, offset=start, access=mmap.ACCESS_READ) as mapped:
        out[:] = np.frombuffer(mapped, np.uint8, tensor.nbytes, skip)


def stamp(file: BinaryIO) -> tuple[int, int]:
    """The size in bytes and the time of change in ns of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def advise(file: BinaryIO, offset: int, nbytes: int, how: str) -> None:
    """Tells the system how a range of a file will be used (POSIX_FADV_...); 0 bytes: up to the end of the file.

    Where the system takes no such advice, nothing happens.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(file.fileno(), offset, nbytes, getattr(os, f"POSIX_FADV_{how}"))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, opened without a buffer. An error of the system while it is read becomes a CheckpointError."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file  # type: ignore[misc]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); restore it and run again") from None


def changed(tensor: Tensor) -> CheckpointError:
    """The error for a file that has changed since its header was read."""
    return CheckpointError(
        f"{tensor.file.name}: was changed or cut short while this ran, found at tensor {tensor.name}; restore it "
        "and run again"
    )
