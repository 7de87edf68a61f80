"""SparseGPT: weights are pruned column by column, and those to the right make up for it (arXiv 2301.00774)."""

import torch

from lowmem_wanda.errors import NumberError
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.method import Notes, costs
from lowmem_wanda.sparsity.patterns import NM, Pattern
from lowmem_wanda.sparsity.selection import lowest_of_groups

BLOCK = 128  # columns within which weights are compared, and after which all columns to the right are updated
DAMPING = 0.01  # of the mean of the diagonal
MOST_DAMPING = 1.0


@costs(weight_bytes=12, square_bytes=12, products=1, cubes=5 / 3)
def sparsegpt(weight: torch.Tensor, inputs: Gram, pattern: Pattern) -> Notes:
    """Prunes a weight (rows, columns) to the pattern and updates what is kept, in place (algorithm 1).

    With H = X^T X + damping and H^-1 = U^T U, a weight counts w^2 / U_jj^2. A share is compared within 128 columns of
    all rows, N:M within its groups when their column is reached. What pruning a column loses is made up for by the
    columns to its right: W_k -= w_j / U_jj * U_jk. Inputs that are always zero lose their weights.

    The notes hold the `damping` where 1 % of the diagonal's mean was not enough for a Cholesky factorization. Raises
    NumberError where none is.
    """
    factor, damping = inputs.made("sparsegpt", lambda: inverse_factor(inputs))
    turned = weight.float().t().contiguous()  # (columns, rows), so that a column lies together
    turned[inputs.matrix().diagonal() == 0] = 0
    size = pattern.of if isinstance(pattern, NM) else 1
    step = max(1, BLOCK // size) * size
    for start in range(0, len(turned), step):
        stop = min(start + step, len(turned))
        errors = _prune_columns(turned[start:stop], factor[start:stop, start:stop], pattern)
        turned[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    weight.copy_(turned.t())
    return {} if damping == DAMPING else {"damping": damping}


def _prune_columns(part: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Prunes and updates some columns of all rows, `part` (columns, rows); gives their errors w / U_jj."""
    scale = factor.diagonal().square().reciprocal()[:, None]
    size = pattern.of if isinstance(pattern, NM) else 0
    pruned = torch.zeros_like(part, dtype=torch.bool) if size else _lowest(part.square().mul_(scale), pattern)
    errors = torch.zeros_like(part)
    for column in range(len(part)):
        if isinstance(pattern, NM) and column % size == 0:
            scores = part[column : column + size].square().mul_(scale[column : column + size])
            pruned[column : column + size] = lowest_of_groups(scores.t(), size, size - pattern.kept).t()
        torch.mul(part[column], pruned[column], out=errors[column]).div_(factor[column, column])
        part[column].mul_(pruned[column].logical_not())
        part[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors


def _lowest(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask of the share's lowest scores (columns, rows): all up to the one at index int(share * scores)."""
    count = pattern.zeros_in_all(scores.numel())
    return scores <= scores.reshape(-1).kthvalue(min(count, scores.numel())).values


def inverse_factor(inputs: Gram) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor U of H^-1 = U^T U, float32 (columns, columns), and the damping that H needed.

    H is X^T X with ones in place of zeros on its diagonal, and a share of the diagonal's mean added to it: 1 %, or 10
    times as much for as long as H has no Cholesky factorization. Raises NumberError where 100 % is not enough.
    """
    diagonal = inputs.matrix().diagonal()
    diagonal = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal)
    damping = DAMPING
    while damping <= MOST_DAMPING:
        hessian = inputs.matrix().clone()
        hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper.diagonal()).all()):
                return upper, damping
        damping *= 10
    raise NumberError("X^T X of its inputs has no Cholesky factorization, even with its diagonal doubled")
