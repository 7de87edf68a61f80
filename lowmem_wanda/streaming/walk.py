"""The stream that takes models through their blocks, and the one loop over blocks."""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.buffers import BlockBuffers, Piece, Slot, Write
from lowmem_wanda.streaming.containers import folder_on_disk
from lowmem_wanda.streaming.decoder import Decoder
from lowmem_wanda.streaming.flows import GROUP, Flows
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.numbers import blamed
from lowmem_wanda.streaming.parking import Parking
from lowmem_wanda.streaming.parts import Part
from lowmem_wanda.streaming.resources import Clock, Peak, add_seconds, host_memory, limited, return_freed, timing
from lowmem_wanda.streaming.states import hidden_states
from lowmem_wanda.streaming.tracing import Trace
from lowmem_wanda.streaming.workload import Placement

MicroBatches = list[torch.Tensor]  # hidden states, each (sequences, length, width), as many as are computed at a time
Source = Callable[[int], Mapping[str, Tensor] | None]  # block index -> the file tensors that are read for it, by name
Step = Callable[[Block, MicroBatches], Write | None]
Notify = Callable[[dict[str, Any]], None]  # called with a record of what begins, or of a finished block


def ignore(record: dict[str, Any]) -> None:
    """A Notify that does nothing."""


class Groups:
    """The groups of experts of a block that are still `coming`, one of which is loaded at a time.

    `write` is the function that writes a group when it has been computed; None for one that is not written.
    """

    def __init__(
        self,
        decoder: Decoder,
        parts: Sequence[Part],
        slots: Iterator[Slot],
        buffers: BlockBuffers,
        parking: Parking | None,
    ) -> None:
        self.coming, self.parking = deque(parts), parking if parts else None
        self.write: Callable[[Part], Write] | None = None
        self.loaded: Callable[[], None] = lambda: None  # called when a group is loaded
        self.loads = 0
        self._decoder, self._slots, self._buffers = decoder, slots, buffers
        self._now: tuple[Part, Slot, Block] | None = None
        self.block: Block | None = None

    def load(self) -> Part:
        """Releases the group that is loaded, if one is, and loads the next."""
        self.release()
        part, slot = self.coming.popleft(), next(self._slots)
        self.loads += 1
        assert self.block is not None
        self._decoder.load_group(self.block, part, slot.stored)
        self._now = part, slot, self.block
        self.loaded()
        return part

    def release(self) -> None:
        """Takes the group that is loaded out of the model, and has it written."""
        if self._now is not None:
            part, slot, block = self._now
            self._decoder.release_group(block, part, slot.stored)
            self._buffers.release(slot, self.write(part) if self.write is not None else None)
            self._now = None

    def finish(self) -> None:
        """Releases what is loaded; groups that nobody asked for pass by."""
        while self.coming:
            self.load()
        self.release()


class Stream:
    """Models that go through their blocks side by side, with the buffers and the hidden states that this takes.

    `states` are the hidden states of each model, which a step updates in place; they are empty where no tokens are
    given. `spent` has the seconds by part, `peak` the peaks of memory.
    """

    def __init__(
        self,
        decoders: Sequence[Decoder],
        batches: Sequence[np.ndarray],
        buffers: BlockBuffers,
        peak: Peak,
        allocate: Any,
        limit: int,
        parking: Parking | None = None,
    ) -> None:
        self.decoders, self.batches, self.buffers, self.peak, self.limit = decoders, batches, buffers, peak, limit
        self.parking = parking
        self.states: list[MicroBatches] = []
        self.spent: dict[str, float] = {}
        self._allocate, self._start = allocate, time.perf_counter()

    def walk(self, *steps: Step, indices: Iterable[int] | None = None, source: Source | None = None) -> None:
        """Takes all models through the blocks `indices` (default: all), one block of every model at a time.

        There is a step for each model. It works on a block and the model's hidden states, and gives back the function
        that writes the block, or None. `source` gives the tensors that a block is read from (default, and for None:
        those of the model's checkpoint). While a step works, the next block is read and the one before is written.
        """
        if self.batches and not self.states:
            self._embed()
        models = list(zip(self.decoders, self.states or [[] for _ in self.decoders], steps, strict=True))
        indices = range(self.decoders[0].depth) if indices is None else indices
        visits = [(*model, index) for index in indices for model in models]
        coming: deque[list[Part]] = deque()

        def pieces() -> Iterator[Sequence[Piece]]:
            for decoder, _, _, index in visits:
                coming.append(decoder.model.parts(index, self.limit, source(index) if source else None))
                yield from (part.pieces for part in coming[-1])

        slots = self.buffers.prefetch(pieces())
        for decoder, states, step, index in visits:
            slot = next(slots)
            groups = Groups(decoder, coming.popleft()[1:], slots, self.buffers, self.parking)
            block = decoder.load(index, slot.stored, groups)
            with blamed(decoder.model, index):
                write = step(block, states)
                groups.finish()
            decoder.release(block)
            self.buffers.release(slot, write)
            return_freed()
        self.buffers.drain()
        for decoder in self.decoders:
            decoder.empty()

    def more_states(self) -> MicroBatches:
        """Uninitialised hidden states beside those of the last model, of the same shapes and in the same place."""
        like = self.states[-1]
        tokens = [len(one) * one.shape[1] for one in like]
        memory = self._allocate((sum(tokens), like[0].shape[-1]), like[0].dtype)
        return [part.view(one.shape) for part, one in zip(memory.split(tokens), like, strict=True)]

    def submit(self, action: Callable[[], None]) -> None:
        """Has the writing thread do `action` while blocks are computed."""
        self.buffers.submit(action)

    def timing(self) -> dict[str, Any]:
        """The seconds so far, as `timing` of `resources` gives them, and how shards were read (`reading`).

        Waits for the writing thread.
        """
        self.buffers.drain()
        together = dict(self.spent)
        add_seconds(together, self.buffers.spent)
        reading = " and ".join(sorted(self.buffers.ways))
        return {**timing(time.perf_counter() - self._start, together), "reading": reading}

    def _embed(self) -> None:
        clock = Clock(self.buffers.device)
        with clock.part("embed"):
            self.states += [decoder.embed(self.batches, self._allocate) for decoder in self.decoders]
        add_seconds(self.spent, clock.seconds())


