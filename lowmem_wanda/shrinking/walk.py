"""The walk of a removal of experts: blocks are measured, experts chosen, and shards written without the others."""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from lowmem_wanda.checkpoint.cut import Cut
from lowmem_wanda.checkpoint.output import Output, shard_names
from lowmem_wanda.checkpoint.reader import PIECE, Tensor, read_header
from lowmem_wanda.checkpoint.writer import COPIED_PIECE, write_shard
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.shrinking.block import layer_record, measured_sums, remove_experts
from lowmem_wanda.shrinking.choice import Sums
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.buffers import DTYPES, Slot, Write, raw, read_cast
from lowmem_wanda.streaming.resources import Clock, add_seconds, anonymous
from lowmem_wanda.streaming.walk import MicroBatches, Notify, Stream, advance
from lowmem_wanda.streaming.workload import Placement

Contents = Iterable[bytes | memoryview] | None


class ShrinkWalk:
    """One walk through the blocks, which writes the shards that are missing.

    Where experts are measured, hidden states pass the dense blocks up to the last one that needs them. Else nothing is
    computed, and shards are written one after the other.
    """

    def __init__(self, job: ShrinkJob, output: Output, batch: int, on_block: Notify) -> None:
        self.job, self.output, self.on_block = job, output, on_block
        self.shared, *self.shards = shard_names(job.model.depth)
        self.unfinished = [index for index, shard in enumerate(self.shards) if shard not in output.finished]
        self.walked = list(range(max(self.unfinished, default=-1) + 1)) if job.measures else []
        self.batches = in_batches(job.calibration.tokens, batch) if job.calibration else []
        self.smaller = job.smaller()
        self.measured: dict[int, Sums] = {}
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()  # when the last shard was written

    def through(self, stream: Stream, placement: Placement) -> None:
        """Writes all shards that are missing, while the model is computed."""
        self.spent = stream.spent
        if self.shared not in self.output.finished:
            stream.submit(self.write_shared)
        if self.walked:
            stream.walk(partial(self.step, placement), indices=self.walked)

    def measure(self, stream: Stream) -> None:
        """Measures the experts of all blocks; nothing is chosen or written."""
        self.spent = stream.spent
        if self.unfinished:
            stream.walk(self._measure)

    def _measure(self, block: Block, states: MicroBatches) -> None:
        sums, seconds = measured_sums(self.job, block, states)
        add_seconds(self.spent, seconds)
        if sums:
            self.measured[block.index] = sums
        now = time.perf_counter()
        record = {"index": block.index, "measured": True, "host_bytes": anonymous(), "seconds": now - self.last}
        self.last = now
        self.on_block(record)

    def without_computing(self) -> None:
        """Writes all shards that are missing, of the choices that need no forward pass."""
        if self.shared not in self.output.finished:
            self.write_shared()
        for index in self.unfinished:
            self.write_block(self._record(index, self.job.known.get(index)), {})

    def step(self, placement: Placement, block: Block, states: MicroBatches) -> Write | None:
        """Moves the hidden states on by the dense block, then chooses its experts; gives what writes the shard."""
        if block.index not in self.unfinished:
            self._replay(block, states)
            return None
        moves_on = block.index != self.walked[-1]
        record = remove_experts(self.job, block, states, self.smaller, moves_on, placement)
        add_seconds(self.spent, record["parts"])
        return partial(self._write_from, record)

    def _replay(self, block: Block, states: MicroBatches) -> None:
        """Moves the hidden states on by a block whose shard is written, as it was then."""
        clock = Clock(block.device)
        with clock.part("onward"):
            kept = self.output.finished[self.shards[block.index]].get("kept")
            as_written = self.job.statistics != "dense" and (self.job.refit or self.job.pruning is not None)
            if as_written:
                self._take_up(block, kept or [])
            if kept is None or self.job.statistics == "dense" or self.smaller is None:
                advance(block, states)
            else:
                with self.smaller.block(block, kept) as small:
                    advance(small, states)
        add_seconds(self.spent, clock.seconds())

    def _take_up(self, block: Block, kept: list[int]) -> None:
        """Puts the weights that were changed, as they were written, into a block that was read from the source."""
        written = read_header(self.output.path / self.shards[block.index])
        layout = self.job.layout
        for tensor, made in layout.tensors({block.index: kept} if kept else {}):
            if tensor.name in block.stored and (made is not tensor or self.job.pruning):
                found = _read(written[made.name]).to(block.device)
                rows = layout.rows.get(tensor.name)
                if rows is None:
                    block.stored[tensor.name].copy_(found)
                else:
                    places = torch.tensor(layout.left(rows, kept), device=block.device)
                    block.stored[tensor.name].index_copy_(rows.axis, places, found)

    def _record(self, index: int, sums: Sums | None) -> dict[str, Any]:
        """The record of a block: the experts that it keeps, what chose them, and what is known of all."""
        record: dict[str, Any] = {"index": index, "parts": {}}
        if index in self.job.layers:
            record |= layer_record(self.job, index, sums)
        return record

    def write_shared(self) -> None:
        """Writes the first shard: everything outside the blocks, with layers that predict further tokens."""
        start, job = time.perf_counter(), self.job
        further = [layer_record(job, layer, None) for layer in job.layers if layer in job.layout.predicting]
        kept = {one["layer"]: one["kept"] for one in further}
        outside = [pair for pair in job.layout.tensors(kept) if pair[0].name not in job.layout.blocks]
        names = [made.name for _, made in outside]
        shard = write_shard(self.output.path / self.shared, [(made, _from_file(made)) for _, made in outside], names)
        add_seconds(self.spent, {"copy": time.perf_counter() - start})
        self.output.add(self.shared, {"nbytes": shard.nbytes, **shard.checksum, "tensors": names, "further": further})

    def _write_from(self, record: dict[str, Any], slot: Slot) -> None:
        """Writes a block's shard from its buffer; runs in the writing thread."""
        with slot.clocked("write"):
            self.write_block(record, slot.stored if self.job.in_place else {})

    def write_block(self, record: dict[str, Any], stored: Any) -> None:
        """Writes a block's shard: of `stored` tensors where they have the source's bytes, else of its files."""
        index, layout = record["index"], self.job.layout
        kept = {index: record["kept"]} if "kept" in record else {}
        mine = sorted(
            (tensor.name, made) for tensor, made in layout.tensors(kept) if layout.blocks.get(tensor.name) == index
        )
        tensors = [
            (made, _from_memory(made, stored[name]) if name in stored else _from_file(made)) for name, made in mine
        ]
        name = self.shards[index]
        shard = write_shard(self.output.path / name, tensors, finite={made.name for _, made in mine})
        now = time.perf_counter()
        record |= {"nbytes": shard.nbytes, **shard.checksum, "host_bytes": anonymous(), "seconds": now - self.last}
        self.last = now
        self.output.add(name, record)
        self.on_block(dict(record))


def _read(tensor: Tensor) -> torch.Tensor:
    return read_cast(tensor, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]))


def _from_file(tensor: Tensor) -> Contents:
    """The bytes of a tensor that is made of the file's; None for one that is copied."""
    return map(memoryview, tensor.pieces(COPIED_PIECE)) if tensor.is_made else None


def _from_memory(tensor: Tensor, stored: Any) -> Iterator[memoryview]:
    """Yields the bytes of what is left of a stored host tensor, without a copy."""
    flat = raw(stored)
    for start, stop in tensor.spans if isinstance(tensor, Cut) else ((0, len(flat)),):
        for at in range(start, stop, PIECE):
            yield flat[at : min(stop, at + PIECE)].data
