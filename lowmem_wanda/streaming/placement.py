"""Where everything lies while blocks are walked, chosen so that it fits: the fastest layout within a budget.

A layout changes time and memory, and no bit of the result, but for one thing: how many sequences are computed at
a time may round otherwise, so a job that is taken up again keeps the number that it began with.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from lowmem_wanda.checkpoint.reader import PIECE
from lowmem_wanda.checkpoint.writer import COPIED_PIECE
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.sparsity.selection import CPU_CHUNK, DEVICE_CHUNK
from lowmem_wanda.streaming.head import budget_of
from lowmem_wanda.streaming.model import Work
from lowmem_wanda.streaming.resources import anonymous, free_memory
from lowmem_wanda.streaming.tensors import DTYPES

CPU_TOKENS, DEVICE_TOKENS = 256, 2048  # of a micro-batch: beyond these the products hardly gain
LATE, LATE_CUDA = 12 << 20, 128 << 20  # what torch and transformers take on the host with their first products
SLACK = 64 << 20  # of a GPU, for the workspace of its products and what its allocator rounds up
SCORED = 64  # bytes of what is known of a scored token: its softmax, its target, its divergence
SPARE, SPARE_HELD = 0.95, 0.8  # of what is free may be planned with, and of what is left then may be waited with
MAPPED = (32 << 20, 1 << 20)  # for `map_blocks_from`: the faster, the smaller


@dataclass(frozen=True)
class Layout:
    """`states`: hidden states on the "device", the "host" (beside a GPU, page-locked) or in a "file"; `slots` block
    buffers on the host and `arriving` on the GPU; `batch` sequences at a time, of which `held` batches may wait
    in the sequential order; `chunk` weights scored at a time; tensors of `mapped` bytes give back their pages."""

    states: str
    slots: int
    arriving: int
    batch: int
    held: int
    chunk: int
    mapped: int

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


def choose(work: Work, batch: int | None = None) -> tuple[Layout, Need]:
    """The layout that costs the least time of those that --max-ram and --max-vram hold, and what it needs.

    `batch`: that of the job that is taken up again. Raises BudgetError, saying what would fit.
    """
    vram = free_memory(work.device)  # also: what CUDA takes on the host, it has taken now
    base = anonymous()
    ram = min(work.limits.max_ram or sys.maxsize, base + int(free_memory(torch.device("cpu")) * SPARE))
    vram = min(work.limits.max_vram or sys.maxsize, int(vram * SPARE))
    sizes, tried, fitting = Sizes(work, base), [], []
    for cost, layout in layouts(work, batch or work.batch):
        need = sizes.need(layout)
        tried.append((need, layout))
        if need.host <= ram and need.device <= vram:
            layout = _hold(work, layout, sizes, ram - need.host if work.device.type == "cpu" else vram - need.device)
            fitting.append((cost + 80 * (1 - _share_held(work, layout)), len(tried), layout))
    if not fitting:
        raise _too_small(work, tried, ram, vram)
    layout = min(fitting)[2]
    return layout, sizes.need(layout)


def layouts(work: Work, batch: int | None) -> Iterator[tuple[int, Layout]]:
    """All that could be done, each with what it costs in time beside the fastest, roughly and in percent."""
    on_host, limits = work.device.type == "cpu", work.limits
    tokens = CPU_TOKENS if on_host else DEVICE_TOKENS
    sequences, length = work.shape if work.shape[0] else (1, tokens)
    most = min(batch or max(1, tokens // length), sequences)
    batches = [most] if batch else [most >> halved for halved in range(most.bit_length())]
    full = CPU_CHUNK if on_host else DEVICE_CHUNK
    places = ("device", "file") if on_host else ("device", "host", "file")
    options: Iterator[tuple[tuple[int, Any], ...]] = product(
        enumerate((limits.states,) if limits.states else places if work.shape[0] else ("device",)),
        enumerate((limits.slots,) if limits.slots else (3, 2, 1)),
        enumerate((1,) if on_host else (2, 1)),
        enumerate(batches),
        enumerate((full, full // 4, full // 16)),
        # held micro-batches are freed in another order than they were made, and leave holes everywhere
        enumerate(MAPPED if on_host and not work.waits else MAPPED[1:]),
    )
    steps = (40, 12, 30, 6, 1, 8)
    for option in options:
        where, slots, arriving, size, chunk, mapped = (value for _, value in option)
        if arriving <= slots:
            cost = sum(step * number for step, (number, _) in zip(steps, option, strict=True))
            yield cost, Layout(where, slots, arriving, size, 0, chunk, mapped)


class Sizes:
    """Bytes of what a task holds at one time or another, beside the `base` bytes that this process holds already."""

    def __init__(self, work: Work, base: int) -> None:
        self.work, self.base, self.on_host = work, base, work.device.type == "cpu"
        tensors, hollow, size = work.checkpoint.tensors, work.hollow, work.dtype.itemsize
        blocks = [work.block_tensors(index) for index in range(work.depth)]
        linears = [tensors[name] for index in range(len(blocks)) for name in hollow.linears(index).values()]
        self.casts = sum(map(cast_bytes, (work, *work.beside)))
        widest = max(max(tensor.shape) for tensor in linears)
        self.columns = max(hollow.matrix_shape(tensor)[1] for tensor in linears)
        outside = [tensors[name] for name in set(hollow.outside().values())]
        self.piece = min(PIECE, max(tensor.nbytes for tensor in tensors.values()))
        self.embedding = max((tensor.numel * size for tensor in outside), default=0) + 3 * self.piece
        self.sequences, self.length = work.shape
        self.state = self.length * hollow.width * size  # of one sequence
        judging = work.streams * work.judges  # models whose heads are applied
        self.heads = judging * budget_of(work.block_bytes)
        self.scored = judging * self.sequences * self.length * SCORED
        self.inner = self.length * widest * size
        self.attention = hollow.attention_heads * self.length**2 * (size + 8)

    def activations(self, layout: Layout) -> int:
        """Of a micro-batch within a block: about three of the widest and four of the hidden width; or attention's
        scores, where they are held; and the holes between such."""
        within = layout.batch * (max(3 * self.inner, self.attention) + 4 * self.state)
        return within + within * 2 // 5 * (self.on_host and layout.batch * self.inner < layout.mapped)

    def waiting(self, layout: Layout) -> int:
        """Of a micro-batch that waits: at the last linear its input, its layer's and the residual; at attention's
        output the projections; and where states lie elsewhere, the copy of them that it works on."""
        moved = self.state * (layout.states != "device" and not self.on_host)
        return layout.batch * (max(self.inner + 2 * self.state, 5 * self.state) + moved)

    def need(self, layout: Layout) -> Need:
        """What a layout needs at its worst moment."""
        states, blocks = self.work.streams * self.sequences * self.state, layout.slots * self.work.block_bytes
        working = self._working(layout, blocks if self.on_host else layout.arriving * self.work.block_bytes)
        working += states if layout.states == "device" or (self.on_host and layout.states == "host") else 0
        disk = states if layout.states == "file" else 0
        rest = 2 * min(COPIED_PIECE, self.piece)  # of the shard outside the blocks, which is written meanwhile
        if self.on_host:
            return Need(self.base + LATE + rest + working, 0, disk)
        held = blocks + (states if layout.states == "host" else 0)
        return Need(self.base + LATE_CUDA + rest + max(held, 3 * self.piece), working + SLACK, disk)

    def _working(self, layout: Layout, blocks: int) -> int:
        """Where it is computed: blocks and what one of them takes, or before that the embeddings."""
        scores = 20 * max(layout.chunk, self.columns) if self.work.scores else 0
        if not self.sequences:
            return blocks + scores
        moved = layout.batch * self.state if layout.states != "device" and not self.on_host else 0
        computing = max(self.activations(layout) + moved, scores) + layout.held * self.waiting(layout)
        return max(blocks + self.casts + computing, self.embedding, self.heads) + self.scored


def cast_bytes(work: Work) -> int:
    """What a decoder holds of a block in the computing dtype: one linear's weight, and all that is no linear."""
    size, tensors = work.dtype.itemsize, work.checkpoint.tensors
    blocks = [work.block_tensors(index) for index in range(work.depth)]
    names = {name for index in range(work.depth) for name in work.hollow.linears(index).values()}
    casts = [tensors[name].numel * size for name in names if DTYPES[tensors[name].dtype] != work.dtype]
    small = [[t for t in block if DTYPES[t.dtype] != work.dtype and t.name not in names] for block in blocks]
    return max(casts, default=0) + max(sum(t.numel * size for t in block) for block in small)


