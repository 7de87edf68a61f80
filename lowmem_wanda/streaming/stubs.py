"""Stubs that take the places of blocks while the model's own forward runs without them."""

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn

Compared = dict[tuple[int, int], tuple[bool, torch.Tensor]]


class Stub(nn.Module):
    """Takes a block's place and passes its calls to `arrive`. What the model reads from it is read from the block."""

    def __init__(self, block: nn.Module, arrive: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_arrive"] = block, arrive

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes a call on to `arrive`."""
        return self._arrive(args, kwargs)


def merged(kept: Any, new: Any, compared: Compared) -> Any:
    """`new`, with whatever is equal in `kept` taken from there; `kept` itself if all is. Tensors are equal by value.

    Blocks share most arguments, so each pair of tensors is compared once and remembered in `compared`.
    """
    if kept is new:
        return kept
    if isinstance(kept, torch.Tensor) and isinstance(new, torch.Tensor):
        pair = (id(kept), id(new))
        if pair not in compared:
            compared[pair] = (same_values(kept, new), new)  # which is held, so that no other tensor gets its identity
        return kept if compared[pair][0] else new
    if type(kept) is not type(new):
        return new
    if isinstance(kept, (tuple, list)) and len(kept) == len(new):
        parts = [merged(*pair, compared) for pair in zip(kept, new, strict=True)]
        return kept if all(part is old for part, old in zip(parts, kept, strict=True)) else type(kept)(parts)
    if isinstance(kept, dict) and kept.keys() == new.keys():
        items = {key: merged(kept[key], new[key], compared) for key in kept}
        return kept if all(items[key] is kept[key] for key in kept) else items
    if isinstance(kept, (tuple, list, dict)):
        return new
    return kept if bool(kept == new) else new


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype and values; NaN is equal to NaN."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other) or (
        one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    )


def fresh(value: Any) -> Any:
    """The value with containers of its own, so that what a block puts into one of them reaches no other block."""
    if type(value) in (tuple, list):
        return type(value)(fresh(one) for one in value)
    if type(value) is dict:
        return {key: fresh(one) for key, one in value.items()}
    return copy.copy(value) if isinstance(value, MutableMapping) else value
