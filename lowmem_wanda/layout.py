"""Where everything lies while blocks are pruned, chosen so that it fits: the fastest layout within a budget.

A layout changes time and memory, and no bit of the result, but for one thing: how many sequences are computed at
a time may round otherwise, so a job that is taken up again keeps the number that it began with.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from lowmem_wanda.errors import BudgetError
from lowmem_wanda.memory import anonymous, free_memory
from lowmem_wanda.patterns import CPU_CHUNK, DEVICE_CHUNK
from lowmem_wanda.reading import PIECE
from lowmem_wanda.task import Task
from lowmem_wanda.tensors import DTYPES, laid_bytes, wanted

CPU_TOKENS, DEVICE_TOKENS = 256, 2048  # of a micro-batch: beyond these the products hardly gain
LATE = 12 << 20  # what torch and transformers take on the host with their first products
SPARE = 0.95  # of what is free may be planned with, where the user names no limit


@dataclass(frozen=True)
class Layout:
    """`states`: hidden states on the "device", the "host" (beside a GPU, page-locked) or in a "file"; `slots` block
    buffers on the host and `arriving` on the GPU; `batch` sequences at a time, of which `held` batches may wait
    in the sequential order; `chunk` weights scored at a time."""

    states: str
    slots: int
    arriving: int
    batch: int
    held: int
    chunk: int

    def __str__(self) -> str:
        where = {"device": "in memory", "host": "on the host", "file": "in a file"}[self.states]
        buffers = f"{self.slots} block buffer" + "s" * (self.slots > 1)
        return f"hidden states {where}, {buffers}, {self.batch} sequence" + "s" * (self.batch > 1) + " at a time"


@dataclass(frozen=True)
class Need:
    """Bytes at the worst moment: of this process on the host, of tensors on a GPU (0 without one), on the disk."""

    host: int
    device: int
    disk: int


def choose(task: Task, batch: int | None = None) -> tuple[Layout, Need]:
    """The first layout, from the fastest to the smallest, that --max-ram and --max-vram hold, and what it needs.

    `batch`: that of the job that is taken up again. Raises BudgetError, saying what would fit.
    """
    vram = _budget(task.limits.max_vram, task.device)
    base = anonymous() + LATE
    ram = _budget(task.limits.max_ram, torch.device("cpu"))
    sizes = Sizes(task)
    tried: list[tuple[Need, Layout]] = []
    for layout in layouts(task, batch or task.batch):
        need = sizes.need(layout, base)
        if need.host <= ram and need.device <= vram:
            layout = _hold(task, layout, sizes, (ram - need.host) if task.device.type == "cpu" else vram - need.device)
            return layout, sizes.need(layout, base)
        tried.append((need, layout))
    raise _too_small(task, tried, ram, vram)


def layouts(task: Task, batch: int | None) -> Iterator[Layout]:
    """All that could be done, what costs the least time first."""
    on_host = task.device.type == "cpu"
    tokens = CPU_TOKENS if on_host else DEVICE_TOKENS
    sequences, length = task.calibration.tokens.shape if task.calibration else (1, tokens)
    most = min(batch or max(1, tokens // length), sequences)
    batches = [most] if batch else [most >> halved for halved in range(most.bit_length())]
    full = CPU_CHUNK if on_host else DEVICE_CHUNK
    states = ("device", "file") if on_host else ("device", "host", "file")
    options = product(
        enumerate([task.limits.states] if task.limits.states else states if task.calibration else ("device",)),
        enumerate([task.limits.slots] if task.limits.slots else (3, 2, 1)),
        enumerate((1,) if on_host else (2, 1)),
        enumerate(batches),
        enumerate((full, full // 4, full // 16)),
    )
    steps = (40, 12, 30, 6, 1)  # what the next option of each costs in time, roughly

    def cost(option: tuple[tuple[int, Any], ...]) -> int:
        return sum(step * number for step, (number, _) in zip(steps, option, strict=True))

    for option in sorted(options, key=cost):
        (_, where), (_, slots), (_, arriving), (_, size), (_, chunk) = option
        yield Layout(where, slots, arriving, size, 0, chunk)


class Sizes:
    """Bytes of what a task holds at one time or another."""

    def __init__(self, task: Task) -> None:
        self.task = task
        tensors, hollow, size = task.checkpoint.tensors, task.hollow, task.dtype.itemsize
        blocks = [task.block_tensors(index) for index in range(len(task.selected))]
        linears = [tensors[name] for index in range(len(blocks)) for name in hollow.linears(index).values()]
        names = {tensor.name for tensor in linears}
        self.block = max(laid_bytes(wanted(block)) for block in blocks)
        casts = [tensor.numel * size for tensor in linears if DTYPES[tensor.dtype] != task.dtype]
        other = [
            sum(t.numel * size for t in block if DTYPES[t.dtype] != task.dtype and t.name not in names)
            for block in blocks
        ]
        self.casts = max(casts, default=0) + max(other)
        self.widest = max(max(tensor.shape) for tensor in linears)
        self.columns = max(hollow.matrix_shape(tensor)[1] for tensor in linears)
        outside = [tensors[name] for name in set(hollow.outside().values())]
        self.piece = min(PIECE, max(tensor.nbytes for tensor in tensors.values()))
        self.embedding = max((tensor.numel * size for tensor in outside), default=0) + 3 * self.piece
        self.sequences: int
        self.length: int
        self.sequences, self.length = task.calibration.tokens.shape if task.calibration else (0, 0)
        self.state = self.length * hollow.width * size  # of one sequence
        self.inner = self.length * self.widest * size

    def activations(self, batch: int) -> int:
        """Of a micro-batch within a block: about three of the widest and four of the hidden width."""
        return batch * (3 * self.inner + 4 * self.state)

    def waiting(self, batch: int) -> int:
        """Of a micro-batch that waits for a linear: its input, that of its layer, and what the block adds to it."""
        return batch * (self.inner + 2 * self.state)

    def need(self, layout: Layout, base: int) -> Need:
        """What a layout needs beside the `base` bytes that this process holds already."""
        states = self.sequences * self.state
        on_host = self.task.device.type == "cpu"
        blocks = layout.slots * self.block
        working = self._working(layout, blocks if on_host else layout.arriving * self.block)
        working += states if layout.states == "device" else 0
        disk = states if layout.states == "file" else 0
        if on_host:
            return Need(base + max(working, self.piece), 0, disk)
        return Need(base + max(blocks + (states if layout.states == "host" else 0), 3 * self.piece), working, disk)

    def _working(self, layout: Layout, blocks: int) -> int:
        """Where it is computed: blocks and what one of them takes, or before that the embeddings."""
        scores = 20 * max(layout.chunk, self.columns)
        if not self.sequences:
            return blocks + scores
        moved = layout.batch * self.state if layout.states != "device" and self.task.device.type != "cpu" else 0
        computing = max(self.activations(layout.batch) + moved, scores) + layout.held * self.waiting(layout.batch)
        return max(blocks + self.casts + computing, self.embedding)


def _hold(task: Task, layout: Layout, sizes: Sizes, free: int) -> Layout:
    """The layout with as many waiting micro-batches as the free memory holds."""
    if task.statistics != "sequential" or task.calibration is None:
        return layout
    parts = -(-sizes.sequences // layout.batch)
    fitting = max(0, free // max(1, sizes.waiting(layout.batch)))
    return replace(layout, held=min(parts, fitting if task.limits.held is None else task.limits.held))


def _budget(limit: int | None, device: torch.device) -> int:
    """The limit, or nearly all that is free (of the host: and what this process holds already)."""
    if limit is not None:
        return limit
    return int(free_memory(device) * SPARE) + (anonymous() if device.type == "cpu" else 0)


def _too_small(task: Task, tried: list[tuple[Need, Layout]], ram: int, vram: int) -> BudgetError:
    """Names the layout that misses its budgets by the least, and what it would take."""
    need, layout = min(tried, key=lambda pair: max(pair[0].host - ram, 0) + max(pair[0].device - vram, 0))
    flag, least, given = ("--max-ram", need.host, ram) if need.host > ram else ("--max-vram", need.device, vram)
    shorter = ", or fewer or shorter sequences (--sequences, --length)" if task.calibration else ""
    return BudgetError(
        f"{flag}: {given / 1e6:.0f} MB cannot be kept, {least / 1e6:.0f} MB would fit with {layout}: "
        f"give {flag} {-(-least // 10**6)}MB{shorter}"
    )
