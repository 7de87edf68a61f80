"""ALPS: the mask and the weights are found together, by ADMM with a growing penalty (arXiv 2406.07831)."""

import torch

from lowmem_wanda.errors import NumberError
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.masks import lowest_mask
from lowmem_wanda.sparsity.methods.least_squares import CHUNK, fit
from lowmem_wanda.sparsity.methods.method import Notes, costs
from lowmem_wanda.sparsity.patterns import Pattern
from lowmem_wanda.sparsity.selection import row_chunks

DAMPING = 0.01  # of the diagonal, which is scaled to ones
PENALTY = 0.1  # at first
EVERY = 3  # rounds with one penalty
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # where more than a share of the kept weights changed: times so much
MOST, USUAL = 100, 15  # rounds with a penalty each, at most and for estimates (two real models: 7 to 11, noise: 15)
TILE = 256  # rows and columns that are inverted at a time
STABLE = 0.001  # a smaller share of the kept weights changes: the support stays (the paper waits for 0)


@costs(weight_bytes=28, square_bytes=12, products=2.0 * EVERY * USUAL + 60, cubes=4 / 3 * USUAL)
def alps(weight: torch.Tensor, inputs: Gram, pattern: Pattern) -> Notes:
    """Prunes a weight (rows, columns) to the pattern and changes what is kept, in place (algorithm 1 and 2).

    min tr((W - W0) X^T X (W - W0)^T) is split into W, which fits, and D, which holds the pattern; V pulls them
    together with a penalty that grows until the support of D stays, but for a thousandth. Then the kept weights are
    fitted by `fit`. All is done on inputs that are scaled to length 1 each; those that are always zero lose their
    weights. The notes hold the number of `rounds`.
    """
    products, lengths = inputs.made("alps", lambda: _scaled(inputs))
    dense = weight.float() * lengths  # the weights of inputs that are always zero are 0, so they go first
    found, rounds = _split(dense, products, pattern)
    divided = _or_ones(lengths)
    for rows in row_chunks(len(weight), weight.shape[1], CHUNK):
        weight[rows] = fit(found[rows], dense[rows], products).div_(divided)
    return {"rounds": rounds}


def _scaled(inputs: Gram) -> tuple[torch.Tensor, torch.Tensor]:
    """X^T X of inputs of length 1, with damping, float32 (columns, columns), and the lengths (columns,)."""
    lengths = inputs.matrix().diagonal().sqrt()
    divided = _or_ones(lengths)
    products = inputs.matrix() / divided / divided[:, None]
    products.diagonal().add_(DAMPING)
    return products, lengths


def _or_ones(lengths: torch.Tensor) -> torch.Tensor:
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def _split(dense: torch.Tensor, products: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, int]:
    """Weights that hold the pattern, by ADMM, float32 (rows, columns), and the number of rounds that this took."""
    target = dense @ products
    sparse, pull, penalty = dense.clone(), torch.zeros_like(dense), PENALTY
    free, spare = torch.empty_like(dense), torch.empty_like(dense)
    inverse, halfway = torch.empty_like(products), torch.empty_like(products)
    before = torch.zeros_like(dense, dtype=torch.bool)
    rounds = 0
    while rounds < MOST:
        rounds += 1
        _invert(products, penalty, inverse, halfway)
        for _ in range(EVERY):
            torch.mm(torch.sub(target, pull, out=spare).add_(sparse, alpha=penalty), inverse, out=free)
            torch.add(free, pull, alpha=1 / penalty, out=sparse)
            gone = lowest_mask(torch.abs(sparse, out=spare), pattern)
            sparse.masked_fill_(gone, 0)
            pull.add_(free, alpha=penalty).sub_(sparse, alpha=penalty)
        kept = gone.numel() - int(torch.count_nonzero(gone))  # `sum` makes integers of 8 bytes of all
        changed = int(torch.count_nonzero(gone ^ before)) / 2 / max(1, kept)
        if changed < STABLE:
            break
        before = gone
        penalty *= next(growth for share, growth in GROWTH if changed > share)
    return sparse, rounds


def _invert(products: torch.Tensor, penalty: float, inverse: torch.Tensor, halfway: torch.Tensor) -> None:
    """Puts the inverse of X^T X plus a penalty into `inverse`; `halfway` is workspace, all float32 (columns, columns).

    With L its lower Cholesky factor it is L^-T L^-1. `torch.cholesky_inverse` takes two more such matrices on a GPU.
    Raises NumberError where X^T X has no such factor.
    """
    inverse.copy_(products).diagonal().add_(penalty)
    lower = inverse.mT  # in the order that LAPACK works in, so that nothing is copied; the matrix is symmetric
    _, failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32, device=lower.device)))
    if failed:
        raise NumberError("X^T X of its inputs has no Cholesky factorization")
    starts = range(0, len(products), TILE)
    for start in starts:
        rows = slice(start, start + TILE)
        corner = lower[rows, rows]
        corner = torch.linalg.solve_triangular(corner, torch.eye(len(corner), device=corner.device), upper=False)
        halfway[rows, start:].zero_()
        halfway[rows, rows] = corner
        if start:
            torch.mm(corner.neg_(), lower[rows, :start] @ halfway[:start, :start], out=halfway[rows, :start])
    for start in starts:
        rows, stop = slice(start, start + TILE), start + TILE
        torch.mm(halfway[start:, rows].t(), halfway[start:, :stop], out=inverse[rows, :stop])
        inverse[:start, rows] = inverse[rows, :start].t()
