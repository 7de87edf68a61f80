"""File tensors as torch tensors, and the memory that they are laid in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch

from lowmem_wanda.checkpoint.reader import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
ALIGNMENT = 64
Wanted = Mapping[str, tuple[Sequence[int], torch.dtype]]  # name -> shape and dtype


def wanted(tensors: Iterable[Tensor]) -> Wanted:
    """What holds the tensors as they are stored."""
    return {tensor.name: (tensor.shape, DTYPES[tensor.dtype]) for tensor in tensors}


def laid_bytes(wanted: Wanted) -> int:
    """Bytes that `lay` needs."""
    return sum(-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in wanted.values())


def lay(wanted: Wanted, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of `memory` (uint8) for all that is wanted, one after the other, aligned to 64 bytes."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()}
    starts = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()), initial=0)
    return {
        name: memory[start : start + sizes[name]].view(dtype).view(tuple(shape))
        for start, (name, (shape, dtype)) in zip(starts, wanted.items(), strict=False)
    }


class Buffer:
    """Memory that is used again and again, as large as the most that was asked of it.

    What is allocated and freed for each block in turn leaves holes that glibc keeps: 34 MB more for each
    block of 26 MB (8 blocks of width 1024, torch 2.13).
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def empty(self, wanted: Wanted) -> dict[str, torch.Tensor]:
        """Uninitialised tensors in place of all before."""
        if (total := laid_bytes(wanted)) > len(self._memory):
            device = self._memory.device
            self._memory = torch.empty(0, device=device)  # the old one goes first
            self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        return lay(wanted, self._memory)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous host tensor as a flat uint8 array, no copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_cast(tensor: Tensor, out: torch.Tensor) -> torch.Tensor:
    """A tensor's values in the shape, dtype and device of the contiguous `out`, 16 MiB at a time; gives `out`."""
    flat, done = out.reshape(-1), 0
    for piece in tensor.pieces():
        values = torch.frombuffer(piece, dtype=DTYPES[tensor.dtype])
        flat[done : done + len(values)] = values
        done += len(values)
    return out
