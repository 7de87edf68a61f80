"""Applies a pattern to weights in place, and counts what the weights hold afterwards."""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import NonFiniteError
from lowmem_wanda.sparsity import host
from lowmem_wanda.sparsity.patterns import Pattern
from lowmem_wanda.sparsity.selection import (
    Scaled,
    Score,
    kth_smallest,
    lowest_of_groups,
    row_chunks,
    suitable_chunk,
)

LONG = 16  # weights of a group that are summed up by torch's `sum`
SIGNED_CHUNK = 1 << 18  # weights that get random signs at a time; the signs depend on it, so it is the same everywhere


def prune_lowest(weight: torch.Tensor, score: Score, pattern: Pattern, chunk: int = 0) -> tuple[int, bool]:
    """Zeroes the weights of the lowest scores in a `weight` (rows, columns), in place.

    Pruned weights become +0.0 and kept weights keep their bits: the weights are multiplied as integers, because a
    product of floats leaves -0.0. About `chunk` weights are pruned at a time (0: a number that suits the device).
    Returns what `survey` says of the weight afterwards. Raises NumberError for a score that is NaN or infinite.
    """
    chunk = chunk or suitable_chunk(weight.device)
    if weight.is_cpu:
        finite, zeros, holds = host.prune_(weight, score, pattern, chunk)
    else:
        fused = _in_one_pass(weight, score, pattern)
        finite = bool(_in_chunks(weight, score, pattern, chunk) if fused is None else fused)
        zeros, holds = survey(weight, pattern, chunk) if finite else (0, False)
    if not finite:
        raise NonFiniteError("its weights or scores hold NaN or infinity")
    return zeros, holds


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
    bits = weight.view(host.SIGNED[weight.element_size()])
    highest = torch.zeros((), device=weight.device)

    def noted(part: slice) -> torch.Tensor:
        scores = score(part)
        torch.maximum(highest, scores.amax(), out=highest)
        return scores

    for part, pruned in masks(noted, pattern, weight.shape[0], weight.shape[1], chunk):
        bits[part].mul_(pruned.logical_not_())
    return torch.isfinite(highest)  # a NaN or an infinity is carried into the maximum


def masks(score: Score, pattern: Pattern, rows: int, columns: int, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (slice of rows, bool mask of the weights to prune in them), about `chunk` weights at a time, in torch."""
    group, parts = pattern.groups(columns), row_chunks(rows, columns, chunk)
    if group is None:
        threshold = kth_smallest(lambda: map(score, parts), pattern.zeros_in_all(rows * columns) - 1)
    for part in parts:
        scores = score(part)
        yield part, scores <= threshold if group is None else lowest_of_groups(scores, group.size, group.zeros)


def lowest_mask(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask of the scores that the pattern prunes, bool (rows, columns); they are float32 and at least 0."""
    if scores.is_cpu:
        return host.lowest_mask(scores, pattern)
    parts = masks(lambda rows: scores[rows], pattern, len(scores), scores.shape[1], suitable_chunk(scores.device))
    return torch.cat([pruned for _, pruned in parts])


def survey(weight: torch.Tensor, pattern: Pattern, chunk: int = 0) -> tuple[int, bool]:
    """The number of zeros in a weight (rows, columns), and whether these zeros hold the pattern."""
    rows, columns = weight.shape
    parts, group = row_chunks(rows, columns, chunk or suitable_chunk(weight.device)), pattern.groups(columns)
    if weight.is_cpu:
        found = [host.count_zeros(host.bits_of(weight)[part], group) for part in parts]
        zeros, holds = sum(count for count, _ in found), all(held for _, held in found)
        return zeros, holds and zeros >= pattern.zeros_in_all(weight.numel())
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    least = torch.ones((), dtype=torch.bool, device=weight.device)
    for part in parts:
        counts = _zeros_per_group(weight[part] == 0, group.size if group else columns)
        total += counts.sum(dtype=torch.int64)
        least &= (counts >= (group.zeros if group else 0)).all()
    return int(total), bool(least) and int(total) >= pattern.zeros_in_all(weight.numel())


def _zeros_per_group(mask: torch.Tensor, of: int) -> torch.Tensor:
    """The number of zeros in each `of` consecutive columns of a bool mask (rows, columns) of zeros, int (groups,)."""
    groups = mask.reshape(-1, of).view(torch.uint8)  # (groups, of)
    if of > LONG:
        return groups.sum(dim=1, dtype=torch.int64)
    counts = groups[:, 0].clone()
    for place in range(1, of):  # `sum` over so few values takes 4 times as long
        counts += groups[:, place]
    return counts


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
