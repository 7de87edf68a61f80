"""ONE block without some experts is pruned: measured as the smaller block, and masked where its weights lie."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lowmem_wanda.llamacpp.collect import InputSums
from lowmem_wanda.pruning.block import prune_block, prune_matrix
from lowmem_wanda.pruning.job import PruneJob
from lowmem_wanda.pruning.passes import Passes
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.walk import MicroBatches
from lowmem_wanda.streaming.workload import Placement


def prune_without_experts(
    pruning: PruneJob, block: Block, states: MicroBatches, placement: Placement, moves_on: bool
) -> dict[str, Any]:
    """Prunes a block that has no experts to lose; gives its record."""
    return prune_block(pruning, block, states, placement, moves_on, InputSums(block, on=False))


def prune_kept(
    job: ShrinkJob,
    pruning: PruneJob,
    block: Block,
    small: Block,
    states: MicroBatches,
    kept: Sequence[int],
    moves_on: bool,
    chunk: int,
) -> dict[str, Any]:
    """Prunes the matrices of a `block` that are left with the experts that are `kept`, in place; gives the record.

    They are measured on the `small` block, whose weights lie in those of the whole one, and the hidden states are
    replaced by its output if it `moves_on`. Linears are named as in the result.
    """
    whole = {one.name: one for one in pruning.selected_of(block.matrices, block.index)}
    linears: dict[str, Any] = {}

    def prune(matrix: Matrix, inputs: Any, notes: dict[str, Any]) -> None:
        record = prune_matrix(pruning, block, whole[matrix.name], inputs, chunk) | notes
        name, place = _in_result(job, whole[matrix.name], matrix.expert, block.index, kept)
        linears[name] = record | place

    left = list(_left(whole.values(), kept))
    passes = Passes(small, states, SquaredNorm, left, prune, InputSums(small, on=False),
                    experts=pruning.experts)  # fmt: skip
    passes.run("block", moves_on, 0)
    return {"linears": linears, "passes": passes.count, "parts": passes.clock.seconds()}


def _left(matrices: Iterable[Matrix], kept: Sequence[int]) -> Iterator[Matrix]:
    """Yields the matrices that are left, those of experts with their numbers, and inputs, in the smaller block."""
    places = {expert: place for place, expert in enumerate(kept)}
    for matrix in matrices:
        if matrix.expert is None:
            yield matrix
        elif matrix.expert in places:
            place = places[matrix.expert]
            inputs = f"{matrix.inputs.rpartition('[')[0]}[{place}]"
            yield replace(matrix, expert=place, inputs=inputs)


def _in_result(
    job: ShrinkJob, matrix: Matrix, place: int | None, layer: int, kept: Sequence[int]
) -> tuple[str, dict[str, Any]]:
    """The name of a matrix in the result, and the tensor and value there where it begins, if it is a part of one."""
    tensor = job.source.tensors[matrix.tensor]
    name = next(made.name for one, made in job.layout.tensors({layer: kept}) if one.name == tensor.name)
    if matrix.name == matrix.tensor:
        return name, {}
    start, what = matrix.start, matrix.module.rpartition(".")[2] if place is None else str(place)
    if place is not None and (rows := job.layout.rows.get(tensor.name)):
        start -= (kept[place] - place) * rows.each * (tensor.numel // tensor.shape[0])
    return f"{name}[{what}]", {"tensor": name, "start": start}
