"""The inputs of a block's linears, watched while the block runs: what an importance matrix is made of."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from lowmem_wanda.errors import NumberError
from lowmem_wanda.llamacpp.imatrix import Entry
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.decoder import Block

Arrived = Callable[[str, torch.Tensor], None]  # path of a linear, its inputs


@contextmanager
def watched(block: Block, paths: Collection[str], arrived: Arrived) -> Iterator[None]:
    """Calls `arrived` with the inputs of each linear in `paths` before it computes."""

    def before(path: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        arrived(path, given[0])

    with ExitStack() as stack:
        for path in paths:
            module = block.module.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(partial(before, path)).remove)
        yield


class Recorder:
    """Sums of squares of the inputs of all linears in a block, of every run within `listening` and not within
    `pausing`. Linears with the same input share a sum. One that is not `on` records nothing."""

    def __init__(self, block: Block, on: bool = True) -> None:
        self.block, self.on, self.paused = block, on, False
        leaders = block.trace.leaders.values() if on else ()
        self.sums = {path: SquaredNorm(block.weight(path).shape[1], block.device) for path in dict.fromkeys(leaders)}

    @contextmanager
    def listening(self) -> Iterator[None]:
        with watched(self.block, self.sums, self._arrived):
            yield

    @contextmanager
    def pausing(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def entries(self) -> dict[str, Entry]:
        """{file tensor of a linear's weight: entry}. Raises NumberError for NaN or infinity."""
        made = {}
        for path, name in self.block.linears.items():
            known = self.sums[self.block.trace.leaders[path]]
            sums = known.sums.cpu().double().numpy()
            if not np.isfinite(sums).all():
                raise NumberError(f"tensor {name}: its inputs hold NaN or infinity: try --dtype float32")
            made[name] = Entry(sums[None], np.array([known.tokens]))
        return made

    def _arrived(self, path: str, inputs: torch.Tensor) -> None:
        if not self.paused:
            self.sums[path].add(inputs)
