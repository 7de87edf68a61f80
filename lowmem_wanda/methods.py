"""Pruning methods: (weight, inputs, pattern) -> weight.

`weight` is (outputs, inputs) in its stored dtype and is pruned in place; `inputs` is the method's
statistic of what the linear was fed. To add a method: its function and that of its
score, one line in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowmem_wanda.patterns import Pattern, Scaled, Score, prune_lowest
from lowmem_wanda.stats import SquaredNorm


def wanda(weight: torch.Tensor, inputs: SquaredNorm, pattern: Pattern) -> torch.Tensor:
    """Weights without the lowest |W_ij| * ||X_j||_2, in float32 (arXiv 2306.11695, eq. 1)."""
    return prune_lowest(weight, wanda_score(weight, inputs), pattern)


def wanda_score(weight: torch.Tensor, inputs: SquaredNorm) -> Scaled:
    return Scaled(weight, inputs.norms())


def magnitude(weight: torch.Tensor, inputs: None, pattern: Pattern) -> torch.Tensor:
    """Weights without the lowest |W_ij|; no inputs are needed."""
    return prune_lowest(weight, magnitude_score(weight, inputs), pattern)


def magnitude_score(weight: torch.Tensor, inputs: None) -> Scaled:
    return Scaled(weight)


@dataclass(frozen=True)
class Method:
    """A method's function, its score of a weight given its inputs' statistic, that statistic (None: no calibration),
    and the group it compares in."""

    prune: Callable[..., torch.Tensor]
    score: Callable[..., Score]
    statistic: type[SquaredNorm] | None
    group: str


METHODS = {
    "wanda": Method(wanda, wanda_score, SquaredNorm, "row"),
    "magnitude": Method(magnitude, magnitude_score, None, "matrix"),
}
