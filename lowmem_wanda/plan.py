"""What a pruning will hold, compute and write, predicted before a weight is read."""

from dataclasses import dataclass

from lowmem_wanda.checkpoint import PIECE
from lowmem_wanda.memory import anonymous, free_memory
from lowmem_wanda.patterns import CPU_CHUNK, DEVICE_CHUNK
from lowmem_wanda.task import Task
from lowmem_wanda.tensors import DTYPES


@dataclass(frozen=True)
class Plan:
    """Counts, bytes and floating-point operations; `device_peak` is 0 where the host computes.

    `held` is how many micro-batches may wait for a linear in the sequential order.
    """

    parameters: int
    prunable: int
    blocks: int
    largest_block: int
    tokens: int
    sequences: int
    length: int
    held: int
    flops: int
    host_peak: int
    device_peak: int
    disk: int


def predict(task: Task) -> Plan:
    """The plan of a task. Peaks are estimates: this process as it is, plus what the walk holds at its worst moment."""
    tensors = task.checkpoint.tensors
    blocks = [sum(tensor.nbytes for tensor in task.block_tensors(index)) for index in range(len(task.selected))]
    prunable = sum(tensors[name].numel for names in task.selected for name in names.values())
    sequences, length = task.calibration.tokens.shape if task.calibration else (0, 0)
    walk = _walk_bytes(task, max(blocks), sequences, length)
    held = _held(task, walk, sequences)
    walk += held * _activations(task, length)
    computed_on_host = task.device.type == "cpu"
    # beside a device the host holds one tensor on its way in and one on its way out
    transit = 2 * max(tensor.nbytes for tensor in tensors.values())
    return Plan(
        parameters=sum(tensor.numel for tensor in tensors.values()),
        prunable=prunable,
        blocks=len(blocks),
        largest_block=max(blocks),
        tokens=sequences * length,
        sequences=sequences,
        length=length,
        held=held,
        flops=_flops(task, sequences, length),
        host_peak=anonymous() + (walk if computed_on_host else transit),
        device_peak=0 if computed_on_host else walk,
        disk=task.checkpoint.nbytes
        + sum((task.checkpoint.path / file).stat().st_size for file in task.files)
        + (1 << 20),
    )


def _walk_bytes(task: Task, block: int, sequences: int, length: int) -> int:
    """Bytes at the worst moment: hidden states, and a block with what computing it takes, or the embeddings."""
    size = task.dtype.itemsize
    tensors = task.checkpoint.tensors
    linears = [
        task.hollow.matrix_shape(tensors[name])
        for index in range(len(task.selected))
        for name in task.hollow.linears(index).values()
    ]
    widest = max(max(shape) for shape in linears)
    width = task.hollow.width
    hidden = sequences * length * width * size
    cast = max(_cast_bytes(task, index) for index in range(len(task.selected)))
    activations = _activations(task, length)
    scores = 20 * max(CPU_CHUNK if task.device.type == "cpu" else DEVICE_CHUNK, widest)
    outside = [tensors[name] for name in set(task.hollow.outside().values())]
    embeddings = max(
        (tensor.numel * size + tensor.nbytes * (DTYPES[tensor.dtype] != task.dtype) for tensor in outside), default=0
    )
    if task.calibration is None:
        return max(block + scores, PIECE)
    return hidden + max(block + cast + max(activations, scores), embeddings, PIECE)


def _activations(task: Task, length: int) -> int:
    """Bytes that a micro-batch holds within a block: about three of the widest and four of the hidden width."""
    shapes = [task.hollow.matrix_shape(task.checkpoint.tensors[name]) for name in task.hollow.linears(0).values()]
    widest = max(max(shape) for shape in shapes)
    return task.batch * length * (3 * widest + 4 * task.hollow.width) * task.dtype.itemsize


def _held(task: Task, walk: int, sequences: int) -> int:
    """As many micro-batches as four fifths of the free memory hold beside the walk, where the user does not say."""
    if task.statistics != "sequential" or task.calibration is None:
        return 0
    parts = -(-sequences // task.batch)
    if task.held is not None:
        return min(task.held, parts)
    free = free_memory(task.device) * 4 // 5 - walk
    return max(0, min(parts, free // _activations(task, task.calibration.tokens.shape[1])))


def _cast_bytes(task: Task, index: int) -> int:
    return sum(
        tensor.numel * task.dtype.itemsize for tensor in task.block_tensors(index) if DTYPES[tensor.dtype] != task.dtype
    )


def _flops(task: Task, sequences: int, length: int) -> int:
    """Linears and attention's two products: once, or in the block order also up to the last linear."""
    total = 0
    twice = task.statistics == "block"
    for index in range(len(task.selected)):
        sizes = [task.checkpoint.tensors[name].numel for name in task.hollow.linears(index).values()]
        attention = 4 * sequences * length * length * task.hollow.width * (1 + twice)
        total += (sum(sizes) + twice * sum(sizes[:-1])) * 2 * sequences * length + attention
    return total
