"""The down projections of a layer's kept experts are fitted to what the whole layer put out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lowmem_wanda.sparsity.refit import Routes, fit_outputs
from lowmem_wanda.streaming.block import Block, Stop
from lowmem_wanda.streaming.experts import entering, inputs_of_down, is_experts, outputs_of_down, place_of
from lowmem_wanda.streaming.walk import MicroBatches

LEAST = 32  # tokens of an expert; with fewer it keeps its weights


class Layer:
    """What the experts of a layer are given, and what they put out together in float32, each (tokens, width)."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._done = tokens, 0
        self.inputs, self.outputs = torch.empty(0), torch.empty(0)

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
    """Changes the kept experts' down projections in place; gives the record.

    It holds the share of the squares of the layer's output that is lost before and after, and the experts, by their ids
    in the whole layer, that saw too few tokens and keep their weights.
    """
    (module,), inputs, left = _experts(smaller), layer.inputs, layer.outputs
    squares = max(float(left.square().sum()), 1e-30)
    for expert, (tokens, weights) in routes.items():
        made = outputs_of_down(module, expert, inputs_of_down(module, expert, inputs[tokens]))
        left.index_add_(0, tokens, made.float() * weights.float(), alpha=-1)
    before = float(left.square().sum())
    enough = {expert: route for expert, route in routes.items() if len(route[0]) >= LEAST}
    moved = fit_outputs(left, enough, lambda expert, tokens: inputs_of_down(module, expert, inputs[tokens]))
    for expert, change in moved.items():
        weight, (tokens, weights) = module.down_proj[place_of(module, expert)], routes[expert]
        turned = change.t() if module.is_transposed else change
        dense = weight.to(torch.float32, copy=True)
        weight.copy_(dense + turned)
        rounded = weight.float() - dense - turned
        inner = inputs_of_down(module, expert, inputs[tokens]).float() * weights.float()
        left.index_add_(0, tokens, inner @ (rounded if module.is_transposed else rounded.t()), alpha=-1)
    few = [place_of(module, expert) for expert in routes if expert not in moved]
    return {"before": before / squares, "after": float(left.square().sum()) / squares, "few_tokens": few}


def _experts(block: Block) -> Sequence[Any]:
    return [module for module in block.module.modules() if is_experts(module)]
