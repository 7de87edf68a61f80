"""The weights outside the blocks: embeddings, final norm and others, each loaded when its module is called."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.streaming.buffers import DTYPES, read_cast
from lowmem_wanda.streaming.layout import View
from lowmem_wanda.streaming.model import StreamedModel


class Outside:
    """Loads what lies outside the blocks of a model's skeleton, in the computing dtype on the device.

    The head is not loaded (see `Head`). What is not loaded is NaN on the device, so that what a model computes with a
    weight whose module it does not call is NaN.
    """

    def __init__(self, model: StreamedModel) -> None:
        self.model, self.skeleton = model, model.skeleton
        self._filled: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._own: dict[nn.Module, dict[str, View]] = {}
        self._embeds = True
        outside = self.skeleton.outside()
        for path, module in self.skeleton.model.named_modules():
            prefix = f"{path}." if path else ""
            own = {
                name: outside[prefix + name]
                for name in [*module._parameters, *module._buffers]
                if prefix + name in outside
            }
            if own and module is not self.skeleton.head:
                self._own[module] = own
                self._hooks.append(module.register_forward_pre_hook(partial(self._fill, own)))
        for name, buffer in self.skeleton.model.named_buffers():
            if name not in outside and not name.startswith(f"{self.skeleton.path}."):
                put(self.skeleton.model, name, buffer.to(model.device))
        self._embeddings = [module for module in self._own if isinstance(module, nn.Embedding)]
        self._unload(outside)

    def load_embeddings(self) -> None:
        """Loads the input embeddings before they are called: models look where their weight is (llama4)."""
        module = self.skeleton.model.get_input_embeddings()  # type: ignore[operator, union-attr]
        if module in self._own:
            self._fill(self._own[module], module, ())

    @contextmanager
    def embedding_nothing(self) -> Iterator[None]:
        """All embeddings are zeros within the context, and none is loaded."""
        self._embeds = False
        for module in self._embeddings:
            module.forward = partial(self._zeros, module)  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._embeds = True
            for module in self._embeddings:
                del module.forward

    def empty(self) -> None:
        """Drops all weights that were loaded."""
        outside = self.skeleton.outside()
        self._unload(name for name, view in outside.items() if not self._filled.keys().isdisjoint(view.tensors))
        self._filled.clear()

    def close(self) -> None:
        """Drops all weights, and loads none again."""
        for hook in self._hooks:
            hook.remove()
        self._filled.clear()
        for name in self.skeleton.outside():
            put(self.skeleton.model, name, get(self.skeleton.model, name).to("meta"))

    def _unload(self, names: Iterable[str]) -> None:
        for name in names:
            put(self.skeleton.model, name, unloaded(get(self.skeleton.model, name), self.model.device))

    def _zeros(self, module: nn.Embedding, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*ids.shape, module.embedding_dim, dtype=self.model.dtype, device=self.model.device)

    def _fill(self, own: dict[str, View], module: nn.Module, args: Any) -> None:
        if not self._embeds and isinstance(module, nn.Embedding):
            return
        for name, view in own.items():
            for tensor in view.tensors:
                if tensor not in self._filled:
                    file = self.model.checkpoint.tensors[tensor]
                    stored = DTYPES[file.dtype]
                    dtype = self.model.dtype if stored.is_floating_point else stored
                    empty = torch.empty(file.shape, dtype=dtype, device=self.model.device)
                    self._filled[tensor] = read_cast(file, empty)
            put(module, name, view.made_of(self._filled))


def unloaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """NaN in the shape and dtype of a tensor, which takes no memory; of integers, the tensor on `meta`."""
    if not tensor.is_floating_point():
        return tensor.to("meta")
    return torch.full((), torch.nan, dtype=tensor.dtype, device=device).expand(tensor.shape)


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own, unlike what `unloaded` gives."""
    return not tensor.is_meta and (tensor.numel() < 2 or any(tensor.stride()))


def get(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a path."""
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)  # type: ignore[no-any-return]


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer of a path."""
    owner, _, last = name.rpartition(".")
    module = module.get_submodule(owner)
    setattr(module, last, nn.Parameter(tensor, requires_grad=False) if last in module._parameters else tensor)
