"""What a pruning will hold, compute and write, predicted before a weight is read."""

from dataclasses import dataclass

from lowmem_wanda.checkpoint import PIECE
from lowmem_wanda.memory import anonymous
from lowmem_wanda.patterns import CPU_CHUNK, DEVICE_CHUNK
from lowmem_wanda.task import Task
from lowmem_wanda.tensors import DTYPES


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


def predict(task: Task) -> Plan:
    """The plan of a task. Peaks are estimates: this process as it is, plus what the walk holds at its worst moment."""
    tensors = task.checkpoint.tensors
    blocks = [sum(tensor.nbytes for tensor in task.block_tensors(index)) for index in range(len(task.selected))]
    prunable = sum(tensors[name].numel for names in task.selected for name in names.values())
    sequences, length = task.calibration.tokens.shape if task.calibration else (0, 0)
    walk = _walk_bytes(task, max(blocks), sequences, length)
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
        flops=_flops(task, sequences, length),
        host_peak=anonymous() + (walk if computed_on_host else transit),
        device_peak=0 if computed_on_host else walk,
        disk=sum(tensor.nbytes for tensor in tensors.values())
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
    activations = task.batch * length * (3 * widest + 4 * width) * size
    scores = 20 * max(CPU_CHUNK if task.device.type == "cpu" else DEVICE_CHUNK, widest)
    outside = [tensors[name] for name in set(task.hollow.outside().values())]
    embeddings = max(
        (tensor.numel * size + tensor.nbytes * (DTYPES[tensor.dtype] != task.dtype) for tensor in outside), default=0
    )
    if task.calibration is None:
        return max(block + scores, PIECE)
    return hidden + max(block + cast + max(activations, scores), embeddings, PIECE)


def _cast_bytes(task: Task, index: int) -> int:
    return sum(
        tensor.numel * task.dtype.itemsize for tensor in task.block_tensors(index) if DTYPES[tensor.dtype] != task.dtype
    )


def _flops(task: Task, sequences: int, length: int) -> int:
    """Linears and attention's two products, of the measuring pass (without the last linear) and the next one."""
    total = 0
    for index in range(len(task.selected)):
        sizes = [task.checkpoint.tensors[name].numel for name in task.hollow.linears(index).values()]
        attention = 4 * sequences * length * length * task.hollow.width
        total += (2 * sum(sizes) - sizes[-1]) * 2 * sequences * length + 2 * attention
    return total
