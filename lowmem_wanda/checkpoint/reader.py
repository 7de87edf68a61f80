"""Bytes of safetensors files: checked headers, where a tensor lies, and two ways of bringing it to memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes of little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, the tensors' bytes. A tensor is brought to memory in one of two ways:

pread   it is read to its place, 16 MiB at a time (the default: nothing is ever mapped)
mmap    exactly its bytes are mapped read-only, copied and unmapped

Either way the tensor is copied once, and its pages can be given back to the system behind the walk. A file that has
changed since its header was read is an error. (A file that is cut short while its mapping is copied kills the process,
as the system does with mappings; this is one reason for the default.)
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

PIECE = 16 << 20
WAYS = ("pread", "mmap")
MAX_HEADER = 100_000_000  # the limit of the safetensors library
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
QUANTIZED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
ITEMSIZE = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
ITEMSIZE |= dict.fromkeys(QUANTIZED, 1)


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `offset` and `nbytes` in bytes from the start of `file`.

    `stamp` is the file's size and time of change (ns) when its header was read.
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
        return math.prod(self.shape)

    def pieces(self, size: int = PIECE) -> Iterator[bytearray]:
        """The tensor's bytes, `size` (16 MiB) at a time. Raises CheckpointError where the file has changed."""
        with opened(self.file) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                piece = bytearray(min(left, size))
                _fill(file, self, memoryview(piece))
                left -= len(piece)
                yield piece
            self.check(file)

    def check(self, file: BinaryIO) -> None:
        """Raises CheckpointError if the open file is not as it was when its header was read."""
        if self.stamp is not None and stamp(file) != self.stamp:
            raise changed(self)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises CheckpointError unless they fill it exactly, without overlap."""
    try:
        with open(file, "rb") as handle:
            size, _ = when = stamp(handle)
            (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file.name}: no safetensors header ({length} bytes of {size}); the file is truncated "
                    "or no safetensors"
                )
            header = json.loads(handle.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror}); download it to {file.parent}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: its header is no valid JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: its header is no JSON object; download it again")
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
    """The JSON object in a file. Raises CheckpointError."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{file.name}: cannot be read in {file.parent} ({error.strerror}); download it too"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: no valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name}: no JSON object; download it again")
    return content


def _tensor(file: Path, name: str, entry: Any, data: int, when: tuple[int, int]) -> Tensor:
    """One header entry, checked; `data` is the byte at which the tensors start."""

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


def read(wanted: Sequence[tuple[Tensor, np.ndarray]], way: str = "pread", drop: bool = False) -> None:
    """Copies the bytes of each tensor to its array (uint8, nbytes), in the order in which they lie on disk.

    `way` is one of WAYS; `drop` gives the pages back to the system after. Raises CheckpointError.
    """
    copy = _mapped if way == "mmap" else _read_at
    ordered = sorted(wanted, key=lambda pair: (pair[0].file, pair[0].offset))
    for path, group in groupby(ordered, key=lambda pair: pair[0].file):
        with opened(path) as file:
            advise(file, 0, 0, "SEQUENTIAL")  # a cold file: 1,130 MB/s with it, 580 without
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
    """Reads on until `out` is full: a read may give less than was asked for."""
    while out:
        count = file.readinto(out)  # type: ignore[attr-defined]
        if not count:
            raise changed(tensor)
        out = out[count:]


def _mapped(file: BinaryIO, tensor: Tensor, out: np.ndarray) -> None:
    start = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
    skip = tensor.offset - start
    if os.fstat(file.fileno()).st_size < tensor.offset + tensor.nbytes:  # a map past the end kills with SIGBUS
        raise changed(tensor)
    with mmap.mmap(file.fileno(), skip + tensor.nbytes, offset=start, access=mmap.ACCESS_READ) as mapped:
        out[:] = np.frombuffer(mapped, np.uint8, tensor.nbytes, skip)


def stamp(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of change in ns of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def advise(file: BinaryIO, offset: int, nbytes: int, how: str) -> None:
    """Tells the system how a range (0 bytes: to the end) is used, where it listens (POSIX_FADV_...)."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(file.fileno(), offset, nbytes, getattr(os, f"POSIX_FADV_{how}"))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, unbuffered; whatever the system says against reading it becomes a CheckpointError."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file  # type: ignore[misc]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); restore it and run again") from None


def changed(tensor: Tensor) -> CheckpointError:
    """The error for a file that is not as it was."""
    return CheckpointError(
        f"{tensor.file.name}: was changed or cut short while this ran, found at tensor {tensor.name}; restore it "
        "and run again"
    )
