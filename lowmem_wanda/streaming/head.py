"""The model's head on final hidden states, a slice of the vocabulary and some tokens at a time.

Logits never exist whole: 2048 tokens of a vocabulary of 128k would take 1 GB in float32. The model's own forward makes
them, with its own scales and soft caps. Only its last linear is changed: it works on some rows of its weight.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.buffers import read_cast
from lowmem_wanda.streaming.decoder import Decoder
from lowmem_wanda.streaming.skeleton import Skeleton

LEAST, MOST = 16 << 20, 1 << 30  # bytes of a head: half of the largest block, within these limits


class Head:
    """The head of a decoder, in about `nbytes` bytes. Raises ModelError where logits do not come from a linear."""

    def __init__(self, decoder: Decoder, nbytes: int) -> None:
        self.decoder, self.linear = decoder, head_linear(decoder.skeleton)
        paths = {id(module): path for path, module in decoder.skeleton.model.named_modules()}
        path, files = paths[id(self.linear)], decoder.tensors
        names = decoder.skeleton.names
        self._weight = files[names[f"{path}.weight"].tensor]
        self._bias = files[names[f"{path}.bias"].tensor] if f"{path}.bias" in names else None
        rows, width = self._weight.shape
        row = width * decoder.dtype.itemsize
        self.rows = min(rows, max(1, nbytes // 4 // row))
        self.tokens = max(1, nbytes // 16 // max(row, 4 * self.rows))
        self._memory = torch.empty(self.rows, width, dtype=decoder.dtype, device=decoder.device)
        self._extra = torch.empty(self.rows, dtype=decoder.dtype, device=decoder.device)

    def slices(self) -> Iterator[slice]:
        """Yields the vocabulary in slices. The head's rows of a slice stay loaded until the next slice."""
        for start in range(0, self._weight.shape[0], self.rows):
            piece = slice(start, min(start + self.rows, self._weight.shape[0]))
            self.load(piece)
            yield piece

    def load(self, piece: slice) -> None:
        """Loads the head's rows of the ids in `piece`."""
        size = piece.stop - piece.start
        weight = read_cast(rows_of(self._weight, piece), self._memory[:size])
        bias = read_cast(rows_of(self._bias, piece), self._extra[:size]) if self._bias else None
        self.linear.forward = partial(nn.functional.linear, weight=weight, bias=bias)  # type: ignore[method-assign]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits (tokens, loaded ids), float32, for final hidden states (tokens, width)."""
        return self.decoder.finish(hidden[:, None]).reshape(len(hidden), -1).float()

    def close(self) -> None:
        """Takes the head's weights out of the model again."""
        self.linear.__dict__.pop("forward", None)
        self.decoder.empty()


def head_linear(skeleton: Skeleton) -> nn.Linear:
    """The linear that logits come from. Raises ModelError where they come from something else."""
    if not isinstance(linear := skeleton.head, nn.Linear):
        raise ModelError(
            f"{type(skeleton.model).__name__}: its logits do not come from a linear, so they are not evaluated"
        )
    return linear


def head_bytes(block_bytes: int) -> int:
    """The bytes that a head takes: half of `block_bytes`, those of the largest block, which are free by then."""
    return min(max(block_bytes // 2, LEAST), MOST)


def rows_of(tensor: Tensor, piece: slice) -> Tensor:
    """The rows `piece` of a file tensor, as a file tensor of their own."""
    row = tensor.nbytes // tensor.shape[0]
    size = piece.stop - piece.start
    return replace(tensor, shape=(size, *tensor.shape[1:]), offset=tensor.offset + piece.start * row, nbytes=size * row)
