"""Zeroes the lowest scores of a matrix on a GPU in one pass, in Triton; the bits are the same as those of `masks.py`.

A matrix is read once and written once. The eager route takes dozens of passes and waits for the device at each chunk of
rows. Import this module late, because not every torch has Triton. Ask `agrees` first, because compilers have bugs too.

Scores are compared as the bits of float32 without the sign; read as integers, these sort as the floats do. The only
operation on floats is a product, so nothing can be fused. It compiles to `mul.rn.f32`, never to `mul.rn.ftz.f32`, so
denormals stay. This was read in the PTX of Triton 3.6 and 3.9; their ftz options concern libdevice, and AMD's is off
unless asked for.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

import functools
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
FLOAT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
GROUPS = (2, 4, 8, 16)
LONGEST = 1 << 16  # columns; one program holds a whole row, and registers spill above 1 << 15
INFINITE, HIGHEST = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF)  # float32 bits of infinity, and of the last NaN

# What Triton raises when it cannot compile or load a kernel: its own errors (CompilationError, PTXASError,
# OutOfResources); RuntimeError from its passes, its driver or a missing C compiler; CalledProcessError from that
# compiler; AssertionError without libcuda; OSError without ldconfig or a cache directory; ImportError from a launcher.
UNUSABLE = (triton.TritonError, RuntimeError, CalledProcessError, AssertionError, OSError, ImportError)


@triton.jit
def scores_of(bits, norms, column, inside, dtype: tl.constexpr):
    """The scores |weight| * norm as float32 bits, int32 in the shape of `bits`; rounding is the same for both signs."""
    if dtype == tl.bfloat16:
        weight = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # the interpreter's cast loses denormals
    else:
        weight = bits.to(dtype, bitcast=True).to(tl.float32)
    if norms is not None:
        weight = weight * tl.load(norms + column, mask=inside, other=0.0)
    return weight.to(tl.int32, bitcast=True) & HIGHEST


@triton.jit
def prune_groups(
    weight, norms, finite, columns, row_stride, column_stride, count,
    dtype: tl.constexpr, OF: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Prunes LANES groups of a row, held as (OF, LANES), so that each thread has whole groups in its registers."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * LANES + tl.arange(0, LANES)
    place = tl.arange(0, OF)
    column = group[None, :] * OF + place[:, None]  # (OF, LANES)
    inside = (group * OF < columns)[None, :]
    at = weight + row * row_stride + column.to(tl.int64) * column_stride
    bits = tl.load(at, mask=inside, other=0)  # (OF, LANES)
    score = scores_of(bits, norms, column, inside, dtype)
    tl.store(finite, 0, mask=tl.max(tl.max(score, axis=0), axis=0) >= INFINITE)
    mine, other = score[:, None, :], score[None, :, :]
    first = tl.where(place[None, :, None] < place[:, None, None], other <= mine, other < mine)  # (OF, OF, LANES)
    rank = tl.sum(first.to(tl.int32), axis=1)  # (OF, LANES): how many of the group are lower
    tl.store(at, tl.where(rank < count, 0, bits), mask=inside)


@triton.jit
def prune_row(
    weight, norms, finite, columns, row_stride, column_stride, count, dtype: tl.constexpr, BLOCK: tl.constexpr
):
    """Prunes a row of at most BLOCK columns.

    `kth` becomes its count-th lowest score: the highest value that has fewer than `count` scores below it.
    """
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = weight + tl.program_id(0).to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    bits = tl.load(at, mask=inside, other=0)
    score = scores_of(bits, norms, column, inside, dtype)
    tl.store(finite, 0, mask=tl.max(score, axis=0) >= INFINITE)
    score = tl.where(inside, score, HIGHEST)
    kth = 0
    for step in range(31):
        trial = kth | (1 << (30 - step))
        kth = tl.where(tl.sum((score < trial).to(tl.int32), axis=0) < count, trial, kth)
    tied = score == kth
    free = count - tl.sum((score < kth).to(tl.int32), axis=0)
    pruned = (score < kth) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= free))
    tl.store(at, tl.where(pruned, 0, bits), mask=inside)


def lowest_of_groups_(weight: torch.Tensor, norms: torch.Tensor | None, of: int, count: int) -> torch.Tensor:
    """Zeroes in place the `count` lowest scores |weight| * norm of each `of` consecutive columns.

    Of equal scores, the one in the lowest column is pruned first. `weight` (rows, columns) is bfloat16, float16 or
    float32, with any strides. `norms` is float32 (columns,), at least 0, or None for ones. `of` is one of GROUPS and
    divides the columns. Returns whether all scores were finite, as a bool () on the device; the host has not waited for
    it. If they were not, the weights are not usable.
    """
    lanes = max(128, 1024 // of)  # at least one group for each thread
    grid = (weight.shape[0], triton.cdiv(weight.shape[1] // of, lanes))
    return launch(prune_groups[grid], weight, norms, count, OF=of, LANES=lanes, num_warps=4)


def lowest_of_rows_(weight: torch.Tensor, norms: torch.Tensor | None, count: int) -> torch.Tensor:
    """Zeroes in place exactly the `count` lowest scores |weight| * norm of each row.

    Ties, arguments and result are as in `lowest_of_groups_`; there are at most LONGEST columns. A transposed weight is
    pruned correctly, but read slowly.
    """
    block = triton.next_power_of_2(weight.shape[1])
    return launch(
        prune_row[(weight.shape[0],)], weight, norms, count, BLOCK=block, num_warps=min(16, max(4, block // 512))
    )


def launch(kernel: Any, weight: torch.Tensor, norms: torch.Tensor | None, count: int, **shape: int) -> torch.Tensor:
    """Runs a kernel on the weight's device; returns a bool () there, which is False if a score was not finite."""
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    norms = None if norms is None else norms.contiguous()
    bits = weight.view(BITS[weight.dtype])
    with torch.cuda.device_of(weight):
        kernel(
            bits, norms, finite, weight.shape[1], *weight.stride(), count,
            dtype=FLOAT[weight.dtype], enable_fp_fusion=False, **shape,
        )  # fmt: skip
    return finite


