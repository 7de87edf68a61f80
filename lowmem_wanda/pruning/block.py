"""ONE block: its matrices are measured, scored and masked, and the hidden states move on."""

import time
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import ModelError, NonFiniteError, NumberError
from lowmem_wanda.llamacpp.collect import InputSums
from lowmem_wanda.pruning.demand import trained_parts
from lowmem_wanda.pruning.job import PruneJob
from lowmem_wanda.pruning.passes import Passes
from lowmem_wanda.pruning.recover import recover
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.masks import prune_lowest, sign_zeros, survey
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.sparsity.patterns import Pattern
from lowmem_wanda.sparsity.selection import Score
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.resources import Clock, add_seconds
from lowmem_wanda.streaming.walk import MicroBatches, advance
from lowmem_wanda.streaming.workload import Placement

SAMPLE = 1 << 16  # weights of a matrix whose scores are sampled for the report
PERCENT = (1, 10, 50, 90, 99)
TINY = float(np.finfo(np.float64).tiny)


def prune_block(
    job: PruneJob,
    block: Block,
    states: MicroBatches,
    placement: Placement,
    moves_on: bool,
    sums: InputSums,
    targets: MicroBatches | None = None,
) -> dict[str, Any]:
    """Prunes the job's matrices of a block in place; gives the record of the block.

    If it `moves_on`, the hidden states are replaced by the block's output while `sums` listens. With `targets`, memory
    for what the dense block puts out, the pruned block is trained towards that before.
    """
    clock = Clock(block.device)
    if targets is not None:
        with clock.part("target"):
            for micro_batch, target in zip(states, targets, strict=True):
                target.copy_(block(micro_batch))
    record = _pruned(job, block, states, placement, moves_on and targets is None, sums)
    if targets is not None:
        with clock.part("recover"):
            parts = trained_parts(job, block.index)
            trained = parts if placement.trained_apart else [[name for part in parts for name in part]]
            record["recovered"] = recover(block, states, targets, trained, job.recover_steps)
        _count_again(job, block, record["linears"], placement.chunk)
        moved = move_on(block, states, sums) if moves_on else {}
        add_seconds(record["parts"], clock.seconds() | moved)
        record["passes"] += 1 + moves_on
    return record


def _pruned(
    job: PruneJob, block: Block, states: MicroBatches, placement: Placement, moves_on: bool, sums: InputSums
) -> dict[str, Any]:
    """Measures and prunes the matrices of a block and, if it `moves_on`, moves the hidden states; gives the record."""
    matrices = job.selected_of(block.matrices, block.index)
    linears: dict[str, Any] = {}

    def prune(matrix: Matrix, inputs: Any, notes: dict[str, Any]) -> None:
        linears[matrix.name] = prune_matrix(job, block, matrix, inputs, placement.chunk) | notes

    if job.measures and job.method.statistic is not None:
        statistic, apart = job.method.statistic, placement.apart
        passes = Passes(block, states, statistic, matrices, prune, sums, apart, job.experts)
        passes.run(job.statistics, moves_on, placement.held)
        return {"linears": linears, "passes": passes.count, "parts": passes.clock.seconds()}
    clock = Clock(block.device)

    def prune_loaded() -> None:
        with clock.part("prune"):
            for matrix in (one for one in matrices if block.has(one) and one.name not in linears):
                known = job.norms.inputs(matrix.name, block.device) if job.norms else None
                prune(matrix, known, job.norms.notes(matrix.name) if job.norms else {})

    prune_loaded()
    block.groups.loaded = prune_loaded
    moved = move_on(block, states, sums) if moves_on else {}
    block.groups.finish()
    return {"linears": linears, "passes": float(moves_on), "parts": clock.seconds() | moved}


def _count_again(job: PruneJob, block: Block, linears: dict[str, Any], chunk: int) -> None:
    """Counts the zeros of trained matrices anew in their records."""
    for matrix in job.selected[block.index]:
        weight, linear = block.weight(matrix), linears[matrix.name]
        linear["zeros"], linear["holds"] = survey(weight, job.pattern_in(block.index), chunk)
        linear["sparsity"] = linear["zeros"] / weight.numel()


