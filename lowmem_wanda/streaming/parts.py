"""Parts of a block: all but its experts, and its experts in groups, so that a block may be larger than memory.

A part is read, computed and written as a block is. Where experts lie is known from the views of their parameters; those
whose experts do not lie one after the other in memory stay with the rest of their block.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from lowmem_wanda.checkpoint.reader import ITEMSIZE, Tensor
from lowmem_wanda.streaming.buffers import Piece, pieces_bytes
from lowmem_wanda.streaming.experts import expert_parameters, is_experts
from lowmem_wanda.streaming.layout import View


@dataclass(frozen=True)
class Part:
    """What is read at a time: `pieces` of file tensors, or of parts of them.

    A group is of the experts from `first` on, up to `stop`, of the module `path` in the block; the rest has no path.
    """

    pieces: tuple[Piece, ...]
    path: str = ""
    first: int = 0
    stop: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in a buffer."""
        return pieces_bytes(self.pieces)


def parts_of(block: nn.Module, views: Mapping[str, View], tensors: Mapping[str, Tensor], limit: int) -> list[Part]:
    """The parts of a block whose parameters, relative to it, are `views` of file `tensors`.

    The first is the rest of the block. The groups follow in the order of their modules and experts, each of as many
    experts as take at most `limit` bytes, but one at least. Without a limit (0), and where all of the block is within
    it, the block is one part.
    """
    every = {view.tensors for view in views.values()}
    whole = Part(tuple(tuple(tensors[name] for name in names) for names in sorted(every)))
    if not limit or whole.nbytes <= limit:
        return [whole]
    stacks = {path: found for path, module in block.named_modules() if (found := _stacks(path, module, views, tensors))}
    grouped = {view.tensors for found in stacks.values() for view in found}
    rest = tuple(tuple(tensors[name] for name in names) for names in sorted(every - grouped))
    parts = [Part(rest)]
    for path, found in stacks.items():
        count = found[0].shape[0]
        one = sum(view.stride[0] * ITEMSIZE[tensors[view.tensor].dtype] for view in found)
        step = min(count, max(1, limit // one))
        for first in range(0, count, step):
            stop = min(count, first + step)
            pieces = tuple(_slice(view, first, stop, tensors) for view in found)
            parts.append(Part(pieces, path, first, stop))
    return parts


def _stacks(path: str, module: nn.Module, views: Mapping[str, View], tensors: Mapping[str, Tensor]) -> list[View]:
    """The views of the stacks of a module of experts; [] for any other module, and where experts lie mixed."""
    if not is_experts(module):
        return []
    found = [views[f"{path}.{name}"] for name in expert_parameters(module)]
    return found if all(_is_packed(view, tensors) for view in found) else []


def _is_packed(view: View, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the experts of a stack lie one after the other, each in tensors of its own or all in one."""
    count = view.shape[0]
    apart = len(view.tensors) % count == 0 if len(view.tensors) > 1 else tensors[view.tensor].shape[0] == count
    return apart and view.stride[0] * count == view.numel and not view.offset


def _slice(view: View, first: int, stop: int, tensors: Mapping[str, Tensor]) -> Piece:
    """The file tensors, or the part of the only one, that hold some experts of a stack."""
    count = view.shape[0]
    if len(view.tensors) > 1:
        each = len(view.tensors) // count
        return tuple(tensors[name] for name in view.tensors[first * each : stop * each])
    return (slice_of(tensors[view.tensor], first, stop),)


def slice_of(tensor: Tensor, first: int, stop: int) -> Tensor:
    """The part of a tensor that holds the first dimension from `first` up to `stop`, as a tensor of its own."""
    row = tensor.nbytes // tensor.shape[0]
    shape = (stop - first, *tensor.shape[1:])
    return replace(tensor, shape=shape, offset=tensor.offset + first * row, nbytes=(stop - first) * row)


def group_view(view: View, part: Part) -> View:
    """The view of the experts of a part in its own tensors."""
    names = tuple(view.tensors)
    if len(names) > 1:
        each = len(names) // view.shape[0]
        names = names[part.first * each : part.stop * each]
    return View(names, (part.stop - part.first, *view.shape[1:]), view.stride)