def _hold(work: Work, layout: Layout, sizes: Sizes, free: int) -> Layout:
    """The layout with as many waiting micro-batches as the free memory holds."""
    if not work.waits:
        return layout
    parts = -(-sizes.sequences // layout.batch)
    fitting = int(free * SPARE_HELD) // max(1, sizes.waiting(layout))
    return replace(layout, held=min(parts, fitting if work.limits.held is None else work.limits.held))


def _share_held(work: Work, layout: Layout) -> float:
    """Of the micro-batches that would have to be replayed else; 1 where none would."""
    if not work.waits:
        return 1.0
    return min(1.0, layout.held * layout.batch / work.shape[0])


def _too_small(work: Work, tried: list[tuple[Need, Layout]], ram: int, vram: int) -> BudgetError:
    """Names the layout that misses its budgets by the least, and what it would take."""
    need, layout = min(tried, key=lambda pair: max(pair[0].host - ram, 0) + max(pair[0].device - vram, 0))
    flag, least, given, limit = ("--max-ram", need.host, ram, work.limits.max_ram)
    if need.host <= ram:
        flag, least, given, limit = ("--max-vram", need.device, vram, work.limits.max_vram)
    asked = limit is not None and limit <= given
    move = f"give {flag} {-(-least // 10**6)}MB" if asked else "end other programs"
    shorter = ", or fewer or shorter sequences (--sequences, --length)" if work.shape[0] else ""
    return BudgetError(
        f"{flag}: {given / 1e6:.0f} MB {'cannot be kept' if asked else 'is all that is free'}, {least / 1e6:.0f} MB "
        f"would fit with {layout}: {move}{shorter}"
    )
