"""What a pruning method is: how weights are scored, which statistic of the inputs that needs, what moves afterwards.

A weight is (outputs, inputs) in its stored dtype. To add a method, write its score, add a `Method` to METHODS of
`known`, and add its name to METHODS in `sparsity/__init__.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from lowmem_wanda.errors import NumberError, PatternError
from lowmem_wanda.sparsity import GROUPS
from lowmem_wanda.sparsity.identity import identity
from lowmem_wanda.sparsity.patterns import COMPARED, Pattern
from lowmem_wanda.sparsity.selection import Scaled, Score

Notes = dict[str, Any]  # what a solver has to say of its work, for the record of the matrix
Function = TypeVar("Function", bound=Callable[..., Any])


class Statistic(Protocol):
    """A summary of a matrix's inputs, to which the inputs of all calibration sequences are added."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: torch.Tensor) -> None:
        """Adds inputs (..., columns) of any float dtype."""

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """The bytes that the statistic of `columns` input channels takes."""


@dataclass(frozen=True)
class Cost:
    """What a function takes for a matrix: bytes for each weight, bytes for each pair of inputs, and operations.

    It works on the rows of `at_a_time` weights, one row at least (0: of all). A solver that `keeps_bits` changes no
    weight that it keeps. `products` are the operations for each weight and each input of its row (a product of all rows
    with X^T X has 2), `cubes` those for each input cubed (a Cholesky factorization has 1/3). `launches` are the small
    operations for each input, of which one waits for the other.
    """

    weight_bytes: int = 12
    square_bytes: int = 0
    products: float = 0.0
    cubes: float = 0.0
    launches: int = 0
    at_a_time: int = 0
    keeps_bits: bool = False

    def nbytes(self, rows: int, columns: int) -> int:
        """The bytes of workspace for a matrix."""
        weights = min(rows * columns, max(self.at_a_time, columns) if self.at_a_time else rows * columns)
        return weights * self.weight_bytes + columns * columns * self.square_bytes

    def flops(self, rows: int, columns: int) -> float:
        """The operations for a matrix."""
        return self.products * rows * columns**2 + self.cubes * columns**3


def costs(**values: float) -> Callable[[Function], Function]:
    """Notes the `Cost` of a function that is a part of a method."""

    def noted(function: Function) -> Function:
        function.cost = Cost(**values)  # type: ignore[arg-type, attr-defined]
        return function

    return noted


def cost_of(function: Callable[..., Any] | None) -> Cost:
    """The cost of a part of a method. One that says nothing is taken to hold three float32 tensors of the weight."""
    return Cost(0) if function is None else getattr(function, "cost", Cost())


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
        solve: f(weight, inputs, pattern) -> notes. It prunes `weight` in place to the pattern and changes kept weights,
            in its own way; the score then only describes the matrix. With None (default) the lowest scores are pruned.
        refine: f(weight, dense, inputs, pattern) -> notes, which is called after the mask is applied. It prunes other
            weights of `weight` in place and gives kept ones their bits in `dense`, a copy of the weight before the
            mask (default: None).
        update: f(weight, dense, inputs), which is called last. It changes the kept weights of `weight` in place. With
            None (default) kept weights keep their bits.
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
    solve: Callable[[torch.Tensor, Any, Pattern], Notes] | None = None
    refine: Callable[[torch.Tensor, torch.Tensor, Any, Pattern], Notes] | None = None

    def __post_init__(self) -> None:
        if self.group not in COMPARED:
            raise PatternError(f"method {self}: group {self.group!r} is not known; give one of {', '.join(GROUPS)}")
        needs = () if self.statistic is None else ("add", "nbytes")
        if missing := [name for name in needs if not hasattr(self.statistic, name)]:
            raise PatternError(f"method {self}: its statistic has no {missing[0]}(); see lowmem_wanda.Statistic")
        if not callable(self.score) or not all(part is None or callable(part) for part in self._parts):
            raise PatternError(f"method {self}: score, solve, refine and update are functions")

    def __str__(self) -> str:
        return self.name or str(getattr(self.score, "__qualname__", type(self.score).__name__))

    @property
    def keeps_bits(self) -> bool:
        """Whether the weights that are not pruned keep their bits."""
        return self.update is None and (self.solve is None or cost_of(self.solve).keeps_bits)

    @property
    def compares_dense(self) -> bool:
        """Whether the dense weight is needed once the matrix is pruned."""
        return any(self._parts)

    @property
    def _parts(self) -> tuple[Callable[..., Any] | None, ...]:
        """What changes a weight beside the selection of the lowest scores."""
        return self.solve, self.refine, self.update

    @cached_property
    def code(self) -> str | None:
        """The checksum of the functions and the statistic (see `identity`); None where all are of this package.

        A job is not resumed with others. What cannot be identified is never resumed, except by the very same method.
        """
        parts = [part for part in (self.score, self.update, self.statistic, *self._parts[:2]) if part is not None]
        if all(str(getattr(part, "__module__", "")).startswith("lowmem_wanda.") for part in parts):
            return None
        return identity(self.score, self.update, self.statistic, *filter(None, self._parts[:2]))

    def scores(self, weight: torch.Tensor, inputs: Any) -> Score:
        """A function that gives the scores of some rows. Raises NumberError for scores that cannot be compared."""
        before = None if weight.is_inference() else weight._version
        made = self.score(weight, inputs)
        if before is not None and weight._version != before:
            raise NumberError(f"method {self}: its score changes the weight in place; let it compute on a copy")
        if isinstance(made, Scaled) or (self.by_rows and callable(made)):
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

        A score of the whole matrix counts as three float32 tensors of its size: |weight|, a product and a mask. Where
        something changes the weight after the selection, a copy of it is kept, whose items have `itemsize` bytes.
        """
        most = max(cost_of(part).nbytes(rows, columns) for part in self._parts)
        return max(most, rows * columns * 12 * (not self.by_rows)) + rows * columns * itemsize * self.compares_dense

    def launches(self, columns: int) -> int:
        """The small operations, one after the other, that pruning a matrix of so many inputs takes."""
        return sum(cost_of(part).launches * columns for part in self._parts)

    def flops(self, rows: int, columns: int) -> float:
        """The operations that pruning a (rows, columns) matrix takes in products with X^T X."""
        return sum(cost_of(part).flops(rows, columns) for part in self._parts)
