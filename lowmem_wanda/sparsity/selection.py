"""Selects the lowest scores of rows, of groups or of a whole matrix.

Counts within rows and groups are exact: of equal scores, the one in the lowest column is selected first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Score = Callable[[slice], torch.Tensor]  # some rows of a matrix -> their scores, float32 (rows, columns), at least 0

# The number of weights that are scored at a time. On a CPU they stay in its cache; on a GPU they take 80 MB, because
# few large launches are faster than many small ones.
CPU_CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 22
# What torch scores at a time on a CPU is just too small for torch to share among its threads: when another program kept
# a core busy, they waited for each other at every small operation, 10 times as long as the work took.
UNSHARED = (1 << 15) - 1
SCORE_BYTES = 20  # bytes of workspace for each weight that is scored at a time


@dataclass(frozen=True)
class Scaled:
    """The scores |weight| * norms of a weight (rows, columns) in float32, made for some rows at a time.

    `norms` are float32 (columns,); without them the scores are |weight|. A GPU prunes by scores of this kind in one
    pass.
    """

    weight: torch.Tensor
    norms: torch.Tensor | None = None

    def __call__(self, rows: slice) -> torch.Tensor:
        """The scores of some rows, float32 (rows, columns)."""
        score = self.weight[rows].float().abs()
        return score if self.norms is None else score.mul_(self.norms)


def lowest_of_rows(score: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of exactly the `count` lowest scores of each row, bool (rows, columns)."""
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


def lowest_of_groups(score: torch.Tensor, of: int, count: int) -> torch.Tensor:
    """The mask of exactly the `count` lowest scores of each `of` consecutive columns, bool (rows, columns).

    A weight's rank is the number of weights of its group that come before it. All pairs of a group are compared, and
    their number grows with the square of the group, so groups above 16 are treated as rows.
    """
    if of > 16:
        return lowest_of_rows(score.reshape(-1, of), count).reshape(score.shape)
    groups = score.reshape(-1, of)
    ranks = [torch.zeros(len(groups), dtype=torch.int8, device=score.device) for _ in range(of)]
    for later in range(1, of):
        for earlier in range(later):
            first = groups[:, earlier] <= groups[:, later]
            ranks[later] += first
            ranks[earlier] += first.logical_not_()
    return torch.stack([rank < count for rank in ranks], dim=1).reshape(score.shape)


def kth_smallest(chunks: Callable[[], Iterator[torch.Tensor]], k: int) -> torch.Tensor:
    """The value that is at index k when the values of all chunks are sorted, float32 (); the chunks are not held.

    The values are float32 and at least 0. This is a radix select that reads the chunks three times: read as integers,
    the bits of floats that are not negative sort as the floats do.
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


def suitable_chunk(device: torch.device) -> int:
    """The number of weights to score at a time on a device."""
    return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def row_chunks(rows: int, columns: int, chunk: int) -> list[slice]:
    """Slices of whole rows that hold about `chunk` weights each."""
    step = max(1, chunk // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
