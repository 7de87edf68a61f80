"""Matrices, the units of pruning: which weights of a block they are, and which of them have the same inputs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_wanda.errors import ModelError

LINEARS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block that can be pruned.

    `name` is its name in reports and `tensor` the file tensor that holds it. `module` is the path, relative to the
    block, of the module that computes with it, and `parameter` its name there. `expert` is its index in a stack of
    experts, or None without a stack. A `transposed` matrix (GPT-2's Conv1D) is stored as (inputs, outputs); `shape` is
    (outputs, inputs) either way. `inputs` is the path of the first module that is called with the inputs of this
    matrix: matrices of the same `inputs` share a statistic. Before a block is traced, every matrix has its own.
    """

    name: str
    tensor: str
    module: str
    parameter: str
    expert: int | None
    transposed: bool
    shape: tuple[int, int]
    inputs: str

    @property
    def weights(self) -> int:
        """The number of the matrix's weights."""
        return self.shape[0] * self.shape[1]

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored tensor as (outputs, inputs), without a copy."""
        return stored.t() if self.transposed else stored


@dataclass(frozen=True)
class Trace:
    """What a run of a block on `meta` shows.

    `matrices` know which inputs they share. `inputs` are the distinct ones, in the order in which they arrive.
    `beside` is None where the block gives hidden states alone. Where it gives them within a tuple, it says of each
    further value whether that is None.
    """

    matrices: tuple[Matrix, ...]
    inputs: tuple[str, ...]
    beside: tuple[bool, ...] | None


def find_matrices(block: nn.Module, tensors: Mapping[str, str]) -> tuple[Matrix, ...]:
    """The matrices of a block whose parameters, relative to it, are the file tensors `tensors`."""
    found = []
    for path, module in block.named_modules():
        if isinstance(module, LINEARS):
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            shape = (int(columns), int(rows)) if transposed else (int(rows), int(columns))
            tensor = tensors[f"{path}.weight"]
            found.append(Matrix(tensor, tensor, path, "weight", None, transposed, shape, path))
    return tuple(found)


def trace(
    block: nn.Module, matrices: tuple[Matrix, ...], hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    """The trace of a block, which is run without weights and data.

    Raises ModelError for a block that does not run so, and for a matrix whose module is not called exactly once.
    """
    block = copy.deepcopy(block).to("meta")
    called: list[str] = []
    first: dict[str, str] = {}  # module -> the module that was called first with the same inputs
    arrived: dict[str, torch.Tensor] = {}  # kept, so that no two of them share an identity

    def note(path: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        called.append(path)
        first[path] = next((one for one, tensor in arrived.items() if tensor is inputs[0]), path)
        arrived.setdefault(first[path], inputs[0])

    modules = sorted({matrix.module for matrix in matrices})
    for path in modules:
        block.get_submodule(path).register_forward_pre_hook(partial(note, path))
    args, kwargs = _on_meta((args, kwargs))
    try:
        output = block(hidden.to("meta"), *args, **kwargs)
    except Exception as error:  # what a model's own code raises is not known
        raise ModelError(
            f"{type(block).__name__}: a block of it does not run without data ({str(error).strip()[:200]}), so what "
            "its matrices are measured on is not known; it is not supported yet"
        ) from error
    if sorted(called) != modules:
        missed = sorted(set(modules) - set(called)) or sorted(called)
        raise ModelError(
            f"{type(block).__name__}: linear {missed[0]} is not called once in a forward, so it cannot be measured"
        )
    known = tuple(replace(matrix, inputs=first[matrix.module]) for matrix in matrices)
    beside = tuple(value is None for value in output[1:]) if isinstance(output, (tuple, list)) else None
    return Trace(known, tuple(arrived), beside)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(item) for item in value)
    return {key: _on_meta(item) for key, item in value.items()} if isinstance(value, dict) else value
