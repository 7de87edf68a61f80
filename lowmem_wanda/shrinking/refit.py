"""The down projections of a layer's kept experts are fitted to what the whole layer put out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lowmem_wanda.sparsity.refit import Inner, Routes, fit_outputs
from lowmem_wanda.streaming.block import Block, Stop
from lowmem_wanda.streaming.experts import entering, inputs_of_down, is_experts, outputs_of_down, place_of
from lowmem_wanda.streaming.walk import MicroBatches

LEAST = 32  # tokens of an expert; with fewer, or fewer than it has inputs, it keeps its weights
HELD_OUT = 8  # one of so many sequences is not fitted to


class Layer:
    """What the experts of a layer are given, and what they put out together in float32, each (tokens, width).

    The tokens are those of `sequences` of `length` each, one after the other.
    """

    def __init__(self, sequences: int, length: int) -> None:
        self.sequences, self.length = sequences, length
        self._tokens, self._done = sequences * length, 0
        self.inputs, self.outputs = torch.empty(0), torch.empty(0)

    def held_out(self) -> torch.Tensor:
        """The mask of the tokens that nothing is fitted to, bool (tokens,): of every eighth sequence, or the last."""
        sequence = torch.arange(self._tokens, device=self.outputs.device) // max(1, self.length)
        return sequence % HELD_OUT == min(HELD_OUT, self.sequences) - 1

    @contextmanager
    def heard(self, block: Block) -> Iterator[None]:
        """Keeps what the experts of a block are given and put out within the context."""

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            hidden = entering(args, kwargs)
            if not self._done:
                self.inputs = hidden.new_empty(self._tokens, hidden.shape[1])
                self.outputs = output.new_empty(self._tokens, output.shape[1], dtype=torch.float32)
            place = slice(self._done, self._done + len(hidden))
            self.inputs[place], self.outputs[place] = hidden, output
            self._done += len(hidden)

        with ExitStack() as stack:
            for module in (one for one in block.module.modules() if is_experts(one)):
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield


def routes_of(smaller: Block, states: MicroBatches) -> Routes:
    """The tokens that the smaller block's router gives to each expert, and their routing weights."""
    indices, gates = [], []

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index, weights = args[1:] if len(args) > 2 else list(kwargs.values())[-2:]
        indices.append(index)
        gates.append(weights)
        raise Stop

    with ExitStack() as stack:
        for module in _experts(smaller):
            stack.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
        for micro_batch in states:
            try:
                smaller(micro_batch)
            except Stop:
                pass
    index, weights = torch.cat(indices), torch.cat(gates)
    found = {}
    for expert in range(_experts(smaller)[0].num_experts):
        token, place = (index == expert).nonzero(as_tuple=True)
        found[expert] = token, weights[token, place, None]
    return found


def refit(smaller: Block, routes: Routes, layer: Layer) -> dict[str, Any]:
    """Changes the kept experts' down projections in place, where that helps; gives the record.

    They are fitted on all sequences but every eighth. If the layer's error on those does not fall, all keep their
    weights, and `taken` is False. The record holds the shares of the squares of the layer's output that are lost
    `before` and `after`, on all tokens, and `held_out` both on what is held out; and in `few_tokens` the experts, by
    their ids in the whole layer, that saw fewer tokens than they have inputs, or than 32, and keep their weights.
    """
    (module,), inputs, left = _experts(smaller), layer.inputs, layer.outputs
    held = layer.held_out()
    squares = [max(float(part.square().sum()), 1e-30) for part in (left, left[held])]

    def inner(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return inputs_of_down(module, expert, inputs[tokens])

    for expert, (tokens, gates) in routes.items():
        made = outputs_of_down(module, expert, inner(expert, tokens))
        left.index_add_(0, tokens, made.float() * gates.float(), alpha=-1)
    before = _lost(left, held, squares)
    columns = module.down_proj.shape[1 if module.is_transposed else 2]
    seen = {expert: tuple(one[~held[route[0]]] for one in route) for expert, route in routes.items()}
    enough = {expert: route for expert, route in seen.items() if len(route[0]) >= max(LEAST, columns)}
    kept = left.clone()
    moved = fit_outputs(left, enough, inner)  # type: ignore[arg-type]
    left.copy_(kept)
    stored = {expert: module.down_proj[place_of(module, expert)].clone() for expert in moved}
    _move(module, moved, routes, inner, left)
    after, taken = _lost(left, held, squares), True
    if not after[1] < before[1]:
        taken, after = False, before
        for expert, weight in stored.items():
            module.down_proj[place_of(module, expert)].copy_(weight)
    few = [place_of(module, expert) for expert in routes if expert not in moved]
    return {
        "before": before[0],
        "after": after[0],
        "held_out": [before[1], after[1]],
        "taken": taken,
        "few_tokens": few,
    }


def _move(module: Any, moved: Mapping[int, torch.Tensor], routes: Routes, inner: Inner, left: torch.Tensor) -> None:
    """Adds to each down projection what it is `moved` by, and takes what that puts out from what is `left`."""
    for expert, change in moved.items():
        weight, (tokens, gates) = module.down_proj[place_of(module, expert)], routes[expert]
        dense, turned = weight.to(torch.float32, copy=True), change.t() if module.is_transposed else change
        weight.copy_(dense + turned)
        by = weight.float() - dense  # as it is stored
        weighted = inner(expert, tokens).float() * gates.float()
        left.index_add_(0, tokens, weighted @ (by if module.is_transposed else by.t()), alpha=-1)


def _lost(left: torch.Tensor, held: torch.Tensor, squares: Sequence[float]) -> list[float]:
    """The shares of the squares that are lost: of all tokens, and of those that are held out."""
    return [float(part.square().sum()) / whole for part, whole in zip((left, left[held]), squares, strict=True)]


def _experts(block: Block) -> Sequence[Any]:
    return [module for module in block.module.modules() if is_experts(module)]
