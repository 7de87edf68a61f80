"""What a block's matrices are measured on, when they are pruned, and when the hidden states move on.

block        The dense block runs up to its last matrix, and all matrices are pruned. Then the pruned block moves the
             hidden states on. This is the order of the paper's code and takes 1.7 passes.
dense        All matrices are measured while the dense block moves the hidden states on. Then they are pruned. This
             takes 1 pass, and no error is carried on.
sequential   Each matrix is measured on the outputs of the matrices before it, which are pruned already (GPTQ's "true
             sequential"). This takes 1 pass where micro-batches are held while they wait for a matrix, and more where
             they are replayed.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.errors import LowmemError
from lowmem_wanda.llamacpp.collect import InputSums
from lowmem_wanda.sparsity.methods.method import Statistic
from lowmem_wanda.streaming.decoder import Block, Stop
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.resources import Clock
from lowmem_wanda.streaming.walk import MicroBatches, advance, forward_in_place, watched

Prune = Callable[[Matrix, Any], None]  # a matrix, the statistic of its inputs


class Passes:
    """One block and the micro-batches that pass through it. `run` calls `prune` once for each of `matrices`.

    Matrices of the same inputs share a statistic (4 for the 7 matrices of a Llama block). A pass ends at the last
    inputs that are measured, unless the hidden states move on. With `apart` one statistic is held at a time. `sums`
    listens to the block that moves them on: the pruned block, or in the dense order the dense one. After `run`, `count`
    is the computing in matrices, in units of one pass of all sequences through the whole block, and `clock` has the
    seconds of the parts measure, prune and onward.
    """

    def __init__(
        self,
        block: Block,
        states: MicroBatches,
        statistic: type[Statistic],
        matrices: Collection[Matrix],
        prune: Prune,
        sums: InputSums,
        apart: bool = False,
    ) -> None:
        self.block, self.states, self.prune, self.sums, self.apart = block, states, prune, sums, apart
        self.clock = Clock(block.device)
        self.columns = {matrix.inputs: matrix.shape[1] for matrix in matrices}
        order = [module for module in block.inputs if module in self.columns]
        self.groups = {module: [matrix for matrix in matrices if matrix.inputs == module] for module in order}
        self.statistic, self.statistics = statistic, dict[str, Statistic]()
        self.count = 0.0

    def run(self, order: str, moves_on: bool, held: int) -> None:
        """Measures and prunes in one of the orders and, if it `moves_on`, replaces the hidden states by the output.

        In the sequential order at most `held` micro-batches wait with their activations; the others are run again from
        the block's start. Their number changes time and memory, but not a bit of the result.
        """
        with self._counting():
            if order == "sequential" and self.groups:
                self._sequential(moves_on, held)
            elif order == "dense" and self.groups:
                with self.sums.listening():
                    self._measure(self.groups, through=moves_on)
            else:
                self._measure_dense()
                if moves_on:
                    with self.clock.part("onward"), self.sums.listening():
                        advance(self.block, self.states)

    def _measure_dense(self) -> None:
        """Measures all inputs on the dense block and prunes: in one pass, or `apart` in one for each.

        Then the last inputs are measured and their matrices pruned first: no inputs depend on the matrices behind them,
        so all are those of the dense block, and the result is the same to the bit.
        """
        if not self.apart:
            self._measure(self.groups, through=False)
        for module in reversed(self.groups) if self.apart else ():
            self._measure([module], through=False)

    def _measure(self, modules: Collection[str], through: bool) -> None:
        """Measures the inputs of some modules, then prunes. If `through`, the outputs replace the hidden states."""
        if not modules:
            return
        last = list(modules)[-1]

        def arrived(module: str, inputs: torch.Tensor) -> None:
            self._add(module, inputs)
            if module == last and not through:
                raise Stop

        with watched(self.block, modules, arrived), self.clock.part("measure"):
            for micro_batch in self.states:
                self._forward(micro_batch)
        for module in modules:
            self._prune(module)

    def _add(self, module: str, inputs: torch.Tensor) -> None:
        if module not in self.statistics:
            self.statistics[module] = self.statistic(self.columns[module], self.block.device)
        self.statistics[module].add(inputs)

    def _sequential(self, moves_on: bool, held: int) -> None:
        """Measures the inputs one after the other, and prunes their matrices before the next are measured.

        A micro-batch runs to the next inputs that are not measured yet. It waits there in a greenlet, or it is replayed
        from the block's start.
        """
        greenlet = require_greenlet()
        hub, closed = greenlet.getcurrent(), set()

        def arrived(module: str, inputs: torch.Tensor) -> None:
            if module in closed:
                return
            self._add(module, inputs)
            if greenlet.getcurrent() is hub:
                raise Stop
            hub.switch()

        waiting = [greenlet.greenlet(partial(self._forward, micro_batch)) for micro_batch in self.states[:held]]
        with self.sums.listening(), watched(self.block, self.groups, arrived):
            for module in self.groups:
                with self.clock.part("measure"):
                    for flow in waiting:
                        flow.switch()
                    with self.sums.pausing():
                        for micro_batch in self.states[held:]:
                            self._forward(micro_batch)
                self._prune(module)
                closed.add(module)
            with self.clock.part("onward"):
                for flow in waiting:
                    flow.switch() if moves_on else flow.throw(greenlet.GreenletExit)
                for micro_batch in self.states[held:] if moves_on else ():
                    self._forward(micro_batch)

    def _forward(self, micro_batch: torch.Tensor) -> None:
        """Runs one micro-batch through the block, in place, or as far as inputs are measured."""
        try:
            forward_in_place(self.block, micro_batch)
        except Stop:
            pass

    def _prune(self, module: str) -> None:
        statistic = self.statistics.pop(module)
        with self.clock.part("prune"):
            for matrix in self.groups[module]:
                self.prune(matrix, statistic)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts the computing in matrices within the context, in passes of all sequences through the block."""
        sizes: dict[str, int] = {}
        for matrix in self.block.matrices:
            sizes[matrix.module] = sizes.get(matrix.module, 0) + matrix.weights
        one = sum(sizes.values()) * sum(len(micro_batch) * micro_batch.shape[1] for micro_batch in self.states)

        def after(size: int, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            self.count += size * (inputs[0].numel() // inputs[0].shape[-1]) / one

        with ExitStack() as stack:
            for path, size in sizes.items():
                module = self.block.module.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(after, size)).remove)
            yield


def require_greenlet() -> Any:
    """The greenlet package. Raises LowmemError, saying how to install it."""
    try:
        import greenlet
    except ImportError:
        raise LowmemError(
            "--statistics sequential needs a package that is not installed: pip install greenlet"
        ) from None
    return greenlet
