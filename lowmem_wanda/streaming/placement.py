"""Where everything lies while blocks are walked: the fastest placement within a budget.

A placement changes time and memory, but not a bit of the result, with one exception: rounding may depend on the number
of sequences that are computed at a time, so a resumed job keeps the number that it began with.
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
from lowmem_wanda.streaming.head import head_bytes
from lowmem_wanda.streaming.model import cast_bytes
from lowmem_wanda.streaming.resources import SMALL, anonymous, free_memory
from lowmem_wanda.streaming.workload import Need, Placement, Workload

LEAST_TRAINED = 4  # micro-batches at least where a block is trained on them, one of which is held out
BACKWARD = 3  # times the activations of a forward, which the way back needs
CPU_TOKENS, DEVICE_TOKENS = 512, 2048  # of a micro-batch; more make the products hardly faster
ROUTING = 12  # bytes of a token for each expert: its logit, its score, and what chooses, float32
# Bytes that torch and transformers take on the host for their first products. CUDA took 652 MB (torch 2.11, H100).
LATE, LATE_CUDA = 36 << 20, 640 << 20
SLACK = 128 << 20  # bytes of a GPU, for the workspace of its products (H100: 104 MB) and its allocator's rounding up
# Plan with at most 95 % of free memory. Of what a placement leaves, at most 80 % (GPU: 50 %) may hold waiting
# micro-batches: they are freed in another order than they were made, which leaves holes. With 80 % of 24 GB, a 70B
# block left holes of 3.8 GB on a GPU and ran out of memory.
SPARE, SPARE_HELD, SPARE_HELD_DEVICE = 0.95, 0.8, 0.5
MAPPED = (32 << 20, SMALL)  # bytes, for `limited`: the first is faster, the second takes less memory


@dataclass(frozen=True)
class Choice:
    """Values of one option, the fastest first. Each further one takes about `slower` percent more time.

    The percents are rough and only their order counts: `benchmarks/overlap.py` has slots, `benchmarks/LOG.md` the size
    of micro-batches, chunks and mapped allocations.
    """

    values: tuple[Any, ...]
    slower: int

    def priced(self) -> Iterator[tuple[Any, int]]:
        """Yields each value with the percent of time that it costs beside the fastest."""
        yield from ((value, place * self.slower) for place, value in enumerate(self.values))


def choose(work: Workload, batch: int | None = None, trained_apart: bool | None = None) -> tuple[Placement, Need]:
    """The fastest placement that keeps --max-ram and --max-vram, and what it needs.

    `batch` is the number of sequences at a time that a resumed job began with, and `trained_apart` how it trains; None
    for a new job. Raises BudgetError where no placement keeps them; the message says what would fit.
    """
    budget = work.model.budget
    # the GPU comes first: it starts CUDA, which takes memory on the host
    vram = free_memory(work.model.device) if budget.free_vram is None else budget.free_vram
    base = anonymous()
    free = base + free_memory(torch.device("cpu")) if budget.free_ram is None else budget.free_ram
    ram = min(sys.maxsize if budget.max_ram is None else budget.max_ram, min(free, base + int((free - base) * SPARE)))
    vram = min(sys.maxsize if budget.max_vram is None else budget.max_vram, int(vram * SPARE))
    sizes, tried, fitting = Sizes(work, base), [], []
    for cost, placement in placements(work, batch or work.model.batch, trained_apart):
        need = sizes.need(placement)
        tried.append((need, placement))
        if need.host <= ram and need.device <= vram:
            placement = _hold(work, placement, sizes, ram - need.host if work.on_host else vram - need.device)
            fitting.append((cost + 80 * (1 - _share_held(work, placement)), len(tried), placement))
    if not fitting:
        raise _too_small(work, tried, ram, vram)
    placement = min(fitting)[2]
    return placement, sizes.need(placement)


def placements(work: Workload, batch: int | None, trained_apart: bool | None = None) -> Iterator[tuple[int, Placement]]:
    """Yields all possible placements, each with the percent of time that it costs beside the fastest."""
    budget, on_host = work.model.budget, work.on_host
    tokens = CPU_TOKENS if on_host else DEVICE_TOKENS
    sequences, length = (work.sequences, work.length) if work.sequences else (1, tokens)
    most = min(batch or max(1, tokens // length), sequences)
    if work.training and not batch:
        most = min(most, max(1, sequences // LEAST_TRAINED))
    batches = (most,) if batch else tuple(most >> halved for halved in range(most.bit_length()))
    places = ("device", "file") if on_host else ("device", "host", "file")
    chunks = (work.chunk, work.chunk // 4, work.chunk // 16) if work.chunk else (0,)
    # held micro-batches are freed in another order than they were made, and workspaces have many sizes: holes
    mapped = MAPPED if on_host and not (work.replays or work.waits_at_experts or work.workspace) else MAPPED[1:]
    parts = (False, True) if 0 < work.training_apart < work.training else (False,)
    limits = (0, *work.model.group_limits()) if not (work.training or work.whole_blocks) else (0,)
    apart = (False, True) if 0 < work.statistics_apart < work.statistics else (False,)
    options = (
        Choice((budget.states,) if budget.states else places if work.sequences else ("device",), slower=40),
        Choice((budget.slots,) if budget.slots else (3, 2, 1), slower=12),
        Choice((1,) if on_host else (2, 1), slower=30),
        Choice(batches, slower=6),
        Choice(chunks, slower=1),
        Choice(mapped, slower=8),
        Choice((True,) if work.one_by_one else apart, slower=50),
        Choice(parts if trained_apart is None else (trained_apart,), slower=70),
        Choice(limits, slower=25),
        Choice((False,) if on_host else (False, True), slower=150),
    )
    for option in product(*(choice.priced() for choice in options)):
        (where, slots, arriving, size, chunk, mapped_from, *rest), costs = zip(*option, strict=True)
        # where micro-batches wait for groups of experts, no memory of theirs may leave holes
        part, parked = rest[-2:]
        for_groups = (slots > 1 and mapped_from == SMALL) if on_host else arriving > 1
        if arriving <= slots and (not part or for_groups) and (not parked or (part and where != "device")):
            yield sum(costs), Placement(where, slots, arriving, size, 0, chunk, mapped_from, *rest)


class Sizes:
    """The bytes that a workload takes at one time or another, beside the `base` bytes that this process holds."""

    def __init__(self, work: Workload, base: int) -> None:
        self.work, self.base = work, base
        tensors, skeleton, size = work.model.checkpoint.tensors, work.model.skeleton, work.model.dtype.itemsize
        matrices = skeleton.all_matrices
        widest = max(max(matrix.shape) for matrix in matrices)
        outside = [tensors[name] for name in {name for view in skeleton.outside().values() for name in view.tensors}]
        with_heads = len(work.models) * work.needs_logits  # models whose heads are applied
        self.casts = sum(map(cast_bytes, work.models))
        self.columns = max(matrix.shape[1] for matrix in matrices)
        self.piece = min(PIECE, max(tensor.nbytes for tensor in tensors.values()))
        self.embedding = max((tensor.numel * size for tensor in outside), default=0) + 3 * self.piece
        self.state = work.length * skeleton.width * size  # of one sequence
        self.heads = with_heads * head_bytes(max(model.block_bytes for model in work.models))
        self.kept = with_heads * work.sequences * work.length * work.token_bytes
        self.inner = work.length * widest * size
        experts = max((matrix.expert for matrix in matrices if matrix.expert is not None), default=-1) + 1
        self.routing = work.length * max(ROUTING * experts, skeleton.width * size // 8)
        self.attention = skeleton.attention_heads * work.length**2 * (size + 8)

    def activations(self, placement: Placement) -> int:
        """The bytes that a micro-batch takes within a block, and the holes that they leave.

        They are four hidden states and about three of the widest inputs, or attention's scores where those are more.
        """
        within = placement.batch * (max(3 * self.inner, self.attention) + 4 * self.state)
        return within + within * 2 // 5 * (self.work.on_host and placement.batch * self.inner < placement.mapped)

    def waiting(self, placement: Placement) -> int:
        """The bytes that a waiting micro-batch holds.

        At the last matrix they are the inputs of the matrix, those of its layer, and the residual; at attention's last
        matrix they are the projections.
        """
        return placement.batch * (max(self.inner + 2 * self.state, 5 * self.state) + self._moved(placement))

    def at_experts(self, placement: Placement) -> int:
        """The bytes that all micro-batches hold while they wait at experts, if they do.

        Each holds its residual, what enters the experts, their sum so far, and what its router made. What is parked is
        the residual's alone on the device.
        """
        if not (placement.part or self.work.waits_at_experts):
            return 0
        held = self.state if placement.parked else 3 * self.state + self._moved(placement)
        return self._waiting_there(placement) * (held + self.routing)

    def parked(self, placement: Placement) -> int:
        """The bytes of what is parked on the host: what enters the experts, and their sum so far."""
        return self._waiting_there(placement) * 2 * self.state * placement.parked

    def _waiting_there(self, placement: Placement) -> int:
        """The number of sequences that wait at experts, twice those that wait as the dense and the pruned block."""
        return self.work.sequences * (1 + (self.work.waits_twice and bool(placement.part)))

    def _moved(self, placement: Placement) -> int:
        """The bytes of a sequence's hidden states on the device, where they lie elsewhere."""
        return self.state * (placement.states != "device" and not self.work.on_host)

    def need(self, placement: Placement) -> Need:
        """What a placement needs at its worst moment."""
        work = self.work
        states = (len(work.models) + work.targets) * work.sequences * self.state
        slot = max(model.part_bytes(placement.part) for model in work.models)
        blocks = placement.slots * slot
        working = self._working(placement, blocks if work.on_host else placement.arriving * slot)
        working += states if placement.states == "device" or (work.on_host and placement.states == "host") else 0
        disk = states if placement.states == "file" else 0
        rest = 2 * min(COPIED_PIECE, self.piece)  # for the shard outside the blocks, which is written meanwhile
        if work.on_host:
            return Need(self.base + LATE + rest + working, 0, disk)
        held = blocks + (states if placement.states == "host" else 0) + self.parked(placement)
        return Need(self.base + LATE_CUDA + rest + max(held, 3 * self.piece), working + SLACK, disk)

    def _working(self, placement: Placement, blocks: int) -> int:
        """The bytes where it is computed: blocks and the work on one, or the embeddings before, or the heads after."""
        work = self.work
        scores = work.workspace + work.score_bytes * max(placement.chunk, self.columns)
        if not work.sequences:
            return blocks + scores
        moved = placement.batch * self._moved(placement)
        computing = max(self.activations(placement) + moved, scores)
        computing += max(placement.held * self.waiting(placement), self.at_experts(placement))
        computing += work.statistics_apart if placement.apart else work.statistics
        if work.training:
            trained = work.training_apart if placement.trained_apart else work.training
            computing = max(computing, trained + BACKWARD * self.activations(placement) + moved)
        return max(blocks + self.casts + computing, self.embedding, self.heads) + self.kept


