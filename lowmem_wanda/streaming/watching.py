"""What the matrices of a block are called with, told while it computes."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.experts import Watch, entering, is_experts
from lowmem_wanda.streaming.matrices import OF_EXPERTS

# path of a module of experts, an expert, its outputs (tokens, width), their routing weights (tokens, 1)
Heard = Callable[[str, int, torch.Tensor, torch.Tensor], None]
Arrived = Callable[[str, torch.Tensor], None]  # path of a module, its inputs


@dataclass(frozen=True)
class Observe:
    """How experts are observed: `every` one on all tokens, or each on its own, `weighted` by its routing weight."""

    every: bool = False
    weighted: bool = False


@contextmanager
def watched(block: Block, names: Collection[str], arrived: Arrived, observe: Observe = Observe()) -> Iterator[None]:
    """Calls `arrived` with each of the `names` of inputs of the block's matrices and the inputs, before it computes.

    How experts are observed, `observe` says.
    """
    wanted = set(names)

    def before(path: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        arrived(path, inputs[0])

    def entered(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived(path, entering(args, kwargs))

    def saw(name: str, expert: int, inputs: torch.Tensor) -> None:
        if f"{name}[{expert}]" in wanted:
            arrived(f"{name}[{expert}]", inputs)

    with ExitStack() as stack:
        for path, module in block.module.named_modules():
            if path in wanted:
                stack.callback(module.register_forward_pre_hook(partial(before, path)).remove)
            elif is_experts(module) and any(
                name.startswith(f"{path}.") or name == path + OF_EXPERTS for name in wanted
            ):
                observers = module.__dict__.setdefault("observers", [])
                observers.append(_Experts(path, wanted, arrived, observe))
                stack.callback(observers.pop)
        for path in {one.rpartition(".")[0] + OF_EXPERTS for one in block.stacks} & wanted:
            module = block.module.get_submodule(path.removesuffix(OF_EXPERTS))
            hook = module.register_forward_pre_hook(partial(entered, path), with_kwargs=True)
            stack.callback(hook.remove)
        if any(name.startswith(f"{one}[") for one in block.stacks for name in wanted):
            stack.enter_context(Watch(block.module, block.stacks, saw, block.cast_again))
        yield


@contextmanager
def outputs_heard(block: Block, heard: Heard) -> Iterator[None]:
    """Calls `heard` with what each expert of the block puts out for its tokens."""
    with ExitStack() as stack:
        for path, module in block.module.named_modules():
            if is_experts(module):
                listeners = module.__dict__.setdefault("listeners", [])
                listeners.append(partial(heard, path))
                stack.callback(listeners.pop)
        yield


class _Experts:
    """Tells what the experts at `path` are given."""

    def __init__(self, path: str, wanted: Collection[str], arrived: Arrived, observe: Observe) -> None:
        self.path, self.wanted, self._arrived, self._observe = path, wanted, arrived, observe
        self.every = observe.every

    def entered(self, hidden: torch.Tensor, index: torch.Tensor) -> None:
        if (name := self.path + OF_EXPERTS) in self.wanted:
            self._arrived(name, hidden)

    def arrived(self, parameter: str, expert: int, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        if (name := f"{self.path}.{parameter}[{expert}]") in self.wanted:
            weighted = inputs * weights if self._observe.weighted and weights is not None else inputs
            self._arrived(name, weighted)
