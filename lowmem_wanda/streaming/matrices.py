"""What a decoder block does, seen by running it without weights or data."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.skeleton import LINEARS


@dataclass(frozen=True)
class Trace:
    """What a block does, seen on `meta`: its linears in the order they are called, and for each the first
    one that is given the same input (itself, or the one it shares a statistic with)."""

    order: tuple[str, ...]
    leaders: dict[str, str]
    returns_tuple: bool


UNSEEN = Trace((), {}, False)  # of a block that is loaded without anything having been embedded


def trace(block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Runs a block without weights or data. Raises ModelError for a linear that it never calls."""
    block = copy.deepcopy(block).to("meta")
    order: list[str] = []
    leaders: dict[str, str] = {}
    inputs: dict[str, torch.Tensor] = {}  # kept, so that no two of them share an identity

    def note(path: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        order.append(path)
        leaders[path] = next((leader for leader, tensor in inputs.items() if tensor is given[0]), path)
        inputs.setdefault(leaders[path], given[0])

    linears = {path: module for path, module in block.named_modules() if isinstance(module, LINEARS)}
    for path, module in linears.items():
        module.register_forward_pre_hook(partial(note, path))
    args, kwargs = _on_meta((args, kwargs))
    output = block(hidden.to("meta"), *args, **kwargs)
    if len(order) != len(linears) or set(order) != set(linears):
        missed = sorted(set(linears) - set(order)) or sorted(order)
        raise ModelError(
            f"{type(block).__name__}: linear {missed[0]} is not called once in a forward, so it cannot be measured"
        )
    return Trace(tuple(order), leaders, isinstance(output, (tuple, list)))


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(item) for item in value)
    return {key: _on_meta(item) for key, item in value.items()} if isinstance(value, dict) else value
