"""ONE block: what its experts put out is measured, the highest scores are kept, and the hidden states move on."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lowmem_wanda.errors import NumberError
from lowmem_wanda.shrinking.choice import Sums
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.shrinking.masks import prune_kept, prune_without_experts
from lowmem_wanda.shrinking.refit import Layer, refit, routes_of
from lowmem_wanda.sparsity.expert_sums import ExpertSums
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.resources import Clock, add_seconds
from lowmem_wanda.streaming.smaller import Smaller
from lowmem_wanda.streaming.walk import MicroBatches, advance
from lowmem_wanda.streaming.watching import outputs_heard
from lowmem_wanda.streaming.workload import Placement


def remove_experts(
    job: ShrinkJob, block: Block, states: MicroBatches, smaller: Smaller | None, moves_on: bool, placement: Placement
) -> dict[str, Any]:
    """Chooses the experts that a block keeps, and prunes what is left where the job does so; gives its record.

    If it `moves_on`, the hidden states are replaced by the output of the whole block, or in the block order by that of
    the block with the kept experts alone, which `smaller` gives.
    """
    clock, record = Clock(block.device), dict[str, Any](index=block.index)
    if block.index not in job.layers and job.pruning is not None:
        return record | prune_without_experts(job.pruning, block, states, placement, moves_on)
    if block.index not in job.layers:
        with clock.part("measure"):
            if moves_on:
                advance(block, states)
        return record | {"parts": clock.seconds()}
    layer = Layer(sum(map(len, states)), states[0].shape[1])

    def forward() -> None:
        with layer.heard(block) if job.refit else nullcontext():
            if smaller is None:
                advance(block, states)
            else:
                for micro_batch in states:
                    block(micro_batch)

    sums = _sums(job, block, clock, forward)
    with clock.part("choose"):
        record |= layer_record(job, block.index, sums)
    if smaller is not None and job.pruning is not None:
        with smaller.block(block, record["kept"]) as small:
            record |= prune_kept(job, job.pruning, block, small, states, record["kept"], moves_on, placement.chunk)
    elif smaller is not None:
        with clock.part("refit" if job.refit else "onward"), smaller.block(block, record["kept"]) as small:
            record |= _fitted(job, block, small, states, layer, record["kept"], moves_on)
    parts = record.get("parts", {})
    add_seconds(parts, clock.seconds())
    return record | {"parts": parts}


def measured_sums(job: ShrinkJob, block: Block, states: MicroBatches) -> tuple[Sums | None, dict[str, float]]:
    """What the experts of a block put out, if it has any, and the seconds; the hidden states move on."""
    clock = Clock(block.device)
    sums = _sums(job, block, clock, lambda: advance(block, states))
    return (sums if block.index in job.layers else None), clock.seconds()


def _sums(job: ShrinkJob, block: Block, clock: Clock, forward: Callable[[], None]) -> dict[str, list[float]]:
    """What the experts of a block put out in a `forward` of all hidden states. Raises NumberError."""
    sums = ExpertSums(job.layout.count, block.device)
    with clock.part("measure"), outputs_heard(block, lambda _, *heard: sums.add(*heard)):
        forward()
    block.groups.finish()
    try:
        return sums.record()
    except NumberError as error:
        raise NumberError(f"block {block.index}: {error}") from None


def _fitted(
    job: ShrinkJob, block: Block, small: Block, states: MicroBatches, layer: Layer, kept: list[int], moves_on: bool
) -> dict[str, Any]:
    """Refits the kept experts where the job does so, and moves the hidden states on if it `moves_on`."""
    routes = routes_of(small, states) if job.refit else {}  # of the hidden states before they move
    if moves_on and job.statistics == "dense":
        advance(block, states)  # before its weights change
    record = dict[str, Any]()
    if job.refit:
        found = refit(small, routes, layer)
        moved = job.moved_in(block.index, kept, found["few_tokens"]) if found["taken"] else []
        record["refit"] = found | {"tensors": moved}
    if moves_on and job.statistics == "block":
        advance(small, states)
    return record


def layer_record(job: ShrinkJob, layer: int, sums: Sums | None) -> dict[str, Any]:
    """What a layer keeps and why, with the scores and sums of all of its experts."""
    choice = job.choose(layer, sums)
    scores = None
    if choice.scores is not None:
        scores = [float(one) if abs(one) < float("inf") else None for one in choice.scores]
    record = {"layer": layer, "kept": list(choice.kept), "by": choice.by, "scores": scores, "sums": sums}
    return {**record, "protected": list(job.protected.get(layer, ()))} if job.protect else record
