"""Tensors without some of their slices, whose bytes are the source's, and the checkpoint that they make."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem_wanda.checkpoint.directory import CONFIG, Checkpoint
from lowmem_wanda.checkpoint.reader import PIECE, Tensor, in_pieces, opened
from lowmem_wanda.errors import CheckpointError

MEMBER = re.compile(r"(.*\bexperts\.(?:expert_)?)(\d+)(\..*)")  # the name of a tensor of one expert
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
Span = tuple[int, int]  # bytes of a tensor, from the first up to the second


@dataclass(frozen=True)
class Cut(Tensor):
    """What is left of a `whole` tensor: the bytes of its `spans`, one after the other.

    `offset` counts its own bytes, from where the whole one begins.
    """

    whole: Tensor | None = None
    spans: tuple[Span, ...] = ()

    @property
    def is_made(self) -> bool:
        """True: its bytes lie apart."""
        return True

    def pieces(self, size: int = PIECE, spans: Sequence[Span] | None = None) -> Iterator[bytearray]:
        """Yields its bytes as `Tensor` does."""
        assert self.whole is not None
        begin = self.offset - self.whole.offset
        for start, stop in ((0, self.nbytes),) if spans is None else spans:
            wanted = list(within(self.spans, begin + start, begin + stop))
            yield from in_pieces(self.whole.pieces(size, wanted), stop - start, size)


def within(spans: Iterable[Span], start: int, stop: int) -> Iterator[Span]:
    """Yields the parts of spans that hold the bytes from `start` up to `stop` of all of them together."""
    at = 0
    for first, last in spans:
        low, high = max(start, at), min(stop, at + last - first)
        if low < high:
            yield first + low - at, first + high - at
        at += last - first


def cut(tensor: Tensor, axis: int, rows: Sequence[int]) -> Cut:
    """The slices `rows`, in ascending order, of a tensor along an axis."""
    size = tensor.shape[axis]
    inner = tensor.nbytes // max(1, math.prod(tensor.shape[: axis + 1]))
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    outer = range(math.prod(tensor.shape[:axis]))
    spans = tuple(((at * size + first) * inner, (at * size + last) * inner) for at in outer for first, last in runs)
    shape = (*tensor.shape[:axis], len(rows), *tensor.shape[axis + 1 :])
    nbytes = sum(last - first for first, last in spans)
    return Cut(tensor.name, tensor.file, tensor.dtype, shape, tensor.offset, nbytes, tensor.stamp, tensor, spans)


def renamed(tensor: Tensor, expert: int) -> Tensor:
    """A tensor of one expert with another number in its name."""
    match = MEMBER.fullmatch(tensor.name)
    assert match is not None
    return replace(tensor, name=f"{match[1]}{expert}{match[3]}")


def stem_of(name: str) -> tuple[str, int, str]:
    """A name up to its first number, that number, and what follows; ("", -1, name) without one."""
    match = NUMBER.search(name)
    return (name[: match.start(1)], int(match[1]), name[match.end() + 1 :]) if match else ("", -1, name)


class CutCheckpoint(Checkpoint):
    """A `source` with other `tensors`, and the text of a config.json that describes them."""

    def __init__(self, source: Checkpoint, tensors: Mapping[str, Tensor], text: str) -> None:
        self.path, self.files, self.dequantized = source.path, source.files, source.dequantized
        self.tensors = dict(tensors)
        self._text = text

    def config(self) -> dict[str, Any]:
        """The content of its config.json, without what it says of quantization where that is undone."""
        content: dict[str, Any] = json.loads(self._text)
        if self.dequantized:
            del content["quantization_config"]
        return content

    def written_config(self) -> bytes:
        """The config.json to write."""
        return super().written_config() if self.dequantized else self._text.encode()  # type: ignore[return-value]


def config_text(checkpoint: Checkpoint) -> str:
    """The text of a checkpoint's config.json. Raises CheckpointError."""
    with opened(checkpoint.path / CONFIG) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise CheckpointError(f"{CONFIG}: is not UTF-8; download it again") from None


def changed_text(text: str, path: Sequence[str], value: int) -> str:
    """The text of a JSON object with another whole number at a path of keys, and all else as it was.

    Raises CheckpointError where it cannot be found in the text.
    """
    wanted = json.loads(text)
    place = wanted
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    for found in re.finditer(rf"{re.escape(json.dumps(path[-1]))}\s*:\s*(\d+)", text):
        made = text[: found.start(1)] + str(value) + text[found.end(1) :]
        if json.loads(made) == wanted:
            return made
    raise CheckpointError(f"{CONFIG}: {'.'.join(path)} is written in an unusual way; save it with transformers again")


def numbers_in(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yields (path of keys, whole number) of all whole numbers in nested objects."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if type(value) is int:
            yield (*path, key), value
        else:
            yield from numbers_in(value, (*path, key))
