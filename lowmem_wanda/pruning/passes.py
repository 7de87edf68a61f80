"""In which order a block's linears are measured, pruned, and the hidden states moved on.

block        the dense block up to its last linear; all are pruned; the pruned block moves the hidden states
             on (the order of the paper's code): 1.7 passes
dense        the dense block measures and moves on at once, then all are pruned: 1 pass, no error carried on
sequential   each linear on what the already pruned ones before it put out (GPTQ's "true sequential"): 1 pass
             where micro-batches are held while they wait for a linear, more where they are replayed
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.errors import LowmemError
from lowmem_wanda.streaming.clock import Clock
from lowmem_wanda.streaming.decoder import Block, Stop
from lowmem_wanda.streaming.recorder import Recorder, watched
from lowmem_wanda.streaming.walk import Parts, advance, carry

Prune = Callable[[str, Any], None]  # path of a linear, the statistic of its inputs


class Measuring:
    """One block and the sequences that pass it: `run` calls `prune` once for every path in `paths`.

    Linears with the same input share a statistic (4 for the 7 linears of a Llama block), and no pass goes
    beyond the last input that is measured unless the hidden states are to move on, which the `recorder` listens to:
    to what the pruned block computes, in the dense order to what the dense one does. After `run`, `passes`
    is what was computed in linears, in units of one pass of all sequences through the whole block, and
    `clock` has the time of the parts measure, prune and onward.
    """

    def __init__(
        self, block: Block, parts: Parts, statistic: type, paths: Collection[str], prune: Prune, recorder: Recorder
    ) -> None:
        self.block, self.parts, self.prune, self.recorder = block, parts, prune, recorder
        self.clock = Clock(block.device)
        leaders = {path: block.trace.leaders[path] for path in paths}
        order = [path for path in block.trace.order if path in leaders.values()]
        self.groups = {leader: [path for path in paths if leaders[path] == leader] for leader in order}
        self.statistics = {path: statistic(block.weight(path).shape[1], block.device) for path in order}
        self.passes = 0.0

    def run(self, order: str, onward: bool, held: int) -> None:
        """Measures and prunes in one of the orders and, if `onward`, replaces the hidden states by the block's output.

        In the sequential order at most `held` micro-batches wait with their activations; the others are run
        again from the block's start. How many changes time and memory, and no bit of the result.
        """
        with self._counting():
            if order == "sequential" and self.groups:
                self._sequential(onward, held)
            elif order == "dense" and self.groups:
                with self.recorder.listening():
                    self._measure(through=onward)
            else:
                if self.groups:
                    self._measure(through=False)
                if onward:
                    with self.clock.part("onward"), self.recorder.listening():
                        advance(self.block, self.parts)

    def _measure(self, through: bool) -> None:
        """Measures everything on the dense block, then prunes; `through` keeps the outputs."""
        last = [*self.groups, None][-2]

        def arrived(path: str, inputs: torch.Tensor) -> None:
            self.statistics[path].add(inputs)
            if path == last and not through:
                raise Stop

        with watched(self.block, self.groups, arrived), self.clock.part("measure"):
            for part in self.parts:
                self._carry(part)
        for leader in self.groups:
            self._prune(leader)

    def _sequential(self, onward: bool, held: int) -> None:
        """Each micro-batch goes to the next linear that is open and waits there in a greenlet, or is replayed."""
        greenlet = greenlets()
        hub, closed = greenlet.getcurrent(), set()

        def arrived(path: str, inputs: torch.Tensor) -> None:
            if path in closed:
                return
            self.statistics[path].add(inputs)
            if greenlet.getcurrent() is hub:
                raise Stop
            hub.switch()

        waiting = [greenlet.greenlet(partial(self._carry, part)) for part in self.parts[:held]]
        with self.recorder.listening(), watched(self.block, self.groups, arrived):
            for leader in self.groups:
                with self.clock.part("measure"):
                    for flow in waiting:
                        flow.switch()
                    with self.recorder.pausing():
                        for part in self.parts[held:]:
                            self._carry(part)
                self._prune(leader)
                closed.add(leader)
            with self.clock.part("onward"):
                for flow in waiting:
                    flow.switch() if onward else flow.throw(greenlet.GreenletExit)
                for part in self.parts[held:] if onward else ():
                    self._carry(part)

    def _carry(self, part: torch.Tensor) -> None:
        """One micro-batch through the block, in place, or as far as its inputs are wanted."""
        try:
            carry(self.block, part)
        except Stop:
            pass

    def _prune(self, leader: str) -> None:
        with self.clock.part("prune"):
            for path in self.groups[leader]:
                self.prune(path, self.statistics[leader])

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts the weights that tokens meet in linears."""
        sizes = {path: self.block.weight(path).numel() for path in self.block.linears}
        one = sum(sizes.values()) * sum(len(part) * part.shape[1] for part in self.parts)

        def after(size: int, module: nn.Module, given: tuple[torch.Tensor, ...], output: Any) -> None:
            self.passes += size * (given[0].numel() // given[0].shape[-1]) / one

        with ExitStack() as stack:
            for path, size in sizes.items():
                module = self.block.module.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(after, size)).remove)
            yield


def greenlets() -> Any:
    """The greenlet package. Raises LowmemError, saying how to install it."""
    try:
        import greenlet
    except ImportError:
        raise LowmemError(
            "--statistics sequential needs a package that is not installed: pip install greenlet"
        ) from None
    return greenlet