@functools.cache
def available(device: str = "cuda") -> bool:
    """Whether Triton runs on a device of this kind: a GPU, or with its interpreter any (TRITON_INTERPRET=1)."""
    return (device == "cuda" and torch.cuda.is_available()) or not isinstance(prune_row, triton.runtime.JITFunction)


def prune_(weight: torch.Tensor, norms: torch.Tensor | None, size: int, count: int) -> torch.Tensor:
    """Zeroes in place the `count` lowest scores of each `size` consecutive columns: small groups, or whole rows.

    Returns whether all scores were finite, as a bool () on the device.
    """
    if size in GROUPS:
        return lowest_of_groups_(weight, norms, size, count)
    return lowest_of_rows_(weight, norms, count)


def agrees(weight: torch.Tensor, norms: torch.Tensor | None, size: int, count: int) -> bool:
    """Whether `prune_` takes this kind of weight and groups, and its kernel is right on this machine.

    A kernel is right if it prunes a sample of the same width, dtype and order in memory to the bits of a stable sort,
    and notices a NaN. Each kind is tried once per process. A kernel that cannot be compiled or loaded (UNUSABLE) is not
    right.
    """
    columns = weight.shape[1]
    fits = columns % size == 0 if size in GROUPS else size == columns <= LONGEST
    if not (fits and weight.dtype in BITS and available(weight.device.type)):
        return False
    return tried(weight.device, weight.dtype, columns, weight.stride(1) == 1, norms is not None, size, count)


@functools.cache
def tried(
    device: torch.device, dtype: torch.dtype, columns: int, dense: bool, scaled: bool, size: int, count: int
) -> bool:
    """Whether the kernel is right for one kind of weight: with `dense` rows or transposed, `scaled` by norms or not."""
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(16, columns, generator=random)
    sample[4:8] = sample[4:8].mul(2).round()  # ties, 0.0 and -0.0
    sample[8:12] *= torch.finfo(dtype).tiny  # denormals
    sample[12:] = sample[12:].sign()  # equal magnitudes
    expected = sample.to(device, dtype)
    weight = expected.clone() if dense else expected.t().contiguous().t()
    norms = torch.rand(columns, generator=random).mul(4).ceil().div(3).to(device) if scaled else None
    score = expected.float().abs() * (1 if norms is None else norms)
    lowest = score.view(-1, size).sort(dim=1, stable=True).indices[:, :count]
    expected.view(-1, size).scatter_(1, lowest, 0)
    try:
        right = bool(prune_(weight, norms, size, count)) and torch.equal(
            weight.view(BITS[dtype]), expected.view(BITS[dtype])
        )
        weight[-1, -1] = torch.nan
        return right and not bool(prune_(weight, norms, size, count))
    except UNUSABLE:
        return False
