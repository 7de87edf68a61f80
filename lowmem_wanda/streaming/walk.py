"""The one loop over decoder blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.streaming.buffers import Ring, Write
from lowmem_wanda.streaming.decoder import Block, Decoder
from lowmem_wanda.streaming.resources import return_freed

Parts = list[torch.Tensor]  # hidden states, each (sequences, length, width), as many as are computed at a time
Source = Callable[[int], list[Tensor]]  # block index -> where its tensors are read
Step = Callable[[Block, Parts], Write | None]


@dataclass(frozen=True)
class Stream:
    """A model on its way through its blocks: `step` works on each of them and the hidden states, which `advance`
    updates in place (none where nothing is measured); what it gives writes the block out."""

    decoder: Decoder
    parts: Parts
    source: Source
    step: Step


def walk(streams: Sequence[Stream], ring: Ring, indices: Sequence[int]) -> None:
    """Takes all streams through the blocks `indices`, side by side: a block of each, then the next of each.

    Meanwhile the ring reads the next block and writes the last one.
    """
    stations = [(stream, index) for index in indices for stream in streams]
    arrivals = ring.arrivals(stream.source(index) for stream, index in stations)
    for (stream, index), slot in zip(stations, arrivals, strict=True):
        block = stream.decoder.load(index, slot.stored)
        write = stream.step(block, stream.parts)
        stream.decoder.release(block)
        ring.give_back(slot, write)
        return_freed()
    ring.settle()


def advance(block: Block, parts: Parts) -> None:
    """Replaces the hidden states by the block's output."""
    for part in parts:
        carry(block, part)


def carry(block: Block, part: torch.Tensor) -> None:
    """Replaces some sequences' hidden states, wherever they lie, by the block's output."""
    part.copy_(block(part), non_blocking=block.device.type == "cuda")
