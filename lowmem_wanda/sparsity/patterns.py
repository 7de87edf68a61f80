"""Sparsity patterns, which turn scores (rows, columns) into the mask of the weights to prune.

"2:4" follows NVIDIA's convention: of each 4 consecutive weights along the input dimension 2 are *kept*. The paper's
code (arXiv 2306.11695, `prune_n:prune_m`) counts the zeros instead; for 1:4 the two differ.
"""

import re
from dataclasses import dataclass

from lowmem_wanda.errors import PatternError
from lowmem_wanda.sparsity import GROUPS

COMPARED = {  # what is compared for a share, in words; users choose among GROUPS, and some methods have their own
    "row": "row", "matrix": "matrix", "columns": "128 columns of the matrix",
    "variant": "row, up to a share of its sum",
}  # fmt: skip
NEAR = 0.01  # of a share, within which the paper's variant holds it
LONGEST = 40  # characters of a pattern that is read


@dataclass(frozen=True)
class Group:
    """Consecutive weights of a row that are compared with each other: `size` of them, of which `zeros` are pruned."""

    size: int
    zeros: int


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights is pruned: the lowest scores of each row, or of the whole matrix.

    With `group` "row" exactly `int(columns * sparsity)` weights of each output row are pruned; of equal scores, the one
    in the lowest column is pruned first. With `group` "matrix" all scores are pruned up to and including the one at
    index `int(numel * sparsity)` of the sorted matrix. This is the rule of the paper's `prune_magnitude`: it prunes one
    weight more than the share, and all its ties. With `group` "columns" it is done so for each 128 columns of all rows,
    which is the rule of SparseGPT; with "variant" rows differ, and the share is held within 0.01.
    """

    sparsity: float
    group: str = "row"

    def __str__(self) -> str:
        return f"{self.sparsity * 100:g}%"

    @property
    def compared_per(self) -> str:
        """The set of weights whose scores are compared with each other, in words."""
        return COMPARED[self.group]

    def require_shape(self, name: str, rows: int, columns: int) -> None:
        """Raises PatternError if no weight of a (rows, columns) matrix would be pruned."""
        if int(columns * self.sparsity) == 0:
            raise PatternError(
                f"tensor {name} has {columns} inputs, of which {self} is less than one weight: use a larger sparsity"
            )

    def groups(self, columns: int) -> Group | None:
        """The groups that are compared within a row of `columns` weights; None if the whole matrix is compared."""
        return Group(columns, int(columns * self.sparsity)) if self.group == "row" else None

    def zeros_in_all(self, weights: int) -> int:
        """The least number of zeros in a matrix of `weights` weights; 0 if each row is counted on its own."""
        if self.group == "variant":
            return int(weights * (self.sparsity - NEAR))
        return 0 if self.group == "row" else int(weights * self.sparsity) + 1


@dataclass(frozen=True)
class NM:
    """Of each `of` consecutive weights along the inputs, `kept` are kept. Of equal scores the first is pruned."""

    kept: int
    of: int
    group: str = "row"

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def compared_per(self) -> str:
        """The set of weights whose scores are compared with each other, in words."""
        return f"group of {self.of}"

    def require_shape(self, name: str, rows: int, columns: int) -> None:
        """Raises PatternError if the columns of a (rows, columns) matrix are not a multiple of the group."""
        if columns % self.of:
            raise PatternError(
                f"tensor {name} has {columns} inputs, which {self.of} does not divide: "
                f"--pattern {self} cannot hold there, use another pattern or --exclude it"
            )

    def groups(self, columns: int) -> Group:
        """The groups that are compared within a row of `columns` weights."""
        return Group(self.of, self.of - self.kept)

    def zeros_in_all(self, weights: int) -> int:
        """The least number of zeros in a matrix of `weights` weights."""
        return weights // self.of * (self.of - self.kept)


Pattern = Unstructured | NM


def parse(text: str, group: str = "row") -> Pattern:
    """The pattern that a text such as "2:4" (kept:of), "0.5" or "60%" (sparsity) means. Raises PatternError."""
    if len(text) > LONGEST:
        raise PatternError(f"pattern {text[:LONGEST]!r}... has {len(text)} characters: give one such as 2:4 or 50%")
    if match := re.fullmatch(r"([0-9]+):([0-9]+)", text):
        kept, of = int(match[1]), int(match[2])
        if not 0 < kept < of:
            raise PatternError(f"pattern {text!r} keeps {kept} of {of}: N:M needs 0 < N < M, as 2:4 or 4:8")
        if group != "row":
            raise PatternError(
                f"pattern {text!r} has groups of its own: --group {group} goes with a sparsity such as 50%"
            )
        return NM(kept, of)
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(%?)", text):
        sparsity = float(match[1]) / (100 if match[2] else 1)
        if 0 < sparsity < 1:
            if group not in GROUPS:
                raise PatternError(f"--group {group}: give one of {', '.join(GROUPS)}")
            return Unstructured(sparsity, group)
    raise PatternError(f"pattern {text!r} is neither N:M (as 2:4, N kept of M) nor a sparsity (as 0.5 or 50%)")
