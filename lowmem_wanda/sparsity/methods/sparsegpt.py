"""SparseGPT: weights are pruned column by column, and those to the right make up for it (arXiv 2301.00774)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from lowmem_wanda.errors import NumberError
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.method import Notes, costs
from lowmem_wanda.sparsity.patterns import NM, Pattern

BLOCK = 128  # columns within which weights are compared, and after which all columns to the right are updated
FEW = 16  # columns within those that are updated one by one, where no group says how many
DAMPING = 0.01  # of the mean of the diagonal
MOST_DAMPING = 1.0


@costs(weight_bytes=12, square_bytes=8, products=1, cubes=5 / 3, launches=7)
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
        with _one_thread(weight.device):
            errors = _prune_columns(turned[start:stop], factor[start:stop, start:stop], pattern)
        turned[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    weight.copy_(turned.t())
    return {} if damping == DAMPING else {"damping": damping}


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Has a CPU compute in one thread: others would only keep their cores busy while columns are updated one by one."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prune_columns(part: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Prunes and updates some columns of all rows, `part` (columns, rows); gives their errors w / U_jj.

    A few columns at a time are updated one by one; those to their right are by one product.
    """
    scale = factor.diagonal().square().reciprocal()[:, None]
    size = pattern.of if isinstance(pattern, NM) else FEW
    share = None if isinstance(pattern, NM) else _lowest(part.square().mul_(scale), pattern)
    errors = torch.empty_like(part)
    for start in range(0, len(part), size):
        stop = min(start + size, len(part))
        few, wrong, corner = part[start:stop], errors[start:stop], factor[start:stop, start:stop]
        if share is not None:
            pruned = share[start:stop]
        else:
            pruned = lowest_places(few.square().mul_(scale[start:stop]), pattern.groups(size).zeros)  # type: ignore[union-attr]
        scaled = pruned / corner.diagonal()[:, None]
        for column in range(stop - start):
            torch.mul(few[column], scaled[column], out=wrong[column])
            if column + 1 < stop - start:
                few[column + 1 :].addr_(corner[column, column + 1 :], wrong[column], alpha=-1)
        few.masked_fill_(pruned, 0)
        part[stop:].addmm_(factor[start:stop, stop:].t(), wrong, alpha=-1)
    return errors


def lowest_places(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of exactly the `count` lowest scores down each column of `scores`, bool in its shape (places, rows).

    Of equal ones the first is selected. All pairs of places are compared at once, and a product counts their results.
    """
    earlier, later, counting, most = _pairs(len(scores), scores.device)
    first = (scores[earlier] <= scores[later]).float()  # (pairs, rows)
    return torch.addmm(most, counting, first) < count


@lru_cache(maxsize=16)
def _pairs(places: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """All pairs of places (earlier, later), and what makes ranks of their comparisons: (places, pairs), (places, 1)."""
    earlier, later = torch.triu_indices(places, places, 1, device=device)
    at = torch.arange(places, device=device)[:, None]
    return earlier, later, (at == later).float() - (at == earlier).float(), (at == earlier).sum(1, keepdim=True).float()


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
        upper = _factor(inputs.matrix(), diagonal + damping * diagonal.mean())
        if upper is not None:
            return upper, damping
        damping *= 10
    raise NumberError("X^T X of its inputs has no Cholesky factorization, even with its diagonal doubled")


def _factor(products: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor | None:
    """The upper Cholesky factor of the inverse of `products` with another diagonal; None where there is none.

    With rows and columns in reverse, H = R R^T for an upper R, so that H^-1 = U^T U for U = R^-1: one factorization and
    one inverse of a triangle, where the usual way takes two factorizations and the inverse between them.
    """
    hessian = products.flip(0, 1)
    hessian.diagonal().copy_(diagonal.flip(0))
    failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(hessian, out=(hessian, failed))
    if failed:
        return None
    hessian = hessian.flip(0, 1)
    _invert_upper_(hessian)
    return hessian if bool(torch.isfinite(hessian.diagonal()).all()) else None


def _invert_upper_(matrix: torch.Tensor) -> None:
    """Inverts an upper triangular matrix in place, mostly by products; below its diagonal it has zeros."""
    size, half = len(matrix), len(matrix) // 2
    if size <= BLOCK:
        matrix.copy_(torch.linalg.solve_triangular(matrix, torch.eye(size, device=matrix.device), upper=True))
        return
    _invert_upper_(matrix[:half, :half])
    _invert_upper_(matrix[half:, half:])
    corner = matrix[:half, half:]
    corner.copy_((matrix[:half, :half] @ corner) @ matrix[half:, half:]).neg_()
