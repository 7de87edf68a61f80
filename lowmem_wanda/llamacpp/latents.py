"""The inputs of a matrix that llama.cpp's converter splits: it expands the latent of attention's keys and values.

transformers computes keys and values W c of a latent c, for each head K c and V c. llama.cpp never expands them: it
gives K transposed the head's query (without its rotary part), and V what attention makes of the latents, P c. Both are
measured where transformers computes attention: the query as it is, P c by attention with latents in place of values.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.attention import Again, attention_watched
from lowmem_wanda.streaming.block import Block


class Latents:
    """The sums over the inputs of the two parts of each of the block's `modules`, paths of linears.

    `sums` are {path: (keys' part, values' part)}, each (heads * inputs,). A path is missing where the block's keys and
    values are not views of what the linear puts out, head by head, keys first; then nothing is known of its parts.
    """

    def __init__(self, block: Block, modules: Sequence[str]) -> None:
        self.block, self.modules, self.paused = block, modules, False
        self.sums: dict[str, tuple[SquaredNorm, SquaredNorm]] = {}
        self._arrived: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}  # by memory: path, latents, what came out

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watches the block and adds the inputs of every run to the sums."""
        with ExitStack() as stack:
            for path in self.modules:
                module = self.block.module.get_submodule(path)
                stack.callback(module.register_forward_hook(partial(self._expanded, path)).remove)
            if self.modules:
                stack.enter_context(attention_watched(self._attended))
            yield
        self._arrived.clear()

    def _expanded(self, path: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not self.paused:
            self._arrived[output.untyped_storage().data_ptr()] = path, inputs[0], output

    def _attended(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, again: Again
    ) -> None:
        path, latents, output = self._arrived.pop(value.untyped_storage().data_ptr(), ("", value, value))
        if not path or self.paused or not _is_headwise(query, key, value, output):
            return
        count, heads, length, width = value.shape
        inner, columns = output.shape[-1] // heads - width, latents.shape[-1]
        if path not in self.sums:
            sizes = heads * inner, heads * columns
            self.sums[path] = tuple(SquaredNorm(size, self.block.device) for size in sizes)  # type: ignore[assignment]
        keys, values = self.sums[path]
        keys.add(query[..., :inner].transpose(1, 2).reshape(-1, heads * inner))
        spread = latents.reshape(count, 1, length, columns).expand(-1, heads, -1, -1)
        made = [again(spread[..., at : at + width]) for at in range(0, columns, width)]  # (count, length, heads, width)
        values.add(torch.cat(made, dim=-1).reshape(-1, heads * columns))


def _is_headwise(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a linear's output holds, head by head, the beginning of that head's keys and then its values."""
    count, heads, length, width = value.shape
    row, rows = output.shape[-1], output.reshape(-1, output.shape[-1])
    inner = row // heads - width
    strides = (length * row, row // heads, row, 1)
    known = row % heads == 0 and 0 < inner <= min(key.shape[-1], query.shape[-1]) and len(rows) == count * length
    if not known or query.shape[:3] != value.shape[:3] or not output.is_contiguous():
        return False
    if any(size > 1 and step != other for size, step, other in zip(value.shape, value.stride(), strides, strict=True)):
        return False
    split = rows.view(count, length, heads, row // heads)[:, 0]  # (count, heads, inner + width)
    return torch.equal(split[..., :inner], key[:, :, 0, :inner]) and torch.equal(split[..., inner:], value[:, :, 0])
