"""The walk of a pruning: blocks are pruned or replayed, and their shards written."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from lowmem_wanda.checkpoint.output import Output, shard_names
from lowmem_wanda.checkpoint.parted import PartedShard
from lowmem_wanda.checkpoint.reader import PIECE, Tensor, read_header
from lowmem_wanda.checkpoint.writer import require_new, write_shard
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.llamacpp.collect import InputSums, splits
from lowmem_wanda.llamacpp.store import Store
from lowmem_wanda.pruning.block import move_on, prune_block
from lowmem_wanda.pruning.job import PruneJob
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.buffers import Slot, Write, raw
from lowmem_wanda.streaming.resources import add_seconds, anonymous
from lowmem_wanda.streaming.walk import MicroBatches, Notify, Stream
from lowmem_wanda.streaming.workload import Placement


class PruningWalk:
    """One walk through the blocks: finished ones are replayed from the output directory, the others are pruned."""

    def __init__(self, job: PruneJob, output: Output, placement: Placement, on_block: Notify) -> None:
        self.job, self.output, self.placement, self.on_block = job, output, placement, on_block
        self.shared, *self.shards = shard_names(job.model.depth)
        self.unfinished = [index for index, shard in enumerate(self.shards) if shard not in output.finished]
        self.store = Store(output.path, f"{job.recorded_on} batch {placement.batch}")
        unrecorded = [index for index in range(job.model.depth) if job.imatrix and not self.store.has(index)]
        if job.imatrix and unrecorded:
            require_new(job.imatrix)
        # hidden states pass all blocks up to the last one that needs them; without them finished blocks are left out
        last = max([*self.unfinished, *unrecorded], default=-1)
        self.walked = list(range(last + 1)) if job.calibration else self.unfinished
        self.batches = in_batches(job.calibration.tokens, placement.batch) if job.calibration else []
        self.spent: dict[str, float] = {}
        self.parted: dict[int, PartedShard] = {}  # shards of blocks whose experts come in groups
        self.targets: MicroBatches | None = None  # what the dense block puts out, if pruned blocks are recovered
        self.last = time.perf_counter()  # when the last shard was written

    def close(self) -> None:
        """Closes shards that were not finished."""
        for shard in self.parted.values():
            shard.close()

    def through(self, stream: Stream) -> None:
        """Writes all shards that are missing."""
        self.spent, self.more_states = stream.spent, stream.more_states
        if self.shared not in self.output.finished:
            stream.submit(self.write_shared)
        if self.walked:
            stream.walk(self.step, indices=self.walked, source=self.source)

    def source(self, index: int) -> Mapping[str, Tensor] | None:
        """The tensors that a block is read from, by name; None for those of the source.

        A finished block is read from its shard, except in the dense order, where the source's block moved the hidden
        states on.
        """
        if index in self.unfinished or self.job.moved_on_dense:
            return None
        return read_header(self.output.path / self.shards[index])

    def step(self, block: Block, states: MicroBatches) -> Write | None:
        """Prunes a block or replays a finished one, and moves the hidden states on; gives what writes the shard."""
        is_open = block.index in self.unfinished
        if is_open and block.groups.coming:
            tensors = self.job.model.block_tensors(block.index)
            self.parted[block.index] = PartedShard(self.output.path / self.shards[block.index], tensors)
            block.groups.write = lambda part: partial(self.write_group, block.index)
        if is_open and self.targets is None and self.job.recovers:
            self.targets = self.more_states()
        is_last = block.index == self.walked[-1]
        has_hidden_states = bool(states)
        wants_sums = self.job.imatrix is not None and (is_open or not self.store.has(block.index))
        sums = InputSums(block, on=wants_sums, split=splits(self.job.model, self.job.names) if wants_sums else ())
        moves_on = has_hidden_states and (wants_sums or not is_last)
        if is_open:
            pruned = prune_block(self.job, block, states, self.placement, moves_on, sums, self.targets)
            record = {"index": block.index, **pruned}
        else:
            record = {"parts": move_on(block, states, sums) if moves_on else {}}
        if wants_sums:
            self.store.put(block.index, sums.entries())
        add_seconds(self.spent, record["parts"])
        return partial(self.write_block, record) if is_open else None

    def write_shared(self) -> None:
        """Writes the first shard, a copy of everything outside the blocks."""
        outside = self.job.model.outside
        start = time.perf_counter()
        used = {name for view in self.job.model.skeleton.names.values() for name in view.tensors}
        contents = [(tensor, _made(tensor)) for tensor in outside]
        shard = write_shard(self.output.path / self.shared, contents, finite=used)
        add_seconds(self.spent, {"copy": time.perf_counter() - start})
        names = [tensor.name for tensor in outside]
        self.output.add(self.shared, {"nbytes": shard.nbytes, **shard.checksum, "tensors": names})

    def write_group(self, index: int, slot: Slot) -> None:
        """Writes a part of a block's shard; runs in the writing thread."""
        pruned = {matrix.tensor for matrix in self.job.selected[index]}  # whose scores are known to be finite
        with slot.clocked("write"):
            for tensor in (tensor for piece in slot.pieces for tensor in piece):
                start = tensor.offset - self.job.model.checkpoint.tensors[tensor.name].offset
                self.parted[index].write(tensor, start, _pieces(slot.stored[tensor.name]), tensor.name not in pruned)

    def write_block(self, record: dict[str, Any], slot: Slot) -> None:
        """Writes a block's shard, or what is left of it; runs in the writing thread."""
        name = self.shards[record["index"]]
        tensors = self.job.model.block_tensors(record["index"])
        pruned = {matrix.tensor for matrix in self.job.selected[record["index"]]}  # whose scores are known to be finite
        if len(slot.stored) < len(tensors):
            self.write_group(record["index"], slot)
            shard = self.parted.pop(record["index"]).finish()
        else:
            pieces = [(tensor, _pieces(slot.stored[tensor.name])) for tensor in tensors]
            with slot.clocked("write"):
                looks = {tensor.name for tensor in tensors} - pruned
                shard = write_shard(self.output.path / name, pieces, finite=looks)
        record["parts"] |= slot.seconds
        now = time.perf_counter()
        record |= {"nbytes": shard.nbytes, **shard.checksum, "host_bytes": anonymous()}
        record["seconds"], self.last = now - self.last, now
        self.output.add(name, record)
        self.on_block(dict(record))


def _made(tensor: Tensor) -> Iterator[memoryview] | None:
    """The bytes of a tensor that is not in its file as it is written; None for one that is copied."""
    return map(memoryview, tensor.pieces()) if tensor.is_made else None


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yields a host tensor's bytes without a copy, 16 MiB at a time."""
    flat = raw(tensor)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].data
