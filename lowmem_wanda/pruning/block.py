"""How the scores of a weight are spread, and how much of them is pruned, from some of its rows."""

from typing import Any

import torch

from lowmem_wanda.sparsity.selection import Score

SAMPLE = 1 << 16  # weights that are looked at
PERCENT = (1, 10, 50, 90, 99)


class Sample:
    """Scores of evenly spaced rows of a (rows, columns) weight, kept while it is pruned."""

    def __init__(self, score: Score, rows: int, columns: int) -> None:
        step = -(-rows // max(1, SAMPLE // columns))
        self.rows = slice(0, rows, step)
        self.scores = score(self.rows)

    def spread(self, pruned: torch.Tensor) -> dict[str, Any]:
        """`quantiles` of the scores by percent, and the share of their squares that the pruned weight (rows, columns)
        has `lost`: for wanda's score what the output loses of its squares where inputs are uncorrelated."""
        squares = self.scores.double() if self.scores.is_cpu else self.scores
        squares = squares.square()
        lost = squares[pruned[self.rows] == 0].sum() / squares.sum().clamp_min(torch.finfo(torch.float32).tiny)
        ordered = self.scores.flatten().sort().values
        places = torch.tensor([percent * (len(ordered) - 1) // 100 for percent in PERCENT], device=ordered.device)
        quantiles = dict(zip(map(str, PERCENT), ordered[places].tolist(), strict=True))
        return {"quantiles": quantiles, "lost": float(lost)}
