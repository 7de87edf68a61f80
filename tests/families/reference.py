"""A plain whole-model Wanda 2:4, which knows nothing of the product: what its output must be, bit for bit.

The model is in memory, as transformers loads it, with `experts_implementation="eager"`. Block by block, in the paper's
order: the whole model runs on all micro-batches while the inputs of a block's matrices are summed up, then these are
pruned. Matrices are the weights of linears, and slices of 3-D parameters that products are made with.
"""

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

MARK = 16384.0  # no weight has it, and every dtype does
FEW = 8  # tokens; an expert that saw fewer is scored by more than its own
LINEARS = (nn.Linear, Conv1D)
PRODUCTS = (torch.bmm, torch.matmul, torch.mm, nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__,
            torch.Tensor.bmm, torch.Tensor.mm)  # fmt: skip


def load(path: Path, images: bool) -> nn.Module:
    """The model of a checkpoint, computed in float32. Raises AssertionError where tensors lack or are left over."""
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model, found = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    wrong = {key: sorted(names) for key, names in found.items() if names and key != "unexpected_keys"}
    assert not wrong, f"transformers loads {path} with {wrong}"
    for parameter in model.parameters():  # else a mapped file's, at any place: products with one row depend on it
        parameter.data = parameter.data.clone()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def find_blocks(model: nn.Module, tokens: torch.Tensor) -> tuple[str, list[nn.Module]]:
    """The largest of the outermost lists of modules that a forward on text calls, and its path."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    called = set()
    with ExitStack() as stack:
        for name in outer:
            for child in lists[name]:
                hook = child.register_forward_pre_hook(lambda *_, name=name: called.add(name))
                stack.callback(hook.remove)
        model(input_ids=tokens, use_cache=False)
    assert called, "no list of modules is called"
    path = max(called, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return path, list(lists[path])


def prune_block(model: nn.Module, block: nn.Module, batches: Collection[torch.Tensor]) -> None:
    """Prunes a block of a model in place, by what it is given while the model runs on batches of token ids."""
    seen = Seen()
    with watching(block, seen):
        for tokens in batches:
            model(input_ids=tokens, use_cache=False)
    for module in (module for module in seen.sums if isinstance(module, LINEARS)):
        weight = module.weight.data
        mask(weight.t() if isinstance(module, Conv1D) else weight, seen.sums[module])
    for stack in seen.turned:
        prune_experts(stack, seen)


@dataclass
class Seen:
    """What a block's matrices were called with.

    `sums` and `tokens` are those of a linear, of a module of experts, or of (stack of matrices, expert). `turned` says
    of each stack whether it holds (inputs, outputs), `owner` which module has it, and `entering` whether it is given
    what enters that module.
    """

    sums: dict[Any, torch.Tensor] = field(default_factory=dict)
    tokens: dict[Any, int] = field(default_factory=lambda: defaultdict(int))
    turned: dict[nn.Parameter, bool] = field(default_factory=dict)
    owner: dict[nn.Parameter, nn.Module] = field(default_factory=dict)
    first: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    entering: set[nn.Parameter] = field(default_factory=set)

    def add(self, key: Any, inputs: torch.Tensor) -> None:
        """Adds inputs (..., columns): sums of squares in float32 over a micro-batch, then in float64."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.sums[key] = self.sums.get(key, 0) + rows.float().square().sum(0).double()
        self.tokens[key] += len(rows)


@contextmanager
def watching(block: nn.Module, seen: Seen) -> Iterator[None]:
    """Sums up what the matrices of a block are called with."""
    stacks = {
        parameter: module
        for module in block.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
    }
    seen.owner |= stacks
    with ExitStack() as context:
        for module in block.modules():
            if isinstance(module, LINEARS):
                hook = module.register_forward_pre_hook(lambda module, given: seen.add(module, given[0]))
                context.callback(hook.remove)
        for module in dict.fromkeys(stacks.values()):
            context.callback(module.register_forward_pre_hook(partial(_enters, seen), with_kwargs=True).remove)
        context.enter_context(Products(seen))
        yield


