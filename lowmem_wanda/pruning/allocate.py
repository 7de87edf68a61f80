"""How a share is divided among blocks: evenly, by their outliers (OWL), or rising from the first to the last (ATP)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_wanda.checkpoint.reader import read_json
from lowmem_wanda.checkpoint.writer import write_json
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.errors import PatternError
from lowmem_wanda.llamacpp.collect import InputSums
from lowmem_wanda.pruning.passes import Passes
from lowmem_wanda.sparsity.patterns import Unstructured
from lowmem_wanda.sparsity.selection import row_chunks, suitable_chunk
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.walk import MicroBatches, streamed
from lowmem_wanda.streaming.workload import Placement

FILE = "allocation.json"
OUTLIER = 5.0  # times the mean score of a block: M of OWL
WIDTH = 0.08  # a block's share is at most so far from the one that was asked for: lambda of OWL
LEAST, MOST = 0.01, 0.99  # of a block's share
Selected = Sequence[Sequence[Matrix]]  # the matrices that are pruned, block by block


def rising(pattern: Unstructured, selected: Selected) -> tuple[float, ...]:
    """Shares that rise by the same amount from block to block (ATP, arXiv 2502.14770), by 0.16 in all."""
    return balanced(np.linspace(-WIDTH, WIDTH, len(selected)), pattern, selected)


def by_outliers(
    ratios: Sequence[float], pattern: Unstructured, selected: Sequence[Sequence[Matrix]]
) -> tuple[float, ...]:
    """Shares that fall from the block with the smallest ratio of outliers to that with the largest, by 0.16 (OWL).

    Outlier weighed layerwise sparsity, arXiv 2310.05175, eq. 3 and 4.
    """
    least, most = min(ratios), max(ratios)
    spread = (np.array(ratios) - least) / ((most - least) or 1.0)
    return balanced(-2 * WIDTH * spread, pattern, selected)


def balanced(moved: np.ndarray, pattern: Unstructured, selected: Selected) -> tuple[float, ...]:
    """The shares of blocks, each `moved` from one level, such that all blocks together have the pattern's share.

    Blocks count by the weights that are pruned in them. Raises PatternError where a share would not be within 1 and
    99 %.
    """
    weights = np.array([sum(matrix.weights for matrix in block) for block in selected], dtype=np.float64)
    shares = pattern.sparsity + moved - float((moved * weights).sum() / weights.sum())
    if shares.min() < LEAST or shares.max() > MOST:
        raise PatternError(
            f"--allocation: gives blocks {shares.min():.1%} to {shares.max():.1%}, which is not within 1% and 99%; use "
            "another share, or --allocation uniform"
        )
    if pattern.group == "row":
        shares = shares + _missing(shares, pattern, selected)
    return tuple(float(share) for share in shares)


def _missing(shares: np.ndarray, pattern: Unstructured, selected: Selected) -> float:
    """What to add to all shares so that rows, whose zeros are whole numbers, have no fewer of them than without shares.

    The most that has not more; what then is missing is less than a weight for each row of a block.
    """
    columns = [np.array([matrix.shape[1] for matrix in block]) for block in selected]
    rows = [np.array([matrix.shape[0] for matrix in block]) for block in selected]

    def zeros(given: Sequence[float]) -> int:
        each = zip(rows, columns, given, strict=True)
        return sum(int((down * (along * share).astype(np.int64)).sum()) for down, along, share in each)

    wanted, least, most = zeros([pattern.sparsity] * len(selected)), 0.0, 1 / min(map(np.min, columns))
    for _ in range(40):
        middle = (least + most) / 2
        least, most = (middle, most) if zeros(shares + middle) <= wanted else (least, middle)
    return least


def outlier_ratio(weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The share of a block's scores |W| * ||X|| that are above 5 times their mean.

    `weights` are (weight (rows, columns), norms (columns,)) of its matrices.
    """
    total, count, above = 0.0, 0, 0

    def scores(weight: torch.Tensor, norms: torch.Tensor) -> Any:
        for rows in row_chunks(len(weight), weight.shape[1], suitable_chunk(weight.device)):
            yield weight[rows].float().abs().mul_(norms)

    for weight, norms in weights:
        total += sum(float(part.sum(dtype=torch.float64)) for part in scores(weight, norms))
        count += weight.numel()
    limit = OUTLIER * total / max(1, count)
    for weight, norms in weights:
        above += sum(int((part > limit).sum()) for part in scores(weight, norms))
    return above / max(1, count)


def owl_shares(job: Any, placement: Placement, folder: Path) -> tuple[float, ...]:
    """The shares of OWL, by one pass of the dense model, or those that an earlier run of the job left in `folder`."""
    if (folder / FILE).exists():
        return tuple(read_json(folder / FILE)["shares"])
    ratios: list[float] = []
    batches = in_batches(job.calibration.tokens, placement.batch)
    with streamed(job.model, batches=batches, placement=placement, folder=folder) as stream:

        def step(block: Block, states: MicroBatches) -> None:
            found: list[tuple[torch.Tensor, torch.Tensor]] = []

            def measured(matrix: Matrix, inputs: SquaredNorm, notes: dict[str, Any]) -> None:
                found.append((block.weight(matrix), inputs.norms()))

            matrices = job.selected_of(block.matrices, block.index)
            Passes(block, states, SquaredNorm, matrices, measured, InputSums(block, on=False)).run("dense", True, 0)
            ratios.append(outlier_ratio(found))

        stream.walk(step)
    shares = by_outliers(ratios, job.pattern, job.selected)
    write_json(folder / FILE, {"outlier_ratios": ratios, "shares": shares})
    return shares
