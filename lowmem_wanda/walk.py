"""The one loop over decoder blocks."""

from collections.abc import Callable, Sequence

import torch

from lowmem_wanda.decoder import Block, Decoder, micro_batches
from lowmem_wanda.memory import return_freed
from lowmem_wanda.reading import Tensor
from lowmem_wanda.ring import Ring, Write

Source = Callable[[int], list[Tensor]]  # block index -> where its tensors are read
Step = Callable[[Block, torch.Tensor | None], Write | None]


def walk(
    decoder: Decoder, hidden: torch.Tensor | None, ring: Ring, source: Source, step: Step, indices: Sequence[int]
) -> None:
    """Lets `step` work on each block of `indices` and the hidden states; what it gives writes the block out.

    Meanwhile the ring reads the next block and writes the last one. `hidden` is (sequences, length, width),
    updated in place by `advance`; None where nothing is measured.
    """
    for index, slot in zip(indices, ring.arrivals(map(source, indices)), strict=True):
        block = decoder.load(index, slot.stored)
        write = step(block, hidden)
        decoder.release(block)
        ring.give_back(slot, write)
        return_freed()
    ring.settle()


def advance(block: Block, hidden: torch.Tensor, batch: int) -> None:
    """Replaces the hidden states by the block's output, `batch` sequences at a time."""
    for part in micro_batches(hidden, batch):
        carry(block, part)


def carry(block: Block, part: torch.Tensor) -> None:
    """Replaces some sequences' hidden states, wherever they lie, by the block's output."""
    part.copy_(block(part), non_blocking=block.device.type == "cuda")
