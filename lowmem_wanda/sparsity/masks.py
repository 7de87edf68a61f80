"""Applies a pattern to weights in place, and counts what the weights hold afterwards."""

import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import NonFiniteError
from lowmem_wanda.sparsity.patterns import Pattern
from lowmem_wanda.sparsity.selection import Scaled, Score, row_chunks, suitable_chunk

SIGNED_CHUNK = 1 << 18  # weights that get random signs at a time; the signs depend on it, so it is the same everywhere


def prune_lowest(weight: torch.Tensor, score: Score, pattern: Pattern, chunk: int = 0) -> None:
    """Zeroes the weights of the lowest scores in a `weight` (rows, columns), in place.

    Pruned weights become +0.0 and kept weights keep their bits: the weights are multiplied as integers, because a
    product of floats leaves -0.0. About `chunk` weights are pruned at a time (0: a number that suits the device).
    Raises NumberError for a score that is NaN or infinite.
    """
    finite = _in_one_pass(weight, score, pattern)
    if finite is None:
        finite = _in_chunks(weight, score, pattern, chunk)
    if not bool(finite):
        raise NonFiniteError("its weights or scores hold NaN or infinity")


def _in_one_pass(weight: torch.Tensor, score: Score, pattern: Pattern) -> torch.Tensor | None:
    """Prunes with a Triton kernel and returns whether all scores are finite, bool (); None if no kernel can do it."""
    group = pattern.groups(weight.shape[1])
    if group is None or not isinstance(score, Scaled) or not weight.is_cuda or not (kernels := triton_kernels()):
        return None
    if not kernels.agrees(weight, score.norms, group.size, group.zeros):
        return None
    return kernels.prune_(weight, score.norms, group.size, group.zeros)  # type: ignore[no-any-return]


@lru_cache
def triton_kernels() -> Any:
    """The module `kernels`, or None if Triton is not installed."""
    try:
        from lowmem_wanda.sparsity import kernels
    except ImportError:
        return None
    return kernels


def _in_chunks(weight: torch.Tensor, score: Score, pattern: Pattern, chunk: int) -> torch.Tensor:
    """Prunes some rows at a time and returns whether all scores are finite, bool ()."""
    rows, columns = weight.shape
    bits = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    highest = torch.zeros((), device=weight.device)

    def noted(part: slice) -> torch.Tensor:
        scores = score(part)
        torch.maximum(highest, scores.amax(), out=highest)
        return scores

    for part, pruned in pattern.masks(noted, rows, columns, chunk or suitable_chunk(weight.device)):
        if weight.is_cpu:  # numpy has no threads that wait for each other
            kept = bits[part].numpy()
            np.multiply(kept, np.logical_not(pruned.numpy()), out=kept)
        else:
            bits[part].mul_(pruned.logical_not_())
    return torch.isfinite(highest)  # a NaN or an infinity is carried into the maximum


def survey(weight: torch.Tensor, pattern: Pattern, chunk: int = 0) -> tuple[int, bool]:
    """The number of zeros in a weight (rows, columns), and whether these zeros hold the pattern."""
    rows, columns = weight.shape
    group = pattern.groups(columns)
    zeros = torch.zeros((), dtype=torch.int64, device=weight.device)
    holds = torch.ones((), dtype=torch.bool, device=weight.device)
    for part in row_chunks(rows, columns, chunk or suitable_chunk(weight.device)):
        counts = pattern.zeros_per_group(weight[part] == 0)
        zeros += counts.sum(dtype=torch.int64)
        holds &= (counts >= (group.zeros if group else 0)).all()
    return int(zeros), bool(holds) and int(zeros) >= pattern.zeros_in_all(weight.numel())


def sign_zeros(weight: torch.Tensor, seed: int, name: str) -> tuple[int, float]:
    """Replaces the zeros of a weight (rows, columns), in place, by its dtype's smallest normal number of random sign.

    Returns how many weights have that magnitude afterwards, and the magnitude. This is for codebooks without a zero,
    which give the same sign to all zeros. The signs depend on the seed and the name alone.
    """
    tiny, filled = float(torch.finfo(weight.dtype).smallest_normal), 0
    rng = np.random.default_rng([seed % (1 << 32), zlib.crc32(name.encode())])
    for part in row_chunks(len(weight), weight.shape[1], SIGNED_CHUNK):
        rows = weight[part]
        signs = torch.from_numpy(rng.integers(0, 2, tuple(rows.shape), dtype=np.int8)).to(weight.device)
        rows.copy_(torch.where(rows == 0, (signs * 2 - 1).to(weight.dtype) * tiny, rows))
        filled += int((rows.abs() == tiny).sum())
    return filled, tiny
