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

from lowmem_wanda.llamacpp.collect import InputSums
from lowmem_wanda.pruning.experts import USUAL, OfExperts
from lowmem_wanda.pruning.stages import experts_come_first, stages_of
from lowmem_wanda.sparsity.methods.method import Statistic
from lowmem_wanda.streaming.block import Block, Stop
from lowmem_wanda.streaming.flows import GROUP, INPUTS, Flows, current, wait
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.resources import Clock
from lowmem_wanda.streaming.walk import MicroBatches, advance, forward_in_place
from lowmem_wanda.streaming.watching import Arrived, watched

Prune = Callable[[Matrix, Any, dict[str, Any]], None]  # a matrix, the statistic of its inputs, notes for its record
EYE = 256  # rows of an identity that are made at a time


class Passes:
    """One block and the micro-batches that pass through it. `run` calls `prune` once for each of `matrices`.

    Matrices of the same inputs share a statistic (4 for the 7 matrices of a Llama block). A pass ends at the last
    inputs that are measured, unless the hidden states move on. With `apart` one statistic is held at a time, or those
    of one expert. `sums` listens to the block that moves them on: the pruned block, or in the dense order the dense
    one. After `run`, `count` is the computing in matrices, in passes of all sequences through the whole block, and
    `clock` has the seconds of the parts measure, prune and onward.
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
        experts: OfExperts = USUAL,
    ) -> None:
        self.block, self.states, self.prune, self.sums, self.apart = block, states, prune, sums, apart
        self.clock, self.experts = Clock(block.device), experts
        self.columns = {matrix.inputs: matrix.shape[1] for matrix in matrices}
        entering = (matrix for matrix in matrices if matrix.layer in block.inputs and self._enters(matrix))
        self.columns |= {matrix.layer: matrix.shape[1] for matrix in entering}  # all tokens of a layer of experts
        order = [name for name in block.inputs if name in self.columns]
        self.groups = {name: [matrix for matrix in matrices if matrix.inputs == name] for name in order}
        self.statistic, self.statistics = statistic, dict[str, Statistic]()
        self.tokens: dict[str, int] = {}
        self.count = 0.0

    def run(self, order: str, moves_on: bool, held: int) -> None:
        """Measures and prunes in one of the orders and, if it `moves_on`, replaces the hidden states by the output.

        In the sequential order at most `held` micro-batches wait with their activations; the others are run again from
        the block's start. From the first experts on all of them wait, because experts are many. This changes time and
        memory, but not a bit of the result. Nor do groups of experts, for each of which all micro-batches wait.
        """
        in_groups = bool(self.block.groups.coming)
        with self._counting():
            if not self.groups or (order == "block" and not in_groups):
                self._measure_dense(False)
                if moves_on:
                    with self.clock.part("onward"), self.sums.listening():
                        advance(self.block, self.states)
                return
            with self.sums.listening():
                if order == "sequential":
                    self._in_stages([[name] for name in self.groups], True, moves_on, held)
                elif order == "block":
                    self._in_stages(
                        stages_of(self.block, self.groups, self.apart), False, False, len(self.states), again=moves_on
                    )
                else:
                    self._measure_dense(moves_on)

    def _measure_dense(self, moves_on: bool) -> None:
        """Measures all inputs on the dense block and prunes: in one pass, or `apart` in one for each.

        Then the last inputs are measured and their matrices pruned first: no inputs depend on the matrices behind them,
        so all are those of the dense block, and the result is the same to the bit. Where there are experts, `apart`
        measures one after the other in one pass, in which all micro-batches wait for each.
        """
        if self.block.groups.coming or (self.apart and any(name.endswith("]") for name in self.groups)):
            self._in_stages(stages_of(self.block, self.groups, self.apart), False, moves_on, len(self.states))
        elif self.apart:
            for name in reversed(self.groups):
                self._measure([name], through=False)
        else:
            self._measure([*self.groups], through=moves_on)

    def _measure(self, names: Collection[str], through: bool) -> None:
        """Measures some inputs, then prunes. If `through`, the outputs replace the hidden states."""
        if not names:
            return
        last = list(names)[-1]

        def arrived(name: str, inputs: torch.Tensor) -> None:
            self._add(name, inputs)
            if name == last and not through:
                raise Stop

        with watched(self.block, names, arrived, self.experts.observe), self.clock.part("measure"):
            for micro_batch in self.states:
                self._forward(micro_batch)
        for name in names:
            self._prune(name)

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        if name not in self.statistics:
            self.statistics[name] = self.statistic(self.columns[name], self.block.device)
        self.statistics[name].add(inputs)
        self.tokens[name] = self.tokens.get(name, 0) + inputs.numel() // max(1, inputs.shape[-1])

    def _in_stages(
        self, stages: list[list[str]], on_arrival: bool, moves_on: bool, held: int, again: bool = False
    ) -> None:
        """Measures the inputs stage after stage, and prunes their matrices before those of the next are measured.

        A micro-batch runs to the first inputs of the next stage and waits there, or it is replayed from the start, up
        to the first experts.
        `on_arrival` it waits before it goes on with the matrices, which are pruned meanwhile. Else it goes through the
        dense ones first, and with `again` through the pruned block too, one stage behind, whose output moves on.
        """
        now, closed, end = set[str](), set[str](), "" if on_arrival or moves_on else stages[-1][-1]
        with ExitStack() as stack:
            measuring, replayed = stack.enter_context(Flows(self._forward, self.states[:held])), self.states[held:]
            following = stack.enter_context(Flows(self._forward, self.states if again else ()))
            arrived = self._arrival(measuring, following, (now, closed), on_arrival, end)
            stack.enter_context(watched(self.block, self.groups, arrived, self.experts.observe))
            for stage in stages:
                if replayed and experts_come_first(self.block, stage):
                    measuring.add(replayed)
                    replayed = []
                now.update(stage)
                with self.clock.part("measure"), self.sums.pausing(again):
                    self._go_on(measuring, following, stage)
                    with self.sums.pausing():
                        for micro_batch in replayed:
                            self._forward(micro_batch)
                for name in stage:
                    self._prune(name)
                closed.update(stage)
                self._follow(following)
            with self.clock.part("onward"):
                if self.block.groups.coming:
                    measuring.add(replayed)
                    replayed = []
                for flows in [following] if again else [measuring] if moves_on else []:
                    self._go_on(flows)
                for micro_batch in replayed if moves_on else ():
                    self._forward(micro_batch)

    def _arrival(
        self, measuring: Flows, following: Flows, stages: tuple[set[str], set[str]], on_arrival: bool, end: str
    ) -> Arrived:
        """What happens when inputs arrive, with those of this stage and of the ones before it in `stages`.

        A forward that nothing follows stops at the inputs `end`, and so does a replay where it has measured.
        """
        now, closed = stages

        def arrived(name: str, inputs: torch.Tensor) -> None:
            flow = current()
            if flow in following:
                while name not in closed:
                    wait(INPUTS)
                return
            if name in closed:
                return
            if not on_arrival and name not in now:
                wait(INPUTS)
            self._add(name, inputs)
            if flow not in measuring or name == end:
                raise Stop
            if on_arrival:
                wait(INPUTS)

        return arrived

    def _go_on(self, flows: Flows, following: Flows | None = None, names: Collection[str] = ()) -> None:
        """Lets micro-batches go on to where inputs are measured, or to the end, and loads the groups they wait for.

        They also stop before a group where all of the inputs `names` are measured. Those that are `following` are let
        go on before a group is taken from them.
        """
        while True:
            if flows.reason == GROUP and flows.groups > self.block.groups.loads:
                if following is not None:
                    self._follow(following)
                self.block.groups.load()
            if flows.go_on() != GROUP or (names and self.tokens.keys() >= set(names)):
                return

    def _follow(self, following: Flows) -> None:
        """Lets those that are `following` go on as far as pruned matrices and loaded groups allow."""
        with self.clock.part("onward"), self.sums.pausing(False):
            while not (following.reason == GROUP and following.groups > self.block.groups.loads):
                if following.go_on() != GROUP:
                    return

    def _forward(self, micro_batch: torch.Tensor) -> None:
        """Runs one micro-batch through the block, in place, or as far as inputs are measured."""
        try:
            forward_in_place(self.block, micro_batch)
        except Stop:
            pass

    def _prune(self, name: str) -> None:
        with self.clock.part("prune"):
            for matrix in self.groups[name]:
                self.prune(matrix, *self._measured(matrix))
        if self.groups[name]:
            self.statistics.pop(name, None)

    def _measured(self, matrix: Matrix) -> tuple[Statistic, dict[str, Any]]:
        """The statistic that a matrix is scored by, and notes for its record.

        Of an expert with few tokens it is that of all tokens of its layer, where it is given those. Of one without any,
        every input counts the same, so that its weights are scored by their magnitude.
        """
        name, statistic = matrix.inputs, self.statistics.get(matrix.inputs)
        if matrix.expert is None:
            return self.statistics[name], {}
        tokens = self.tokens.get(name, 0)
        notes: dict[str, Any] = {"expert": matrix.expert, "tokens": tokens}
        if statistic is not None and tokens >= self.experts.min_tokens:
            return statistic, notes
        layer = self.statistics.get(matrix.layer)
        if layer is not None and self._enters(matrix):
            return layer, notes | {"scored_by": "all tokens of the layer"}
        if statistic is not None and tokens:
            return statistic, notes | {"scored_by": "few tokens"}
        return self._equal(matrix.shape[1]), notes | {"scored_by": "magnitude"}

    def _enters(self, matrix: Matrix) -> bool:
        """Whether a matrix of an expert is given the tokens that enter the layer, as the first ones of it are."""
        entering = next(name for name in self.block.inputs if name.startswith(f"{matrix.module}.") and name[-1] == "]")
        return matrix.inputs.rpartition("[")[0] == entering.rpartition("[")[0]

    def _equal(self, columns: int) -> Statistic:
        """A statistic of inputs that are each 1 in turn: X^T X is the identity."""
        statistic = self.statistic(columns, self.block.device)
        for start in range(0, columns, EYE):
            rows = min(EYE, columns - start)
            piece = torch.zeros(rows, columns, device=self.block.device)
            piece[:, start : start + rows].fill_diagonal_(1)
            statistic.add(piece)
        return statistic

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts the computing in matrices within the context, in passes of all sequences through the block."""
        sizes: dict[str, int] = {}
        whole = 0.0
        for matrix in self.block.matrices:
            name = matrix.module if matrix.expert is None else f"{matrix.module}.{matrix.parameter}[{matrix.expert}]"
            sizes[name] = sizes.get(name, 0) + matrix.weights
            whole += matrix.weights * self.block.shares.get(matrix.module, 1.0)
        one = whole * sum(len(micro_batch) * micro_batch.shape[1] for micro_batch in self.states)

        def count(name: str, inputs: torch.Tensor) -> None:
            self.count += sizes[name] * (inputs.numel() // max(1, inputs.shape[-1])) / one

        def after(path: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            count(path, inputs[0])

        with ExitStack() as stack:
            for path in (name for name in sizes if not name.endswith("]")):
                module = self.block.module.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(after, path)).remove)
            stack.enter_context(watched(self.block, [name for name in sizes if name.endswith("]")], count))
            yield
