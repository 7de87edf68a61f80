"""Kept weights are fitted to what the dense weights put out, by conjugate gradients."""

import torch

from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.method import costs
from lowmem_wanda.sparsity.selection import row_chunks

STEPS = 30
ENOUGH = 1e-4  # of the squared gradient at the beginning; then there is little left to gain
CHUNK = 1 << 22  # weights that are fitted at a time; rounding depends on it, so it is the same everywhere


@costs(weight_bytes=0, square_bytes=0, products=2.0 * STEPS)
def least_squares(weight: torch.Tensor, dense: torch.Tensor, inputs: Gram) -> None:
    """Changes the kept weights, in place, towards min tr((W - W0) X^T X (W - W0)^T) with pruned ones held at zero.

    `weight` W and `dense` W0 are (rows, columns). A row is a least-squares problem of its own; all are solved by
    conjugate gradients with the diagonal of X^T X as preconditioner ("Iterative Methods for Sparse Linear Systems",
    2nd ed., algorithm 9.1), where gradients and directions are masked. They stop after 30 steps, or where the squared
    gradients of the rows have fallen to 1e-4 of what they were. Nothing is inverted, so X^T X needs no damping.
    """
    for rows in row_chunks(len(weight), weight.shape[1], CHUNK):
        weight[rows] = fit(weight[rows].float(), dense[rows].float(), inputs.matrix())


def fit(weight: torch.Tensor, dense: torch.Tensor, products: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """`weight` (rows, columns) after at most `steps` steps towards `dense`, in float32; its zeros are held."""
    kept = weight != 0
    diagonal = products.diagonal()
    scale = torch.where(diagonal > 0, diagonal.reciprocal(), torch.zeros_like(diagonal))
    left = ((dense - weight) @ products).mul_(kept)  # half the negative gradient
    direction = left * scale
    squares = (left * direction).sum(dim=1, keepdim=True)
    enough = ENOUGH * squares.sum()
    fitted = weight.clone()
    for _ in range(steps):
        if not bool(squares.sum() > enough):
            break
        moved = (direction @ products).mul_(kept)
        length = _ratio(squares, (direction * moved).sum(dim=1, keepdim=True))
        fitted += length * direction
        left -= length * moved
        scaled = left * scale
        before, squares = squares, (left * scaled).sum(dim=1, keepdim=True)
        direction = scaled + _ratio(squares, before) * direction
    return fitted


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """above / below, or 0 where below is not above 0, as in a row that has arrived."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))
