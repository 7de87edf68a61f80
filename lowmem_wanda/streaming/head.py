"""The model's head on final hidden states, a slice of the vocabulary and some tokens at a time.

Logits never exist whole: 2048 tokens of a vocabulary of 128k would take 1 GB in float32. The model's own
forward makes them, so that what it does to logits (scales, soft caps) is its own; only its last linear works
on some rows of its weight.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.decoder import Decoder
from lowmem_wanda.streaming.skeleton import Hollow
from lowmem_wanda.streaming.tensors import read_cast

LEAST, MOST = 16 << 20, 1 << 30  # bytes that a head may take; between these, half of a block


class Head:
    """The head of a decoder, in about `budget` bytes. Raises ModelError where its logits do not come from a linear."""

    def __init__(self, decoder: Decoder, budget: int) -> None:
        self.decoder, self.linear = decoder, head_linear(decoder.hollow)
        names = {id(module): path for path, module in decoder.hollow.model.named_modules()}
        path, files = names[id(self.linear)], decoder.tensors
        self._weight = files[decoder.hollow.names[f"{path}.weight"]]
        self._bias = files.get(decoder.hollow.names.get(f"{path}.bias", ""))
        rows, width = self._weight.shape
        row = width * decoder.dtype.itemsize
        self.rows = min(rows, max(1, budget // 4 // row))
        self.tokens = max(1, budget // 16 // max(row, 4 * self.rows))
        self._memory = torch.empty(self.rows, width, dtype=decoder.dtype, device=decoder.device)
        self._extra = torch.empty(self.rows, dtype=decoder.dtype, device=decoder.device)

    def slices(self) -> Iterator[slice]:
        """The vocabulary in pieces; of each the head's rows are loaded while it is the last one given."""
        for start in range(0, self._weight.shape[0], self.rows):
            piece = slice(start, min(start + self.rows, self._weight.shape[0]))
            self.load(piece)
            yield piece

    def load(self, piece: slice) -> None:
        """Loads the rows of some ids."""
        size = piece.stop - piece.start
        weight = read_cast(rows_of(self._weight, piece), self._memory[:size])
        bias = read_cast(rows_of(self._bias, piece), self._extra[:size]) if self._bias else None
        self.linear.forward = partial(nn.functional.linear, weight=weight, bias=bias)  # type: ignore[method-assign]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits (tokens, loaded ids) in float32 for final hidden states (tokens, width)."""
        return self.decoder.finish(hidden[None]).reshape(len(hidden), -1).float()

    def close(self) -> None:
        """Takes the weights away again."""
        self.linear.__dict__.pop("forward", None)
        self.decoder.empty()


def head_linear(hollow: Hollow) -> nn.Linear:
    """The linear that logits come from. Raises ModelError where there is none."""
    if not isinstance(linear := hollow.head, nn.Linear):
        raise ModelError(f"{type(hollow.model).__name__}: its logits do not come from a linear, so they are not scored")
    return linear


def budget_of(block_bytes: int) -> int:
    """Bytes that a head may take beside a model whose largest block, which is gone by then, took so many."""
    return min(max(block_bytes // 2, LEAST), MOST)


def rows_of(tensor: Tensor, piece: slice) -> Tensor:
    """Where some rows of a file tensor lie."""
    row = tensor.nbytes // tensor.shape[0]
    size = piece.stop - piece.start
    return replace(tensor, shape=(size, *tensor.shape[1:]), offset=tensor.offset + piece.start * row, nbytes=size * row)