@contextmanager
def streamed(
    *models: StreamedModel, batches: Sequence[np.ndarray] = (), placement: Placement, folder: Path | None = None
) -> Iterator[Stream]:
    """Gives a stream of models of one device and depth, which are walked side by side, and closes it at the end.

    The budget is that of the last model. `batches` are token ids (sequences, length), each computed at once; they are
    embedded when the walk begins. Hidden states in a file lie in `folder` (default: a temporary folder).
    """
    device, budget = models[-1].device, models[-1].budget
    with ExitStack() as stack:

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            place = folder or Path()
            if placement.states == "file" and not folder:
                made = tempfile.TemporaryDirectory(prefix="lowmem-wanda-", dir=folder_on_disk())
                place = Path(stack.enter_context(made))
            states = hidden_states(placement.states, shape, dtype, device, place, peak.count_not_locked)
            return stack.enter_context(states)

        def place(nbytes: int) -> torch.Tensor:
            return stack.enter_context(host_memory(nbytes, device, peak.count_not_locked))

        stack.enter_context(torch.no_grad())
        stack.enter_context(limited(device, budget.max_vram, placement.mapped))
        peak = stack.enter_context(Peak(device))
        decoders = [stack.enter_context(Decoder(model)) for model in models]
        nbytes = max(model.part_bytes(placement.part) for model in models)
        number = placement.slots, placement.arriving
        buffers = BlockBuffers(device, nbytes, *number, budget.read, peak.count_not_locked)
        stack.enter_context(buffers)
        parking = Parking(place) if placement.parked else None
        yield Stream(decoders, batches, buffers, peak, allocate, placement.part, parking)


def prunable(model: StreamedModel) -> tuple[tuple[Matrix, ...], ...]:
    """The matrices of each block that may be pruned. Where blocks are not of linears alone, they are traced for it.

    Raises ModelError where it is not known what a matrix is.
    """
    if model.skeleton.is_plain:
        return model.skeleton.matrices
    traces = model.skeleton.traces or require_chain(model, np.zeros((1, 4), dtype=np.int64))
    return tuple(traces[index].matrices for index in range(model.depth))


def left_dense(model: StreamedModel) -> dict[str, str]:
    """{file tensor: why} of the matrices in blocks that are never pruned, as far as blocks are traced."""
    return {name: why for trace in model.skeleton.traces.values() for name, why in trace.dense.items()}


def require_chain(model: StreamedModel, tokens: np.ndarray) -> dict[int, Trace]:
    """The trace of each block, by one sequence of `tokens` (sequences, length).

    Raises ModelError unless blocks are a chain (see `calls`).
    """
    elsewhere = model.budget.free_vram is not None  # the GPU is one of a machine that is not here
    here = replace(model, device=torch.device("cpu")) if elsewhere else model
    with torch.no_grad(), Decoder(here) as decoder:
        decoder.embed([tokens[:1]])
    return model.skeleton.traces


def advance(block: Block, states: MicroBatches) -> None:
    """Replaces the hidden states by the block's output. Where experts come in groups, micro-batches wait for each."""
    if not block.groups.coming:
        for micro_batch in states:
            forward_in_place(block, micro_batch)
        return
    with Flows(partial(forward_in_place, block), states) as flows:
        while flows.go_on() == GROUP:
            block.groups.load()


def forward_in_place(block: Block, micro_batch: torch.Tensor) -> None:
    """Replaces the hidden states of one micro-batch, on any device, by the block's output."""
    micro_batch.copy_(block(micro_batch), non_blocking=block.device.type == "cuda")
