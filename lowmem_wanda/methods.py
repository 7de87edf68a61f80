"""Pruning methods: (weight, inputs, pattern) -> weight.

`weight` is (outputs, inputs) in its stored dtype and is pruned in place; `inputs` is the method's
statistic of what the linear was fed. To add a method: one function, one line in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowmem_wanda.patterns import Pattern, Scaled, prune_lowest
from lowmem_wanda.stats import SquaredNorm


def wanda(weight: torch.Tensor, inputs: SquaredNorm, pattern: Pattern) -> torch.Tensor:
    """Weights without the lowest |W_ij| * ||X_j||_2, in float32 (arXiv 2306.11695, eq. 1)."""
    return prune_lowest(weight, Scaled(weight, inputs.norms()), pattern)


def magnitude(weight: torch.Tensor, inputs: None, pattern: Pattern) -> torch.Tensor:
    """Weights without the lowest |W_ij|; no inputs are needed."""
    return prune_lowest(weight, Scaled(weight), pattern)


@dataclass(frozen=True)
class Method:
    """A method's function, the statistic it needs (None: no calibration), and the group it compares in."""

    prune: Callable[..., torch.Tensor]
    statistic: type[SquaredNorm] | None
    group: str


METHODS = {
    "wanda": Method(wanda, SquaredNorm, "row"),
    "magnitude": Method(magnitude, None, "matrix"),
}
