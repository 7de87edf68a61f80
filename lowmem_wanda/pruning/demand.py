"""What a job demands of memory: its sequences, statistics, workspace, and what is trained."""

from typing import TYPE_CHECKING, Any

from lowmem_wanda.checkpoint.reader import FLOATS, ITEMSIZE
from lowmem_wanda.pruning.recover import STATE_BYTES
from lowmem_wanda.sparsity.selection import SCORE_BYTES, suitable_chunk
from lowmem_wanda.streaming.workload import Workload

if TYPE_CHECKING:
    from lowmem_wanda.pruning.job import PruneJob


def demand(job: "PruneJob") -> Workload:
    """What goes through the model of a job, and the memory that this takes."""
    sequences, length = job.calibration.tokens.shape if job.calibration else (0, 0)
    matrices = [matrix for block in job.selected for matrix in block]
    tensors = job.model.checkpoint.tensors
    sequential = job.statistics == "sequential" and job.measures
    summed, one = statistic_bytes(job, sequential) if job.measures else (0, 0)
    together, largest = trained_bytes(job) if job.recovers else (0, 0)
    return Workload(
        (job.model,),
        sequences,
        length,
        statistics=one if sequential or job.one_by_one else summed,
        statistics_apart=one if job.statistics == "block" else 0,
        training=together,
        training_apart=largest,
        targets=job.recovers,
        workspace=max(job.method.workspace(*one.shape, ITEMSIZE[tensors[one.tensor].dtype]) for one in matrices),
        chunk=suitable_chunk(job.model.device),
        score_bytes=SCORE_BYTES,
        replays=sequential,
        waits_at_experts=job.has_experts and (sequential or job.one_by_one),
        one_by_one=job.one_by_one,
        waits_twice=job.statistics == "block" and job.measures,
    )


def statistic_bytes(job: "PruneJob", sequential: bool) -> tuple[int, int]:
    """The bytes of the statistics of a block's inputs: of all at once, and of the largest ones that are held together.

    In the sequential order, and in a block without experts, these are those of one input. Else they are those of one
    expert, or of all that is no expert. Those of all tokens that enter a layer of experts are held beside.
    """
    together = largest = 0
    for block in job.traced:
        units: dict[Any, dict[str, int]] = {}
        layers = {}
        for matrix in reversed(block):
            nbytes = job.method.statistic.nbytes(matrix.shape[1]) if job.method.statistic else 0
            alone = sequential or not any(one.layer for one in block)
            unit: Any = matrix.inputs if alone else (matrix.module, matrix.expert) if matrix.layer else ""
            units.setdefault(unit, {})[matrix.inputs] = nbytes
            if matrix.layer:
                layers[matrix.layer] = nbytes
        sums = [sum(unit.values()) for unit in units.values()]
        beside = sum(layers.values())
        together, largest = max(together, sum(sums) + beside), max(largest, max(sums, default=0) + beside)
    return together, largest


def trained_parts(job: "PruneJob", index: int) -> list[list[str]]:
    """The file tensors of a block that are trained: its pruned matrices by the part that they are in, and its vectors.

    With `recover` "norms" these are the vectors alone.
    """
    vectors = [one.name for one in job.model.block_tensors(index) if len(one.shape) == 1 and one.dtype in FLOATS]
    found: dict[str, list[str]] = {}
    for matrix in job.selected[index] if job.recover == "block" else ():
        found.setdefault(matrix.module.partition(".")[0], []).append(matrix.tensor)
    parts = list(found.values()) or [[]]
    parts[-1] += vectors
    return [part for part in parts if part]


def trained_bytes(job: "PruneJob") -> tuple[int, int]:
    """The bytes that training a block takes with copies of its weights: of all parts at once, and of the largest."""
    together = largest = 0
    for index in range(job.model.depth):
        sizes = {one.name: one.numel for one in job.model.block_tensors(index)}
        copies = sum(sizes.values()) * job.model.dtype.itemsize
        parts = [STATE_BYTES * sum(sizes[name] for name in part) for part in trained_parts(job, index)] or [0]
        together, largest = max(together, sum(parts) + copies), max(largest, max(parts) + copies)
    return together, largest
