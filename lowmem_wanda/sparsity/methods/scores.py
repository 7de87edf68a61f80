"""Scores: how much a weight counts. The lowest are pruned, and kept weights keep their bits."""

import torch

from lowmem_wanda.sparsity.selection import Scaled, Score, row_chunks
from lowmem_wanda.sparsity.statistics import SquaredNorm

ROWS = 256  # that sums are made of at a time


def wanda(weight: torch.Tensor, inputs: SquaredNorm) -> Scaled:
    """The scores |W_ij| * ||X_j||_2 in float32 (arXiv 2306.11695, eq. 1)."""
    return Scaled(weight, inputs.norms())


def magnitude(weight: torch.Tensor, inputs: None) -> Scaled:
    """The scores |W_ij| in float32. No inputs are needed."""
    return Scaled(weight)


def ria(weight: torch.Tensor, inputs: SquaredNorm) -> Score:
    """The scores (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^0.5 in float32 (RIA).

    Relative importance and activations, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models" (ICLR 2024), eq. 2 and 4, with the exponent 0.5 of its table. A weight counts by its share of all that its
    input channel, and all that its output channel, weighs.
    """
    roots = inputs.norms().sqrt()
    of_input = torch.zeros(weight.shape[1], device=weight.device)
    of_output = torch.empty(weight.shape[0], 1, device=weight.device)
    for rows in row_chunks(len(weight), weight.shape[1], ROWS * weight.shape[1]):
        part = weight[rows].float().abs()
        of_input += part.sum(dim=0)
        of_output[rows] = part.sum(dim=1, keepdim=True)
    by_input, by_output = (1 / total.clamp_min(torch.finfo(torch.float32).tiny) for total in (of_input, of_output))

    def score(rows: slice) -> torch.Tensor:
        part = weight[rows].float().abs()
        return part.mul_(by_input + by_output[rows]).mul_(roots)

    return score