def _hold(work: Workload, placement: Placement, sizes: Sizes, free: int) -> Placement:
    """The placement with as many waiting micro-batches as fit in `free` bytes."""
    if not work.replays:
        return placement
    free += sizes.at_experts(placement)  # which is free again before and behind them
    micro_batches = -(-work.sequences // placement.batch)
    spare = SPARE_HELD if work.on_host else SPARE_HELD_DEVICE
    fitting = int(free * spare) // max(1, sizes.waiting(placement))
    limit = work.model.budget.held
    return replace(placement, held=min(micro_batches, fitting if limit is None else limit))


def _share_held(work: Workload, placement: Placement) -> float:
    """The share of the micro-batches that do not have to be replayed."""
    if not work.replays:
        return 1.0
    return min(1.0, placement.held * placement.batch / work.sequences)


def _too_small(work: Workload, tried: list[tuple[Need, Placement]], ram: int, vram: int) -> BudgetError:
    """The error that names the placement which misses the budgets by the least, and what that would take."""
    need, placement = min(tried, key=lambda pair: max(pair[0].host - ram, 0) + max(pair[0].device - vram, 0))
    budget = work.model.budget
    flag, least, free, limit = ("--max-ram", need.host, ram, budget.max_ram)
    if need.host <= ram:
        flag, least, free, limit = ("--max-vram", need.device, vram, budget.max_vram)
    limited = limit is not None and limit <= free
    if budget.free_ram is not None and not limited:
        flag, least, limited = flag.replace("max-", ""), int(least / SPARE), True
    move = f"give {flag} {-(-least // 10**6)}MB" if limited else "end other programs"
    shorter = ", or fewer or shorter sequences (--sequences, --length)" if work.sequences else ""
    if work.waits_twice and placement.part:
        shorter += ", or --statistics sequential, with which half as many tokens wait at experts"
    return BudgetError(
        f"{flag}: {free / 1e6:.0f} MB {'cannot be kept' if limited else 'is all that is free'}, {least / 1e6:.0f} MB "
        f"would fit with {placement}: {move}{shorter}"
    )
