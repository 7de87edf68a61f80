"""Sparsity patterns: from a score (rows, columns) to the mask of what is pruned.

"2:4" is NVIDIA's convention: 2 weights *kept* of each 4 consecutive ones along the input dimension.
The paper's code (arXiv 2306.11695, `prune_n:prune_m`) counts the zeros; for 1:4 the two differ.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import NumberError, PatternError
from lowmem_wanda.lowest import kth_smallest, lowest_of_groups, lowest_of_rows

Score = Callable[[slice], torch.Tensor]  # rows of the matrix -> their float32 scores (rows, columns), none negative


@dataclass(frozen=True)
class Scaled:
    """The score |weight| * norms of Wanda, or with no norms (columns) float32 that of magnitude pruning, (rows,
    columns) in float32: the kind that a GPU can also mask in one pass, without ever holding it."""

    weight: torch.Tensor
    norms: torch.Tensor | None = None

    def __call__(self, rows: slice) -> torch.Tensor:
        score = self.weight[rows].float().abs()
        return score if self.norms is None else score.mul_(self.norms)


# Scores are made for so many weights at a time, about 20 bytes of workspace each. On a CPU that is just less than what
# torch shares among its threads: waiting for each other at every small operation took them 10 times as long as the
# work where another program kept a core busy. On a GPU 80 MB: its launches like it large.
CPU_CHUNK, DEVICE_CHUNK = (1 << 15) - 1, 1 << 22
SIGNED_CHUNK = 1 << 18  # weights that get signs at a time, the same everywhere: the signs depend on it


@dataclass(frozen=True)
class Ratio:
    """A share of the weights is pruned, the lowest scores of each group.

    `group` "row": exactly `int(columns * sparsity)` of each output row, ties to the lowest column.
    `group` "matrix": every score up to and with the one at index `int(numel * sparsity)` of the sorted
    matrix, which is the rule of the paper's `prune_magnitude`: one more than the share, and all its ties.
    `chunk` weights are scored at a time, 0: as many as suit the device.
    """

    sparsity: float
    group: str = "row"
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.sparsity * 100:g}%"

    def check_shape(self, name: str, rows: int, columns: int) -> None:
        """Raises PatternError if nothing of a (rows, columns) matrix would be pruned."""
        if int(columns * self.sparsity) == 0:
            raise PatternError(
                f"tensor {name} has {columns} inputs, of which {self} is less than one weight: use a larger sparsity"
            )

    def masks(self, score: Score, rows: int, columns: int, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields (rows, bool mask of what is pruned), a chunk of rows at a time."""
        if self.group == "row":
            for part in row_chunks(rows, columns, chunk):
                yield part, lowest_of_rows(score(part), int(columns * self.sparsity))
        else:
            parts = row_chunks(rows, columns, chunk)
            threshold = kth_smallest(lambda: map(score, parts), int(rows * columns * self.sparsity))
            for part in parts:
                yield part, score(part) <= threshold

    def fused(self, columns: int) -> tuple[int | None, int] | None:
        """How `fused` prunes it: (None, zeros of each row); None where it does not."""
        return (None, int(columns * self.sparsity)) if self.group == "row" else None

    def counts(self, zeros: torch.Tensor) -> torch.Tensor:
        """How many of `zeros` (rows, columns) are true in each row."""
        return zeros.sum(dim=1)

    def least(self, columns: int) -> int:
        """What `counts` are at least."""
        return int(columns * self.sparsity) if self.group == "row" else 0

    def at_least(self, weights: int) -> int:
        """How many zeros a whole matrix has at least."""
        return int(weights * self.sparsity) + 1 if self.group == "matrix" else 0


@dataclass(frozen=True)
class NM:
    """`kept` of each `of` consecutive weights along the inputs are kept; of equal scores the first is pruned.

    `chunk` weights are scored at a time, 0: as many as suit the device.
    """

    kept: int
    of: int
    group: str = "row"
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    def check_shape(self, name: str, rows: int, columns: int) -> None:
        """Raises PatternError if the columns of a (rows, columns) matrix are no multiple of the group."""
        if columns % self.of:
            raise PatternError(
                f"tensor {name} has {columns} inputs, which {self.of} does not divide: "
                f"--pattern {self} cannot hold there, use another pattern or --exclude it"
            )

    def masks(self, score: Score, rows: int, columns: int, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields (rows, bool mask of what is pruned), a chunk of rows at a time."""
        for part in row_chunks(rows, columns, chunk):
            yield part, lowest_of_groups(score(part), self.of, self.of - self.kept)

    def fused(self, columns: int) -> tuple[int | None, int] | None:
        """How `fused` prunes it: (size of a group, zeros in it)."""
        return self.of, self.of - self.kept

    def counts(self, zeros: torch.Tensor) -> torch.Tensor:
        """How many of `zeros` (rows, columns) are true in each group."""
        groups = zeros.reshape(-1, self.of).view(torch.uint8)  # (groups, of)
        counts = groups[:, 0].clone()
        for place in range(1, self.of):  # a sum over so few costs 4 times as much
            counts += groups[:, place]
        return counts

    def least(self, columns: int) -> int:
        """What `counts` are at least."""
        return self.of - self.kept

    def at_least(self, weights: int) -> int:
        """How many zeros a whole matrix has at least."""
        return weights // self.of * (self.of - self.kept)


Pattern = Ratio | NM


def parse(text: str, group: str = "row") -> Pattern:
    """The pattern of "2:4", "4:8" (kept:of), "0.5" or "60%" (sparsity). Raises PatternError."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, of = int(match[1]), int(match[2])
        if not 0 < kept < of:
            raise PatternError(f"pattern {text!r} keeps {kept} of {of}: N:M needs 0 < N < M, as 2:4 or 4:8")
        if group != "row":
            raise PatternError(
                f"pattern {text!r} has groups of its own: --group {group} goes with a sparsity such as 50%"
            )
        return NM(kept, of)
    if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text):
        sparsity = float(match[1]) / (100 if match[2] else 1)
        if 0 < sparsity < 1:
            return Ratio(sparsity, group)
    raise PatternError(f"pattern {text!r} is neither N:M (as 2:4, N kept of M) nor a sparsity (as 0.5 or 50%)")


