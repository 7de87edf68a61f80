"""What a pruning will hold, compute and write, predicted before a weight is read."""

from dataclasses import dataclass

from lowmem_wanda.pruning.job import Task
from lowmem_wanda.streaming.placement import Layout, choose


@dataclass(frozen=True)
class Plan:
    """Counts, bytes and floating-point operations; `device_peak` is 0 where the host computes."""

    parameters: int
    prunable: int
    blocks: int
    largest_block: int
    tokens: int
    sequences: int
    length: int
    flops: int
    host_peak: int
    device_peak: int
    disk: int
    layout: Layout


def predict(task: Task, batch: int | None = None) -> Plan:
    """The plan of a task, of which `batch` sequences are computed at a time if that is settled already.

    Raises BudgetError where no layout keeps --max-ram and --max-vram.
    """
    tensors = task.checkpoint.tensors
    blocks = [sum(tensor.nbytes for tensor in task.block_tensors(index)) for index in range(task.depth)]
    sequences, length = task.shape
    layout, need = choose(task, batch)
    small = sum((task.checkpoint.path / file).stat().st_size for file in task.files)
    return Plan(
        parameters=sum(tensor.numel for tensor in tensors.values()),
        prunable=sum(tensors[name].numel for names in task.selected for name in names.values()),
        blocks=len(blocks),
        largest_block=max(blocks),
        tokens=sequences * length,
        sequences=sequences,
        length=length,
        flops=_flops(task, sequences, length),
        host_peak=need.host,
        device_peak=need.device,
        disk=task.checkpoint.nbytes + small + need.disk + (1 << 20),
        layout=layout,
    )


def _flops(task: Task, sequences: int, length: int) -> int:
    """Linears and attention's two products: once, or in the block order also up to the last linear."""
    total = 0
    twice = task.statistics == "block" and task.measures
    for index in range(task.depth):
        sizes = [task.checkpoint.tensors[name].numel for name in task.hollow.linears(index).values()]
        attention = 4 * sequences * length * length * task.hollow.width * (1 + twice)
        total += (sum(sizes) + twice * sum(sizes[:-1])) * 2 * sequences * length + attention
    return total
