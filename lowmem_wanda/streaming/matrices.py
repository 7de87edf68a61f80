"""Matrices, the units of pruning: which weights of a block they are, and which of them have the same inputs."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.experts import expert_parameters, is_experts
from lowmem_wanda.streaming.layout import View

LINEARS = (nn.Linear, Conv1D)
PLAIN = (nn.Linear.forward, Conv1D.forward)
OF_EXPERTS = "[all]"  # behind the path of a module of experts: the inputs of all of them together


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block that can be pruned.

    `name` is its name in reports and `tensor` the file tensor that holds it, from the value `start` on. `module` is the
    path, relative to the block, of the module that computes with it, and `parameter` its name there. `expert` is its
    index in a stack of experts, or None without a stack. A `transposed` matrix (GPT-2's Conv1D) is stored as (inputs,
    outputs); `shape` is (outputs, inputs) either way. `inputs` names the inputs of this matrix: the path of the first
    module that is called with them, or of an expert that of its stack and its index. Matrices of the same `inputs`
    share a statistic. Before a block is traced, every linear has its own.
    """

    name: str
    tensor: str
    module: str
    parameter: str
    expert: int | None
    transposed: bool
    shape: tuple[int, int]
    inputs: str
    start: int = 0

    @property
    def weights(self) -> int:
        """The number of the matrix's weights."""
        return self.shape[0] * self.shape[1]

    @property
    def layer(self) -> str:
        """The name of the inputs of all experts of its layer together; "" without experts."""
        return "" if self.expert is None else self.module + OF_EXPERTS

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The matrix in its stored tensor as (outputs, inputs), without a copy."""
        rows, columns = self.shape
        part = stored.reshape(-1)[self.start : self.start + self.weights]
        return part.view(columns, rows).t() if self.transposed else part.view(rows, columns)


def find_matrices(
    block: nn.Module, views: Mapping[str, View], shapes: Mapping[str, Sequence[int]]
) -> tuple[Matrix, ...]:
    """The matrices of linears and of experts in a block whose parameters, relative to it, are `views` of file tensors.

    `shapes` are those of the file tensors. Raises ModelError for a matrix that lies in no file tensor.
    """
    found: list[Matrix] = []
    for path, module in block.named_modules():
        if isinstance(module, LINEARS) and min(module.weight.shape) > 1:
            view = views[f"{path}.weight"]
            found += _matrices(path, "weight", None, isinstance(module, Conv1D), view, _Places(view, shapes))
        elif is_experts(module):
            for parameter in expert_parameters(module):
                found += stack_of(path, parameter, bool(module.is_transposed), views[f"{path}.{parameter}"], shapes)
    return tuple(found)


def own_forward(module: nn.Module) -> bool:
    """Whether a module is a linear with a forward of its own; some are routers."""
    return isinstance(module, LINEARS) and type(module).forward not in PLAIN


def stack_of(
    path: str, parameter: str, turned: bool, view: View, shapes: Mapping[str, Sequence[int]]
) -> Iterator[Matrix]:
    """Yields the matrices of a stack of experts, whose parameter holds (experts, outputs, inputs), or `turned`."""
    places = _Places(view, shapes)
    for expert in range(view.shape[0]):
        one = replace(view, shape=view.shape[1:], stride=view.stride[1:], offset=view.offset + expert * view.stride[0])
        yield from _matrices(path, parameter, expert, turned, one, places)


class _Places:
    """Where each of a view's tensors begins in their memory, and where the last one ends; which are `flat` (2-D)."""

    def __init__(self, view: View, shapes: Mapping[str, Sequence[int]]) -> None:
        self.starts = list(accumulate((math.prod(shapes[tensor]) for tensor in view.tensors), initial=0))
        self.flat = [len(shapes[tensor]) == 2 for tensor in view.tensors]


def _matrices(
    path: str, parameter: str, expert: int | None, turned: bool, view: View, places: _Places
) -> Iterator[Matrix]:
    """Yields the matrices that a parameter, or one expert of it, is made of: one for each file tensor that has a part.

    A matrix is all of a file tensor, or consecutive values of it. It is named as the tensor, with the expert's index or
    what computes with it in brackets where that holds several, or has three dimensions.
    """
    (rows, columns), (down, along) = (side[::-1] if turned else side for side in (view.shape, view.stride))
    transposed, done = down < along, 0
    starts = places.starts
    while done < rows:
        at = view.offset + done * down
        place = bisect_right(starts, at) - 1
        start, end = at - starts[place], starts[place + 1]
        count = rows if transposed else (end - at) // columns
        shape, tensor = (min(rows - done, count), columns), view.tensors[place]
        packed = (down, along) == ((1, rows) if transposed else (columns, 1))
        if not packed or not shape[0] or at + shape[0] * columns > end:
            raise ModelError(
                f"tensor {tensor}: holds parts of {path}.{parameter} that are no matrix, which is not supported yet"
            )
        what = path.rpartition(".")[2] if expert is None else expert
        alone = shape[0] * columns == end - starts[place] and places.flat[place]
        name = tensor if alone else f"{tensor}[{what}]"
        inputs = path if expert is None else f"{path}.{parameter}[{expert}]"
        yield Matrix(name, tensor, path, parameter, expert, transposed, shape, inputs, start)
        done += shape[0]


def unowned(block: nn.Module) -> dict[str, int]:
    """{parameter: its number of values} of the matrices of a block that no linear, embedding or expert has.

    A parameter of several dimensions with as few values as a vector is none, such as a norm's weight for each head.
    """
    linears = [module.weight.shape for module in block.modules() if isinstance(module, LINEARS)]
    widest = max((size for shape in linears for size in shape), default=0)
    found = {}
    for path, module in block.named_modules():
        known = {"weight"} if isinstance(module, (*LINEARS, nn.Embedding)) else set[str]()
        known = {*expert_parameters(module)} if is_experts(module) else known
        for name, parameter in module.named_parameters(recurse=False):
            bias = is_experts(module) and name.endswith("_bias")
            if name not in known and not bias and parameter.ndim > 1 and parameter.numel() > widest:
                found[f"{path}.{name}" if path else name] = parameter.numel()
    return found
