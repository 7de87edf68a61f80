"""A block that can be differentiated: it computes on float32 copies of its weights, and gradients run back to them."""

from collections.abc import Collection
from typing import Any

import torch
from torch.func import functional_call

from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.outside import get, is_loaded


class TrainableBlock:
    """A block with float32 copies of its weights, of which `weights` (by file tensor) are trained.

    Copies of the other weights are in the computing dtype. Within the context the block itself must not be called; its
    stored weights are changed by `store` alone.
    """

    def __init__(self, block: Block, trained: Collection[str]) -> None:
        self.block = block
        self.weights = {name: block.stored[name].float().clone().requires_grad_() for name in trained}
        rest = {name: tensor for name, tensor in block.stored.items() if name not in self.weights}
        self._rest = {
            name: tensor.to(block.dtype) if tensor.is_floating_point() else tensor for name, tensor in rest.items()
        }
        self._forwards: dict[Any, Any] = {}

    def __enter__(self) -> "TrainableBlock":
        for matrix in self.block.matrices:  # whose weights are cast at every call
            module = self.block.module.get_submodule(matrix.module)
            if "forward" in module.__dict__:
                self._forwards[module] = module.__dict__.pop("forward")
        return self

    def __exit__(self, *exception: object) -> None:
        for module, forward in self._forwards.items():
            module.forward = forward

    def __call__(self, states: torch.Tensor, as_stored: bool = False) -> torch.Tensor:
        """The block's output for hidden states of its walk; `as_stored` with weights rounded as they will be stored."""
        block, weights = self.block, dict(self._rest)
        for name, weight in self.weights.items():
            rounded = weight.to(block.stored[name].dtype) if as_stored else weight
            weights[name] = rounded.to(block.dtype)
        args, kwargs = block.arguments(states)
        hidden = states.to(block.device)
        named = {path: view.made_of(weights) for path, view in block.views.items()}
        output = functional_call(block.module, named, (hidden, *args), kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[no-any-return]

    def restore(self) -> None:
        """Gives the trained weights the values of the block's stored ones again."""
        for name, weight in self.weights.items():
            weight.data.copy_(self.block.stored[name])

    def store(self) -> None:
        """Gives the block's stored weights the values of the trained ones, rounded, and its casts of them."""
        for name, weight in self.weights.items():
            self.block.stored[name].copy_(weight.detach())
        for path, view in self.block.views.items():
            cast, stored = get(self.block.module, path), view.of(self.block.stored)
            trained = not self.weights.keys().isdisjoint(view.tensors)
            if trained and is_loaded(cast) and cast.data_ptr() != stored.data_ptr():
                cast.copy_(stored)
