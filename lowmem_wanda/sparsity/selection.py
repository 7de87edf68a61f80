"""Scores, and which of them are the lowest: of rows, of groups, of all; exact counts, ties to the lowest column."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

Score = Callable[[slice], torch.Tensor]  # some rows of a matrix -> their scores, float32 (rows, columns), at least 0

# Scores are made for so many weights at a time. On a CPU that is just less than what torch shares among its threads:
# waiting for each other at every small operation took them 10 times as long as the work where another program kept a
# core busy. On a GPU it is 80 MB, because few large launches are faster than many small ones.
CPU_CHUNK, DEVICE_CHUNK = (1 << 15) - 1, 1 << 22
SCORE_BYTES = 20  # of workspace for each weight that is scored at a time


@dataclass(frozen=True)
class Scaled:
    """The scores |weight| * norms of a weight (rows, columns), float32, made for some rows at a time.

    `norms` are float32 (columns,); without them the scores are |weight|. A GPU masks this kind of score in one pass.
    """

    weight: torch.Tensor
    norms: torch.Tensor | None = None

    def __call__(self, rows: slice) -> torch.Tensor:
        score = self.weight[rows].float().abs()
        return score if self.norms is None else score.mul_(self.norms)


def lowest_of_rows(score: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of exactly the `count` lowest of each row of (rows, columns), ties to the lowest column."""
    if score.is_cpu:
        return torch.from_numpy(_lowest_of_host_rows(score.numpy(), count))
    kth = (
        score.kthvalue(count, dim=1, keepdim=True).values
        if score.is_cuda
        else score.sort(dim=1).values[:, count - 1 : count]
    )
    lowest = score <= kth
    tied = (lowest.sum(dim=1) > count).nonzero().squeeze(1)
    if len(tied):
        below, equal = score[tied] < kth[tied], score[tied] == kth[tied]
        free = count - below.sum(dim=1, keepdim=True)
        lowest[tied] = below | (equal & (equal.cumsum(dim=1) <= free))
    return lowest


def _lowest_of_host_rows(score: np.ndarray, count: int) -> np.ndarray:
    """The mask of (rows, columns) by a partition, not a sort: 3.6-8 ns per weight against 84-106 (one thread, AVX2)."""
    kth = np.partition(score, count - 1, axis=1)[:, count - 1 : count]
    lowest: np.ndarray = score <= kth
    for row in np.flatnonzero(np.count_nonzero(lowest, axis=1) > count):
        tied = np.flatnonzero(score[row] == kth[row])
        lowest[row, tied[count - np.count_nonzero(score[row] < kth[row]) :]] = False
    return lowest


def lowest_of_groups(score: torch.Tensor, of: int, count: int) -> torch.Tensor:
    """Mask of the `count` lowest of each `of` consecutive columns, ties to the lowest column.

    A weight's rank is the number of its group that go before it. Pairs grow with the square of the group.
    """
    if of > 16:
        return lowest_of_rows(score.reshape(-1, of), count).reshape(score.shape)
    if score.is_cpu:
        return torch.from_numpy(_lowest_of_host_groups(score.numpy().reshape(-1, of), count)).reshape(score.shape)
    groups = score.reshape(-1, of)
    ranks = [torch.zeros(len(groups), dtype=torch.int8, device=score.device) for _ in range(of)]
    for later in range(1, of):
        for earlier in range(later):
            first = groups[:, earlier] <= groups[:, later]
            ranks[later] += first
            ranks[earlier] += first.logical_not_()
    return torch.stack([rank < count for rank in ranks], dim=1).reshape(score.shape)


def _lowest_of_host_groups(groups: np.ndarray, count: int) -> np.ndarray:
    """The mask of (groups, of) by ranks, each place's scores one after the other in memory.

    1.1 ns per weight for 2:4, one thread, AVX-512; the same operations on strided places 8, a top-k 15-19.
    """
    of = groups.shape[1]
    places = np.ascontiguousarray(groups.T)  # (of, groups)
    ranks = np.empty(places.shape, np.int8)
    ranks[:] = np.arange(of)[::-1, None]  # as if all that come later went before
    goes_first = np.empty(places.shape, np.bool_)
    for apart in range(1, of):
        earlier, later = slice(None, -apart), slice(apart, None)
        first = np.less_equal(places[earlier], places[later], out=goes_first[earlier]).view(np.int8)
        ranks[later] += first
        ranks[earlier] -= first
    lowest = np.less(ranks, count, out=goes_first)
    mask = np.empty(groups.shape, np.bool_)
    for place in range(of):
        mask[:, place] = lowest[place]
    return mask


def kth_smallest(chunks: Callable[[], Iterator[torch.Tensor]], k: int) -> torch.Tensor:
    """The value at index k of all non-negative float32 of the chunks, sorted, without holding them.

    A radix select in three readings: the bits of non-negative floats, read as integers, sort as the floats do.
    """
    prefix = 0
    for shift, width in ((20, 11), (9, 11), (0, 9)):
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for chunk in chunks():
            bits = chunk.abs().view(torch.int32).reshape(-1)  # abs: -0.0 counts as 0.0
            digits = (bits[(bits >> (shift + width)) == prefix] >> shift) & ((1 << width) - 1)
            counts += torch.bincount(digits, minlength=1 << width).cpu()
        below = counts.cumsum(0)
        digit = int((below <= k).sum())
        k -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << width) | digit
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32)


def suitable_chunk(weight: torch.Tensor) -> int:
    """The number of weights that are scored at a time on the weight's device."""
    return CPU_CHUNK if weight.is_cpu else DEVICE_CHUNK


def row_chunks(rows: int, columns: int, chunk: int) -> list[slice]:
    """Slices of whole rows that hold about `chunk` weights each."""
    step = max(1, chunk // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
