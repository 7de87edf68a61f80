"""Pruning methods: how weights are scored, which statistic of the inputs that needs, and how kept weights are updated.

A weight is (outputs, inputs) in its stored dtype. To add a method, write its score, add a `Method` to METHODS here, and
add its name to METHODS in `sparsity/__init__.py`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lowmem_wanda.errors import NumberError, PatternError
from lowmem_wanda.sparsity import METHODS as NAMES
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
            pruned. A score that is made for some rows at a time (`by_rows`) returns a `Scaled` instead.
        statistic: the class that sums up the inputs, such as `SquaredNorm`. With None nothing is measured, and `inputs`
            is None.
        update: f(weight, dense, inputs), which is called after the mask is applied. It changes the kept weights of
            `weight` in place; `dense` is a copy of the weight before the mask. With None (default) kept weights keep
            their bits.
        group: the weights that a sparsity compares unless the user says otherwise: those of a "row" (default) or of the
            whole "matrix".
        name: the name of the method in reports and job.json (default: the name of the score function).
        by_rows: whether the score is made for some rows at a time, so that it needs no memory of the matrix's size
            (default: False).

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

    def __str__(self) -> str:
        return self.name or str(getattr(self.score, "__qualname__", type(self.score).__name__))

    @property
    def keeps_bits(self) -> bool:
        """Whether the weights that are not pruned keep their bits."""
        return self.update is None

    @property
    def code(self) -> str | None:
        """The SHA-256 in hex of the compiled score and update; None for a method of this package, which has a version.

        A job is not resumed with other code. Values that a function takes from outside do not change the checksum.
        """
        if str(self) in METHODS and METHODS[str(self)] is self:
            return None
        codes = [getattr(function, "__code__", None) for function in (self.score, self.update)]
        parts = [(code.co_code.hex(), code.co_names, _constants(code)) for code in codes if code]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def scores(self, weight: torch.Tensor, inputs: Any) -> Score:
        """A function that gives the scores of some rows. Raises NumberError for scores that cannot be compared."""
        made = self.score(weight, inputs)
        if not isinstance(made, torch.Tensor):
            return made
        if made.shape != weight.shape:
            shapes = f"{list(made.shape)} for a weight of {list(weight.shape)}"
            raise NumberError(f"method {self}: its scores are {shapes}; give one score for each weight")
        scores = made.detach().float()
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


def _constants(code: Any) -> str:
    """The constants of compiled code and of the functions within it, as text without the addresses of objects."""
    inner = [(one.co_code.hex(), one.co_names, _constants(one)) for one in code.co_consts if hasattr(one, "co_code")]
    return repr(([one for one in code.co_consts if not hasattr(one, "co_code")], inner))