def prune_lowest(weight: torch.Tensor, score: Score, pattern: Pattern) -> torch.Tensor:
    """Zeros the lowest scores of `weight` (rows, columns) in place, and gives it back.

    Zeros are +0.0 and the kept weights keep their bits: an integer product, not a float one, which
    leaves -0.0. Raises NumberError for a score that is NaN or infinite.
    """
    finite = _in_one_pass(weight, score, pattern)
    if finite is None:
        finite = _in_chunks(weight, score, pattern)
    if not bool(finite):
        raise NumberError("its weights or scores hold NaN or infinity")
    return weight


def _in_one_pass(weight: torch.Tensor, score: Score, pattern: Pattern) -> torch.Tensor | None:
    """Whether all scores are finite (), once `fused` has pruned the weight; None where it cannot."""
    how = pattern.fused(weight.shape[1])
    if how is None or not isinstance(score, Scaled) or not weight.is_cuda or not (kernels := fused_kernels()):
        return None
    if not kernels.agrees(weight, score.norms, *how):
        return None
    of, count = how
    if of is None:
        return kernels.lowest_of_rows_(weight, score.norms, count)  # type: ignore[no-any-return]
    return kernels.lowest_of_groups_(weight, score.norms, of, count)  # type: ignore[no-any-return]


@lru_cache
def fused_kernels() -> Any:
    """The module `fused`, or None where this machine has no Triton."""
    try:
        from lowmem_wanda import fused
    except ImportError:
        return None
    return fused


def _in_chunks(weight: torch.Tensor, score: Score, pattern: Pattern) -> torch.Tensor:
    """Rows in chunks; gives whether all scores are finite ()."""
    rows, columns = weight.shape
    bits = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    chunk = chunk_of(weight, pattern)
    highest = torch.zeros((), device=weight.device)

    def noted(part: slice) -> torch.Tensor:
        scores = score(part)
        torch.maximum(highest, scores.amax(), out=highest)
        return scores

    for part, pruned in pattern.masks(noted, rows, columns, chunk):
        if weight.is_cpu:  # numpy, which has no threads to wait for
            kept = bits[part].numpy()
            np.multiply(kept, np.logical_not(pruned.numpy()), out=kept)
        else:
            bits[part].mul_(pruned.logical_not_())
    return torch.isfinite(highest)  # NaN and infinity are carried on to the maximum


def survey(weight: torch.Tensor, pattern: Pattern) -> tuple[int, bool]:
    """How many of the weights (rows, columns) are zero, and whether they hold the pattern."""
    rows, columns = weight.shape
    zeros = torch.zeros((), dtype=torch.int64, device=weight.device)
    holds = torch.ones((), dtype=torch.bool, device=weight.device)
    for part in row_chunks(rows, columns, chunk_of(weight, pattern)):
        mask = weight[part] == 0
        counts = pattern.counts(mask)
        zeros += counts.sum(dtype=torch.int64)
        holds &= (counts >= pattern.least(weight.shape[1])).all()
    return int(zeros), bool(holds) and int(zeros) >= pattern.at_least(weight.numel())


def sign_zeros(weight: torch.Tensor, seed: int, name: str) -> tuple[int, float]:
    """Puts the smallest normal number of its dtype, with a sign at random, where the weight (rows, columns) is zero;
    in place. Gives how many weights have that size then, and it.

    For codebooks without a zero, which give all zeros one sign. The signs depend on the seed and the name alone.
    """
    tiny, filled = float(torch.finfo(weight.dtype).smallest_normal), 0
    rng = np.random.default_rng([seed % (1 << 32), zlib.crc32(name.encode())])
    for part in row_chunks(len(weight), weight.shape[1], SIGNED_CHUNK):
        rows = weight[part]
        signs = torch.from_numpy(rng.integers(0, 2, tuple(rows.shape), dtype=np.int8)).to(weight.device)
        rows.copy_(torch.where(rows == 0, (signs * 2 - 1).to(weight.dtype) * tiny, rows))
        filled += int((rows.abs() == tiny).sum())
    return filled, tiny


def chunk_of(weight: torch.Tensor, pattern: Pattern) -> int:
    """How many weights are scored at a time."""
    return pattern.chunk or (CPU_CHUNK if weight.is_cpu else DEVICE_CHUNK)


def row_chunks(rows: int, columns: int, chunk: int) -> list[slice]:
    """Slices of whole rows that hold about `chunk` weights each."""
    step = max(1, chunk // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
