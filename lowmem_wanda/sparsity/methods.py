"""Pruning methods: how weights are scored, which statistic of the inputs that needs, and how kept weights are updated.

A weight is (outputs, inputs) in its stored dtype. To add a method, write its score, add a `Method` to METHODS here, and
add its name to METHODS in `sparsity/__init__.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from lowmem_wanda.errors import NumberError, PatternError
from lowmem_wanda.sparsity import GROUPS
from lowmem_wanda.sparsity import METHODS as NAMES
from lowmem_wanda.sparsity.identity import identity
from lowmem_wanda.sparsity.selection import Scaled, Score
from lowmem_wanda.sparsity.statistics import SquaredNorm


class Statistic(Protocol):
    """A summary of a matrix's inputs, to which the inputs of all calibration sequences are added."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: torch.Tensor) -> None:
        """Adds inputs (..., columns) of any float dtype."""

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """The bytes that the statistic of `columns` input channels takes."""


@dataclass(frozen=True)
class Method:
    """A way of pruning one matrix.

    Args:
        score: f(weight, inputs) -> scores. `weight` is (rows, columns) in its stored dtype, `inputs` is the `statistic`
            of the matrix's inputs. The scores are float32 (rows, columns), finite and at least 0; the lowest are
            pruned. The score must not change the weight. A score that is made for some rows at a time (`by_rows`)
            returns a `Scaled` instead.
        statistic: the class that sums up the inputs, such as `SquaredNorm` (see `Statistic`). With None nothing is
            measured, and `inputs` is None.
        update: f(weight, dense, inputs), which is called after the mask is applied. It changes the kept weights of
            `weight` in place; `dense` is a copy of the weight before the mask. With None (default) kept weights keep
            their bits.
        group: the weights that a sparsity compares unless the user says otherwise: those of a "row" (default) or of the
            whole "matrix".
        name: the name of the method in reports and job.json (default: the name of the score function).
        by_rows: whether the score is made for some rows at a time, so that it needs no memory of the matrix's size
            (default: False).

    A job is resumed with the same code, defaults, outside values and statistic only. A method that takes something from
    outside that cannot be identified, such as an open file, is not resumed at all.

    Raises:
        PatternError: a group or a function is not one.

    Example:
        >>> from lowmem_wanda import Method, SquaredNorm
        >>> def by_root(weight, inputs):
        ...     return weight.float().abs() * inputs.norms().sqrt()
        >>> str(Method(score=by_root, statistic=SquaredNorm))
        'by_root'
    """

    score: Callable[[torch.Tensor, Any], Score | torch.Tensor]
    statistic: type[Statistic] | None
    update: Callable[[torch.Tensor, torch.Tensor, Any], None] | None = None
    group: str = "row"
    name: str = ""
    by_rows: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise PatternError(f"method {self}: group {self.group!r} is not known; give one of {', '.join(GROUPS)}")
        needs = () if self.statistic is None else ("add", "nbytes")
        if missing := [name for name in needs if not hasattr(self.statistic, name)]:
            raise PatternError(f"method {self}: its statistic has no {missing[0]}(); see lowmem_wanda.Statistic")
        if not callable(self.score) or not (self.update is None or callable(self.update)):
            raise PatternError(f"method {self}: score and update are functions")

    def __str__(self) -> str:
        return self.name or str(getattr(self.score, "__qualname__", type(self.score).__name__))

    @property
    def keeps_bits(self) -> bool:
        """Whether the weights that are not pruned keep their bits."""
        return self.update is None

    @cached_property
    def code(self) -> str | None:
        """The checksum of score, update and statistic (see `identity`); None for a method of this package.

        A job is not resumed with others. What cannot be identified is never resumed, except by the very same method.
        """
        if any(self is known for known in METHODS.values()):
            return None
        return identity(self.score, self.update, self.statistic)

    def scores(self, weight: torch.Tensor, inputs: Any) -> Score:
        """A function that gives the scores of some rows. Raises NumberError for scores that cannot be compared."""
        before = None if weight.is_inference() else weight._version
        made = self.score(weight, inputs)
        if before is not None and weight._version != before:
            raise NumberError(f"method {self}: its score changes the weight in place; let it compute on a copy")
        if isinstance(made, Scaled):
            return made
        if not isinstance(made, torch.Tensor) or made.is_complex():
            raise NumberError(f"method {self}: its score gives {type(made).__name__}; give a tensor of real numbers")
        if made.shape != weight.shape:
            shapes = f"{list(made.shape)} for a weight of {list(weight.shape)}"
            raise NumberError(f"method {self}: its scores are {shapes}; give one score for each weight")
        scores = made.detach().float().to(weight.device)
        if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
            raise NumberError(f"method {self}: its scores are not all finite and at least 0; the lowest are pruned")
        return lambda rows: scores[rows]

    def workspace(self, rows: int, columns: int, itemsize: int) -> int:
        """The bytes that pruning a (rows, columns) matrix takes in addition to what is made for some rows at a time.

        A score of the whole matrix counts as three float32 tensors of its size: |weight|, a product and a mask. An
        update adds a copy of the weight, whose items have `itemsize` bytes.
        """
        return rows * columns * (12 * (not self.by_rows) + itemsize * (not self.keeps_bits))


def wanda(weight: torch.Tensor, inputs: SquaredNorm) -> Scaled:
    """The scores |W_ij| * ||X_j||_2 in float32 (arXiv 2306.11695, eq. 1)."""
    return Scaled(weight, inputs.norms())


def magnitude(weight: torch.Tensor, inputs: None) -> Scaled:
    """The scores |W_ij| in float32. No inputs are needed."""
    return Scaled(weight)


METHODS = {
    "wanda": Method(wanda, SquaredNorm, group="row", name="wanda", by_rows=True),
    "magnitude": Method(magnitude, None, group="matrix", name="magnitude", by_rows=True),
}


def find_method(method: str | Method) -> Method:
    """The method with a name, or the method itself. Raises PatternError for a name that no method has."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise PatternError(f"--method {method}: there is no such method; give one of {', '.join(NAMES)}")
    return METHODS[method]