def _enters(seen: Seen, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Tokens enter a module that has stacks of matrices."""
    seen.first.pop(module, None)
    hidden = given[0] if given else named["hidden_states"]
    seen.add(module, hidden)


class Products(TorchFunctionMode):
    """Sees the products with a slice of a stack, or with all of it."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.at = {stack.untyped_storage().data_ptr(): stack for stack in seen.owner}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            stack = self.at.get(args[1].untyped_storage().data_ptr())
            if stack is not None:
                self._look(func, *args[:2], stack)
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, inputs: torch.Tensor, weight: torch.Tensor, stack: nn.Parameter) -> None:
        size = stack[0].numel()
        expert, rest = divmod(weight.storage_offset() - stack.storage_offset(), size)
        assert not rest and not weight.numel() % size, f"a part of a matrix of a stack {list(stack.shape)} is used"
        as_stored = weight.stride()[-2:] == stack.stride()[-2:]
        self.seen.turned[stack] = (func is not nn.functional.linear) == as_stored
        if self.seen.first.setdefault(self.seen.owner[stack], inputs) is inputs:
            self.seen.entering.add(stack)
        for place in range(weight.numel() // size):
            rows = inputs[place] if inputs.ndim == 3 and weight.ndim == 3 else inputs
            rows = rows.reshape(-1, rows.shape[-1])
            self.seen.add((stack, expert + place), rows[rows.ne(0).any(-1)])  # llama4: the others are times zero


def prune_experts(stack: nn.Parameter, seen: Seen) -> None:
    """Prunes all matrices of a stack: by their own inputs, or where these were few by those of the whole layer."""
    together = seen.sums.get(seen.owner[stack])
    for expert, weight in enumerate(stack.data):
        tokens = seen.tokens.get((stack, expert), 0)
        own = seen.sums[stack, expert] if tokens else None
        weight = weight.t() if seen.turned[stack] else weight
        if tokens < FEW and stack in seen.entering and together is not None and len(together) == weight.shape[1]:
            own = together
        mask(weight, own)


def mask(weight: torch.Tensor, sums: torch.Tensor | None) -> None:
    """Zeroes the 2 lowest of each 4 inputs of a weight (outputs, inputs); by magnitude without sums."""
    score = weight.abs() if sums is None else weight.abs() * sums.sqrt().float()
    score = score.reshape(-1, 4)
    low = torch.sort(score, dim=1, stable=True).indices[:, :2]
    zero = torch.zeros_like(score, dtype=torch.bool).scatter_(1, low, True)
    weight.masked_fill_(zero.view(weight.shape), 0)


def marked(path: Path, tensors: Collection[str], folder: Path, images: bool) -> dict[str, torch.Tensor]:
    """{parameter: which of its values} lie in the given file tensors, seen by loading a copy where they are marked."""
    shutil.copytree(path, folder)
    for shard in folder.glob("*.safetensors"):
        held = load_file(shard)
        for name in held.keys() & tensors:
            held[name] = torch.full_like(held[name], MARK)
        save_file(held, shard, metadata={"format": "pt"})
    state = load(folder, images).state_dict()
    shutil.rmtree(folder)
    return {name: value == MARK for name, value in state.items() if value.is_floating_point()}


def reference(
    path: Path, batches: Collection[torch.Tensor], left_dense: Collection[str], folder: Path, images: bool
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The state of the model in `path` once it is pruned but for some file tensors, and the dense model's logits.

    `folder` is one for a copy of the checkpoint.
    """
    model = load(path, images)
    logits = [model(input_ids=tokens, use_cache=False).logits for tokens in batches]
    dense = {name: value.clone() for name, value in model.state_dict().items()} if left_dense else {}
    left = marked(path, left_dense, folder, images) if left_dense else {}
    keep = Kept(model, dense, left)
    _, blocks = find_blocks(model, next(iter(batches)))
    for block in blocks:
        prune_block(model, block, batches)
        keep.restore()
    return model.state_dict(), logits


@dataclass
class Kept:
    """Values of a model that are put back after each block is pruned."""

    model: nn.Module
    dense: dict[str, torch.Tensor]
    left: dict[str, torch.Tensor]

    def restore(self) -> None:
        """Puts the dense values of what is left dense back."""
        state = self.model.state_dict()
        for name, where in self.left.items():
            if where.any():
                state[name][where] = self.dense[name][where]
