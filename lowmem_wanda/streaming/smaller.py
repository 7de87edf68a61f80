"""A loaded block with some of its experts: the smaller model's own module, on the weights of the whole block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.casts import Casts
from lowmem_wanda.streaming.expert_layout import ExpertLayout
from lowmem_wanda.streaming.experts import expert_parameters, is_experts
from lowmem_wanda.streaming.outside import get, put
from lowmem_wanda.streaming.skeleton import Skeleton


class Smaller:
    """Gives blocks of a model with fewer experts, whose skeleton is `skeleton`, the weights of the whole blocks.

    Experts stay where they are: the smaller module is told the places of those that are kept. What has a row for each
    of them, as the router does, is copied. `layout` is that of the checkpoint that is computed with.
    """

    def __init__(self, skeleton: Skeleton, layout: ExpertLayout, device: torch.device, dtype: torch.dtype) -> None:
        self.skeleton, self.layout = skeleton, layout
        self._casts = Casts(device, dtype)

    @contextmanager
    def block(self, whole: Block, kept: Sequence[int]) -> Iterator[Block]:
        """The smaller block within the context, in place of a whole one that is loaded."""
        module, views = self.skeleton.blocks[whole.index], self.skeleton.views[whole.index]
        owners = {matrix.module for matrix in whole.matrices}
        stacks = dict(_stacks(module))
        stored = self._stored(whole, kept)
        self._casts.load(module, {name: view for name, view in views.items() if name not in stacks}, stored, owners)
        for name, path in stacks.items():
            put(module, name, get(whole.module, name))
            module.get_submodule(path).__dict__["places"] = list(kept)
        for name, buffer in module.named_buffers():
            if name not in views:
                put(module, name, buffer.to(whole.device))
        try:
            yield whole.like(module, stored, views)
        finally:
            for path in set(stacks.values()):
                del module.get_submodule(path).__dict__["places"]
            self._casts.release(module, owners)
            for name in views:
                put(module, name, get(module, name).to("meta"))

    def _stored(self, whole: Block, kept: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """The stored tensors of a block, those with rows for experts without the rows of the others."""
        found = {}
        for name, tensor in whole.stored.items():
            rows = self.layout.rows.get(name)
            if rows is not None and tensor.ndim < 3:
                wanted = self.layout.left(rows, kept)
                found[name] = tensor.index_select(rows.axis, torch.tensor(wanted, device=tensor.device))
            elif rows is None and name not in self.layout.members:
                found[name] = tensor
        return found


def _stacks(block: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields (parameter of all experts, path of its module) of a block."""
    for path, module in block.named_modules():
        if is_experts(module):
            for name in expert_parameters(module):
                yield f"{path}.{name}", path
                if module.has_bias:
                    yield f"{path}.{name}_bias", path
