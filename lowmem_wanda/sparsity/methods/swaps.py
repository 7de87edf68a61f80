"""A mask is improved by swapping a kept weight of a row for a pruned one (arXiv 2512.10922)."""

import torch

from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.method import Notes, costs
from lowmem_wanda.sparsity.patterns import NM, Pattern
from lowmem_wanda.sparsity.selection import row_chunks

CANDIDATES = 8  # kept and pruned weights of a row that are tried with each other
SHARE = 8  # a row is swapped at most columns / SHARE times
CHUNK = 1 << 22  # weights that are worked on at a time
MOVED = 300  # what it moves in memory takes as long as so many operations for each weight and input (2 cores, AVX-512)


@costs(weight_bytes=56, at_a_time=CHUNK, products=2.0 + MOVED)
def swaps(weight: torch.Tensor, dense: torch.Tensor, inputs: Gram, pattern: Pattern) -> Notes:
    """Swaps kept for pruned weights, in place, wherever that lowers tr((W - W0) X^T X (W - W0)^T).

    `weight` W is pruned and `dense` W0 is not, both (rows, columns). With E = W0 - W and C = E X^T X, pruning a kept
    weight u and keeping a pruned weight p instead changes the error of a row by

        2 w_u C_u + w_u^2 G_uu - 2 w_p C_p + w_p^2 G_pp - 2 w_u w_p G_up.

    The best pair of each row is swapped, and again, until no pair lowers the error: of the 8 kept and the 8 pruned
    weights that are best alone, or with N:M of each group. So the error falls with every swap. Kept weights have their
    bits in `dense`. The notes hold the number of `swaps`.
    """
    size = pattern.of if isinstance(pattern, NM) else 0
    count = 0
    for rows in row_chunks(len(weight), weight.shape[1], CHUNK):
        gone, done = _swapped(dense[rows].float(), weight[rows] == 0, inputs.matrix(), size)
        weight[rows] = torch.where(gone, torch.zeros_like(weight[rows]), dense[rows])
        count += done
    return {"swaps": count}


def _swapped(dense: torch.Tensor, gone: torch.Tensor, products: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    """The mask of the pruned weights after swaps, bool (rows, columns), and how many swaps there were."""
    active = torch.arange(len(dense), device=dense.device)
    square = products.diagonal()
    carried = (dense * gone) @ products  # C
    count = 0
    for _ in range(max(1, dense.shape[1] // SHARE)):
        own, dropped, pull = dense[active], gone[active], carried[active]
        energy = own.square() * square
        to_prune = torch.where(dropped, torch.inf, 2 * own * pull + energy)
        to_keep = torch.where(dropped, energy - 2 * own * pull, torch.inf)
        change, pruned, kept = _best(own, to_prune, to_keep, products, size)
        better = change < -1e-6 * energy.sum(dim=1) / dense.shape[1]
        if not bool(better.any()):
            break
        active, pruned, kept = active[better], pruned[better], kept[better]
        gone[active, pruned], gone[active, kept] = True, False
        carried[active] += dense[active, pruned, None] * products[pruned] - dense[active, kept, None] * products[kept]
        count += len(active)
    return gone, count


def _best(
    weight: torch.Tensor, to_prune: torch.Tensor, to_keep: torch.Tensor, products: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The change of the error by the best swap of each row, and the columns that it prunes and keeps, each (rows,)."""
    rows = len(weight)
    if size:  # the best pair of each group alone, then pairs within the groups that promise most
        shape = (rows, -1, size)
        alone = to_prune.view(shape).amin(dim=2) + to_keep.view(shape).amin(dim=2)
        chosen = alone.topk(min(CANDIDATES, alone.shape[1]), dim=1, largest=False).indices
        columns = chosen[:, :, None] * size + torch.arange(size, device=weight.device)  # (rows, groups, size)
        first = columns[:, :, :, None].expand(-1, -1, size, size).reshape(rows, -1)
        second = columns[:, :, None, :].expand(-1, -1, size, size).reshape(rows, -1)
    else:
        number = min(CANDIDATES, weight.shape[1])
        first = to_prune.topk(number, dim=1, largest=False).indices.repeat_interleave(number, dim=1)
        second = to_keep.topk(number, dim=1, largest=False).indices.repeat(1, number)
    change = to_prune.gather(1, first) + to_keep.gather(1, second)
    change -= 2 * weight.gather(1, first) * weight.gather(1, second) * products[first, second]
    best = change.argmin(dim=1, keepdim=True)
    return (part.gather(1, best).squeeze(1) for part in (change, first, second))  # type: ignore[return-value]
