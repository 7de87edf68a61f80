"""Kept weights are fitted to what the dense weights put out, by conjugate gradients."""

import torch

from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.method import costs
from lowmem_wanda.sparsity.selection import row_chunks

STEPS = 30
ENOUGH = 1e-4  # of the squared gradient at the beginning; then there is little left to gain
CHUNK = 1 << 22  # weights that are fitted at a time; rounding depends on it, so it is the same everywhere


@costs(weight_bytes=32, at_a_time=CHUNK, products=2.0 * STEPS)
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
    kept, fitted, spare = weight != 0, weight.clone(), torch.sub(dense, weight)
    diagonal = products.diagonal()
    scale = torch.where(diagonal > 0, diagonal.reciprocal(), torch.zeros_like(diagonal))
    left = (spare @ products).mul_(kept)  # half the negative gradient
    direction = left * scale
    squares = torch.mul(left, direction, out=spare).sum(dim=1, keepdim=True)
    enough, moved = ENOUGH * squares.sum(), torch.empty_like(left)
    for _ in range(steps):
        if not bool(squares.sum() > enough):
            break
        torch.mm(direction, products, out=moved).mul_(kept)
        length = _ratio(squares, torch.mul(direction, moved, out=spare).sum(dim=1, keepdim=True))
        fitted.addcmul_(direction, length)
        left.addcmul_(moved, length, value=-1)
        scaled = torch.mul(left, scale, out=moved)
        before, squares = squares, torch.mul(left, scaled, out=spare).sum(dim=1, keepdim=True)
        direction.mul_(_ratio(squares, before)).add_(scaled)
    return fitted


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """above / below, or 0 where below is not above 0, as in a row that has arrived."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))
