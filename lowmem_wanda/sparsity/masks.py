"""Patterns applied to weights in place, and what weights hold afterwards."""

import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import NumberError
from lowmem_wanda.sparsity.patterns import Pattern
from lowmem_wanda.sparsity.selection import Scaled, Score, row_chunks, suitable_chunk

SIGNED_CHUNK = 1 << 18  # weights that get signs at a time, the same everywhere: the signs depend on it


def prune_lowest(weight: torch.Tensor, score: Score, pattern: Pattern, chunk: int = 0) -> None:
    """Zeros the lowest scores of `weight` (rows, columns) in place, `chunk` weights at a time.

    A `chunk` of 0 is what suits the device. Zeros are +0.0 and the kept weights keep their bits: weights are multiplied
    as integers, since a product of floats leaves -0.0. Raises NumberError for a score that is NaN or infinite.
    """
    finite = _in_one_pass(weight, score, pattern)
    if finite is None:
        finite = _in_chunks(weight, score, pattern, chunk)
    if not bool(finite):
        raise NumberError("its weights or scores hold NaN or infinity")


def _in_one_pass(weight: torch.Tensor, score: Score, pattern: Pattern) -> torch.Tensor | None:
    """Whether all scores are finite (), once a Triton kernel has pruned the weight; None where no kernel can."""
    group = pattern.groups(weight.shape[1])
    if group is None or not isinstance(score, Scaled) or not weight.is_cuda or not (kernels := triton_kernels()):
        return None
    if not kernels.agrees(weight, score.norms, group.size, group.zeros):
        return None
    return kernels.prune_(weight, score.norms, group.size, group.zeros)  # type: ignore[no-any-return]


@lru_cache
def triton_kernels() -> Any:
    """The module `kernels`, or None where this machine has no Triton."""
    try:
        from lowmem_wanda.sparsity import kernels
    except ImportError:
        return None
    return kernels


def _in_chunks(weight: torch.Tensor, score: Score, pattern: Pattern, chunk: int) -> torch.Tensor:
    """Prunes some rows at a time; gives whether all scores are finite ()."""
    rows, columns = weight.shape
    bits = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    highest = torch.zeros((), device=weight.device)

    def noted(part: slice) -> torch.Tensor:
        scores = score(part)
        torch.maximum(highest, scores.amax(), out=highest)
        return scores

    for part, pruned in pattern.masks(noted, rows, columns, chunk or suitable_chunk(weight)):
        if weight.is_cpu:  # numpy, which has no threads to wait for
            kept = bits[part].numpy()
            np.multiply(kept, np.logical_not(pruned.numpy()), out=kept)
        else:
            bits[part].mul_(pruned.logical_not_())
    return torch.isfinite(highest)  # NaN and infinity are carried on to the maximum


def survey(weight: torch.Tensor, pattern: Pattern, chunk: int = 0) -> tuple[int, bool]:
    """The number of zeros in a weight (rows, columns), and whether they hold the pattern."""
    rows, columns = weight.shape
    group = pattern.groups(columns)
    zeros = torch.zeros((), dtype=torch.int64, device=weight.device)
    holds = torch.ones((), dtype=torch.bool, device=weight.device)
    for part in row_chunks(rows, columns, chunk or suitable_chunk(weight)):
        counts = pattern.zeros_per_group(weight[part] == 0)
        zeros += counts.sum(dtype=torch.int64)
        holds &= (counts >= (group.zeros if group else 0)).all()
    return int(zeros), bool(holds) and int(zeros) >= pattern.zeros_in_all(weight.numel())


def sign_zeros(weight: torch.Tensor, seed: int, name: str) -> tuple[int, float]:
    """Gives the zeros of a weight (rows, columns) its smallest normal magnitude and random signs, in place.

    Returns how many weights have that magnitude afterwards, and the magnitude. This is for codebooks without a zero,
    which give all zeros one sign. The signs depend on the seed and the name alone.
    """
    tiny, filled = float(torch.finfo(weight.dtype).smallest_normal), 0
    rng = np.random.default_rng([seed % (1 << 32), zlib.crc32(name.encode())])
    for part in row_chunks(len(weight), weight.shape[1], SIGNED_CHUNK):
        rows = weight[part]
        signs = torch.from_numpy(rng.integers(0, 2, tuple(rows.shape), dtype=np.int8)).to(weight.device)
        rows.copy_(torch.where(rows == 0, (signs * 2 - 1).to(weight.dtype) * tiny, rows))
        filled += int((rows.abs() == tiny).sum())
    return filled, tiny
