"""One decoder block with its weights, which computes as the model would have it compute."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowmem_wanda.streaming.calls import Call, Calls
from lowmem_wanda.streaming.layout import View
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.outside import get
from lowmem_wanda.streaming.parts import Part
from lowmem_wanda.streaming.tracing import Trace


class Stop(Exception):
    """Raised to end a forward early, once all that it was run for is known."""


class Block:
    """One decoder block with its weights.

    `stored` holds its file tensors by name, in their stored dtype, on `device`. Where that is the computing dtype, the
    module computes on these very tensors. Where it is not, a matrix is cast at every call, so a change of the stored
    weight counts from the next call on. `views` are {parameter or buffer of the module: where it lies}. `matrices` are
    what can be pruned, and `inputs` their distinct inputs in the order in which they arrive, once tokens have been
    embedded. `stacks` are the parameters of experts whose products are watched, and `shares` those of the experts of a
    module that each token is given to. It computes in `dtype`.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        stored: dict[str, torch.Tensor],
        trace: Trace,
        calls: Calls,
        views: Mapping[str, View],
        device: torch.device,
        dtype: torch.dtype,
        groups: Any,
    ) -> None:
        self.index, self.module, self.stored = index, module, stored
        self.device, self.dtype = device, dtype
        self.matrices, self.inputs = trace.matrices, trace.inputs
        self.stacks, self.shares = trace.stacks, trace.shares
        self.views, self._calls = views, calls
        self.groups = groups
        self.part: Part | None = None  # the group of experts that is loaded

    def like(self, module: nn.Module, stored: Mapping[str, torch.Tensor], views: Mapping[str, View]) -> "Block":
        """Another block that is called as this one: a `module` whose parameters are `views` of `stored` tensors."""
        trace = Trace(self.matrices, self.inputs, None, shares=self.shares)
        place = self.device, self.dtype
        return Block(self.index, module, dict(stored), trace, self._calls, views, *place, self.groups)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output (sequences, length, width), on its device, for hidden states of that shape on any."""
        if self.groups.parking is not None:
            with self.groups.parking.of(hidden, self.device) as moved:
                return self._output(moved, hidden)
        return self._output(hidden.to(self.device, non_blocking=self.device.type == "cuda"), hidden)

    def _output(self, moved: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The output for states that are moved to the device."""
        args, kwargs = self.arguments(states)
        output = self.module(moved, *args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[no-any-return]

    def arguments(self, states: torch.Tensor) -> Call:
        """What the module is called with beside the hidden states of a micro-batch of the walk."""
        return self._calls.of(states, self.index)

    def cast_again(self, name: str) -> None:
        """Casts the parameter `name` of the module anew, where it is cast: its stored weight may have changed."""
        cast, stored = get(self.module, name), self.views[name].of(self.stored)
        if cast.dtype != stored.dtype:
            cast.copy_(stored)

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The stored weight of a matrix as (outputs, inputs), a view."""
        return self.placed(matrix).view(self.stored[matrix.tensor])

    def placed(self, matrix: Matrix) -> Matrix:
        """The matrix with its place in the stored tensor, which may be a part of the file's."""
        if self.part is None or matrix.expert is None or matrix.tensor == matrix.name:
            return matrix
        stride = self.views[f"{matrix.module}.{matrix.parameter}"].stride[0]
        return replace(matrix, start=matrix.start - self.part.first * stride)

    def has(self, matrix: Matrix) -> bool:
        """Whether the matrix's weight is loaded."""
        part = self.part
        if matrix.tensor not in self.stored or part is None or matrix.expert is None or matrix.module != part.path:
            return matrix.tensor in self.stored
        return part.first <= matrix.expert < part.stop