def move_on(block: Block, states: MicroBatches, sums: InputSums) -> dict[str, float]:
    """Replaces the hidden states by the block's output while `sums` listens; gives the seconds by part."""
    clock = Clock(block.device)
    with clock.part("onward"), sums.listening():
        advance(block, states)
    return clock.seconds()


def prune_matrix(job: PruneJob, block: Block, matrix: Matrix, inputs: Any, chunk: int) -> dict[str, Any]:
    """Prunes a matrix of a block in place; gives the record of the matrix.

    Raises NumberError for scores that are not numbers, ModelError where the pattern does not hold afterwards.
    """
    start, method = time.perf_counter(), job.method
    weight, pattern = block.weight(matrix), job.pattern_in(block.index)
    dense = weight.clone() if method.compares_dense else None
    try:
        scores = method.scores(weight, inputs)
        sample = Sample(scores, *weight.shape)
        if method.solve is None:
            zeros, holds = prune_lowest(weight, scores, pattern, chunk)
        notes = _change(method, weight, dense, inputs, pattern) if dense is not None else {}
        if dense is not None:
            zeros, holds = survey(weight, pattern, chunk)
    except NumberError as error:
        raise type(error)(f"tensor {matrix.name}: {error}") from None
    if not holds:
        move = f"the update of method {method} must leave pruned weights zero"
        move = "report this bug" if method.keeps_bits else move
        found = f"{zeros} zeros of {weight.numel()}"
        raise ModelError(f"tensor {matrix.name}: does not hold {pattern} after pruning ({found}); {move}")
    spread, filled = sample.spread(weight), {}
    if job.zeros == "signed-tiny":
        count, tiny = sign_zeros(weight, job.seed, matrix.name)
        filled = {"filled": count, "tiny": tiny}
    return {
        "shape": list(weight.shape),
        "transposed": matrix.transposed,
        **({"tensor": matrix.tensor, "start": matrix.start} if matrix.name != matrix.tensor else {}),
        "pattern": str(pattern),
        "holds": holds,
        "zeros": 0 if filled else zeros,
        **filled,
        "sparsity": zeros / weight.numel(),
        "score": spread,
        **notes,
        "seconds": time.perf_counter() - start,
    }


def _change(method: Method, weight: torch.Tensor, dense: torch.Tensor, inputs: Any, pattern: Pattern) -> dict[str, Any]:
    """Has the method's parts change a weight (rows, columns) in place; gives their notes for the record.

    Raises NumberError where they leave what is no number.
    """
    if not bool(torch.isfinite(dense).all()):
        raise NonFiniteError("its weights hold NaN or infinity")
    notes = method.solve(weight, inputs, pattern) if method.solve is not None else {}
    if method.refine is not None:
        notes |= method.refine(weight, dense, inputs, pattern)
    if method.update is not None:
        method.update(weight, dense, inputs)
    if not bool(torch.isfinite(weight).all()):
        raise NumberError(f"method {method}: its update leaves NaN or infinity")
    return notes | ({"error": inputs.error(weight, dense)} if isinstance(inputs, Gram) else {})


class Sample:
    """Scores of evenly spaced rows of a weight (rows, columns), kept while it is pruned."""

    def __init__(self, score: Score, rows: int, columns: int) -> None:
        step = -(-rows // max(1, SAMPLE // columns))
        self.rows = slice(0, rows, step)
        self.scores = score(self.rows).cpu().numpy()

    def spread(self, pruned: torch.Tensor) -> dict[str, Any]:
        """The `quantiles` of the scores by percent, and the share of their squares that pruning `lost`.

        `pruned` is the weight (rows, columns) afterwards. For Wanda's score `lost` is the share of its squares that the
        output loses where inputs are uncorrelated.
        """
        squares = np.square(self.scores, dtype=np.float64)
        lost = squares[(pruned[self.rows] == 0).cpu().numpy()].sum() / max(squares.sum(), TINY)
        ordered = np.sort(self.scores, axis=None)
        quantiles = {str(percent): float(ordered[percent * (len(ordered) - 1) // 100]) for percent in PERCENT}
        return {"quantiles": quantiles, "lost": float(lost)}
