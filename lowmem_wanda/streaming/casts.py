"""Casts of a block's weights to the computing dtype, where they are stored in another one."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.streaming.buffers import Scratch
from lowmem_wanda.streaming.experts import is_experts
from lowmem_wanda.streaming.layout import View
from lowmem_wanda.streaming.matrices import LINEARS
from lowmem_wanda.streaming.outside import put, unloaded

Stored = Mapping[str, torch.Tensor]


class Casts:
    """Gives the modules of one block at a time their weights, cast to `dtype`.

    A matrix is cast at every call, in a buffer that all share. Casting all of a block at once takes two more blocks of
    memory (bfloat16 weights, float32 computing). Casting at each call takes about 3 % of the time of a matrix product
    with 1024 tokens on a CPU.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._small, self._matrix = Scratch(device), Scratch(device)
        self._stacks: dict[nn.Module, Scratch] = {}

    def load(self, block: nn.Module, views: Mapping[str, View], stored: Stored, owners: Collection[str]) -> None:
        """Puts the parameters of a block, which are `views` of its `stored` tensors, into it.

        Those of the modules `owners` that are matrices are cast when the module is called.
        """
        on_call: dict[str, dict[str, torch.Tensor]] = {}  # module -> its parameters that are cast at every call
        small: dict[str, View] = {}
        for name, view in views.items():
            owner, _, last = name.rpartition(".")
            if view.tensor not in stored:
                continue
            parameter = view.of(stored)
            if parameter.dtype == self.dtype or not parameter.is_floating_point():
                put(block, name, parameter)
            elif owner in owners and parameter.ndim > 1:
                put(block, name, parameter)
                on_call.setdefault(owner, {})[last] = parameter
            else:
                small[name] = view
        casts = self._small.empty({name: (view.shape, self.dtype) for name, view in small.items()})
        for name, view in small.items():
            put(block, name, casts[name].copy_(view.of(stored)))
        for owner, parameters in on_call.items():
            module = block.get_submodule(owner)
            if isinstance(module, LINEARS):
                self._stand_in(module, parameters)
                module.forward = partial(self._call, module, parameters)  # type: ignore[method-assign]
            elif not is_experts(module):  # which cast one expert at a time
                module.forward = partial(self._call_stacks, module, parameters)  # type: ignore[method-assign]

    def release(self, block: nn.Module, owners: Collection[str]) -> None:
        """Lets the modules `owners` of a block be called as they are again."""
        for owner in owners:
            block.get_submodule(owner).__dict__.pop("forward", None)
        self._stacks.clear()

    def _call(self, module: nn.Module, stored: Stored, *args: Any, **kwargs: Any) -> Any:
        """The output of a linear's own forward on its cast weight, which it does not keep."""
        self._cast(self._matrix, module, stored)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            self._stand_in(module, stored)

    def _call_stacks(self, module: nn.Module, stored: Stored, *args: Any, **kwargs: Any) -> Any:
        """The output of experts that transformers computes in its own way, on their cast weights.

        Micro-batches may wait within and linears may be called there, so these casts have memory of their own.
        """
        self._cast(self._stacks.setdefault(module, Scratch(self.device)), module, stored)
        return type(module).forward(module, *args, **kwargs)

    def _cast(self, scratch: Scratch, module: nn.Module, stored: Stored) -> None:
        weights = scratch.empty({name: (weight.shape, self.dtype) for name, weight in stored.items()})
        for name, weight in stored.items():
            put(module, name, weights[name].copy_(weight))

    def _stand_in(self, module: nn.Module, stored: Stored) -> None:
        """Puts weights that are not loaded into a module: models look at their dtype before they call it."""
        for name, weight in stored.items():
            put(module, name, unloaded(weight.to("meta", self.dtype), self.device))
