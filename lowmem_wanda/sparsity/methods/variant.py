"""The variant of Wanda in the paper's code (arXiv 2306.11695, `use_variant`): rows lose equal shares of scores."""

import torch

from lowmem_wanda.errors import PatternError
from lowmem_wanda.sparsity.methods.method import Notes, costs
from lowmem_wanda.sparsity.methods.scores import wanda
from lowmem_wanda.sparsity.patterns import Pattern, Unstructured
from lowmem_wanda.sparsity.selection import row_chunks
from lowmem_wanda.sparsity.statistics import SquaredNorm

FIRST, MOST = 0.4, 0.8  # shares of a row's scores, where the search begins and ends
NEAR = 0.001  # of the sparsity that was asked for; also the width of the interval at which the search ends
CHUNK = 1 << 22  # weights that are sorted at a time


@costs(weight_bytes=16, keeps_bits=True)
def variant(weight: torch.Tensor, inputs: SquaredNorm, pattern: Pattern) -> Notes:
    """Prunes of each row the lowest scores whose sum is at most a share of the row's sum, in place.

    The share is the same for all rows of a matrix. It is found by bisection between 0 and 0.8, so that the matrix's
    sparsity is within 0.001 of the pattern's; rows differ. N:M has groups of its own and is not given to this. The
    notes hold the share, `alpha`.
    """
    if not isinstance(pattern, Unstructured):
        raise PatternError(f"method wanda-variant: is of a share such as 50%, and {pattern} has groups of its own")
    score = wanda(weight, inputs)
    parts = row_chunks(len(weight), weight.shape[1], CHUNK)
    ordered = torch.cat([score(part).sort(dim=1).values for part in parts])
    sums = ordered.cumsum(dim=1)
    totals = torch.cat([score(part).sum(dim=1, keepdim=True) for part in parts])

    def limits(alpha: float) -> torch.Tensor:
        """The highest score that is pruned of each row, (rows, 1)."""
        counts = (sums <= totals * alpha).sum(dim=1, keepdim=True)
        return ordered.gather(1, counts.clamp_min(1) - 1)

    alpha, low, high = FIRST, 0.0, MOST
    while abs((found := float((ordered <= limits(alpha)).float().mean())) - pattern.sparsity) > NEAR:
        if high - low < NEAR:
            break
        if found > pattern.sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
    most = limits(alpha)
    for part in parts:
        weight[part] = torch.where(score(part) <= most[part], torch.zeros_like(weight[part]), weight[part])
    return {"alpha": alpha}
