"""File tensors as torch tensors, and the memory that they are read into."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from lowmem_wanda.checkpoint import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Buffer:
    """Memory that every block in turn is laid in.

    Blocks that are allocated and freed one by one leave holes that glibc keeps: 34 MB more for each block
    of 26 MB (8 blocks of width 1024, torch 2.13).
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def empty(self, wanted: dict[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, torch.Tensor]:
        """Uninitialised tensors of the wanted {name: (shape, dtype)}, aligned to 64 bytes, in place of all before."""
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()}
        starts = dict(zip(sizes, accumulate((-(-size // 64) * 64 for size in sizes.values()), initial=0), strict=False))
        if (total := sum(sizes.values()) + 64 * len(sizes)) > len(self._memory):
            device = self._memory.device
            self._memory = torch.empty(0, device=device)  # the old one goes first
            self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        return {
            name: self._memory[starts[name] : starts[name] + sizes[name]].view(dtype).view(tuple(shape))
            for name, (shape, dtype) in wanted.items()
        }


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """A tensor in its stored dtype and shape, in host memory of its own."""
    out = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    read_into(tensor, out)
    return out


def read_into(tensor: Tensor, out: torch.Tensor) -> None:
    """Reads a tensor to where `out`, contiguous and of its dtype and shape, lies."""
    if out.is_cpu:
        tensor.read_into(out.reshape(-1).view(torch.uint8).numpy())
    else:
        out.copy_(read_tensor(tensor))
