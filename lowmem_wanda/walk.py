"""The one loop over decoder blocks, and what happens within a block while sequences pass it."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.checkpoint import Tensor
from lowmem_wanda.decoder import Block, Decoder, Stop, micro_batches

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


def observe(block: Block, hidden: torch.Tensor, statistic: type, paths: Collection[str], batch: int) -> dict[str, Any]:
    """The statistic of what each linear in `paths` is fed, measured on the block as it stands.

    Linears with the same input share one (4 for the 7 linears of a Llama block), and each pass ends at
    the last input that is measured: what follows it is not computed.
    """
    leaders = {path: block.trace.leaders[path] for path in paths}
    wanted = [path for path in block.trace.order if path in leaders.values()]
    statistics = {path: statistic(block.weight(path).shape[1], hidden.device) for path in wanted}

    def note(path: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        statistics[path].add(given[0])
        if path == wanted[-1]:
            raise Stop

    hooks = [block.module.get_submodule(path).register_forward_pre_hook(partial(note, path)) for path in wanted]
    try:
        for part in micro_batches(hidden, batch):
            try:
                block(part)
            except Stop:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return {path: statistics[leader] for path, leader in leaders.items()}
