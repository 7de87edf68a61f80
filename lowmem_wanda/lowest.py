"""Which scores are the lowest: of rows, of groups, of all; exact counts, ties to the lowest column."""

from collections.abc import Callable, Iterator

import numpy as np
import torch


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
