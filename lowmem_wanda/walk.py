"""The one loop over decoder blocks."""

from collections.abc import Callable, Iterable

import torch

from lowmem_wanda.checkpoint import Tensor
from lowmem_wanda.decoder import Block, Decoder, micro_batches

Source = Callable[[int], dict[str, Tensor]]  # block index -> where its tensors are read
Step = Callable[[Block, torch.Tensor | None], None]


def walk(decoder: Decoder, hidden: torch.Tensor | None, source: Source, step: Step, indices: Iterable[int]) -> None:
    """Loads each block of `indices` in turn, lets `step` work on it and the hidden states, releases it.

    `hidden` is (sequences, length, width), updated in place by `advance`; None where nothing is measured.
    """
    for index in indices:
        block = decoder.load(index, source(index))
        step(block, hidden)
        decoder.release(block)


def advance(block: Block, hidden: torch.Tensor, batch: int) -> None:
    """Replaces the hidden states by the block's output, `batch` sequences at a time."""
    for part in micro_batches(hidden, batch):
        part.copy_(block(part))
