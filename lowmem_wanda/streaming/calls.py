"""What blocks are called with beside their hidden states, and the proof that these go from block to block as a chain.

A walk hands each block what the block before it put out. That is right only for a model that does so itself: it calls
every block once, in order, with the very output of the one before, and its head works on the output of the last. Stubs
prove it: each hands on random numbers, which must arrive unchanged at the next one.
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_wanda.errors import BudgetError, ModelError
from lowmem_wanda.streaming.stubs import Compared, fresh, merged

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments beside the hidden states


class Beside:
    """What a stub gives where its block gives more than hidden states. No block may be called with one."""


@dataclass(frozen=True)
class Board:
    """Stands for an empty mapping that a model hands to several blocks, where some write what later ones read.

    Gemma 4 and Gemma 3n share keys and values of attention so.
    """

    number: int


class Calls:
    """The calls of the `depth` blocks at `path`, for all micro-batches.

    Micro-batches of one shape share them, but for arguments that depend on the tokens: those are kept for each
    micro-batch, and take `own_bytes` bytes so far. Each micro-batch has boards of its own.
    """

    def __init__(self, path: str, depth: int, device: torch.device) -> None:
        self.path, self.depth = path, depth
        self._random = torch.Generator(device)
        self.own_bytes = 0
        self._shared: dict[tuple[int, ...], list[Call]] = {}
        self._own: dict[int, list[Call]] = {}
        self._storages: set[int] = set()
        self._empty: list[Any] = []  # boards on which nothing is written
        self._boards: dict[tuple[int, int], Any] = {}
        self.begin()

    def begin(self) -> None:
        """A forward of the model begins."""
        self.now: list[Call] = []
        self._seen: list[Any] = []  # the boards of this forward
        self.handed: torch.Tensor | None = None
        self.first: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether this forward has called all blocks."""
        return len(self.now) == self.depth

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields the tensors in this forward's calls."""
        yield from (value for call in self.now for value in _leaves(call) if isinstance(value, torch.Tensor))

    def arrive(self, index: int, hidden: torch.Tensor, call: Call) -> None:
        """A block is called. Raises ModelError if it is not its turn, or if these are not the states of the one before.

        Without a call before it, `hidden` are the states that the walk begins with.
        """
        if index != len(self.now):
            order = "again" if index < len(self.now) else f"before {self.path}.{len(self.now)}"
            raise ModelError(
                f"{self.path}.{index}: is called {order} in one forward; only models whose blocks are called once each "
                "and in order are supported"
            )
        if self.handed is not None and not _same(hidden, self.handed):
            raise ModelError(
                f"{self.path}.{index}: is not called with what {self.path}.{index - 1} puts out, so the blocks "
                "cannot be run one after the other; it is not supported"
            )
        if any(isinstance(value, Beside) for value in _leaves(call)):
            raise ModelError(
                f"{self.path}.{index}: is called with what a block before it gives beside its hidden states, which is "
                "not supported yet"
            )
        if self.first is None:
            self.first = hidden
        args, kwargs = call
        self.now.append(
            fresh((tuple(map(self._marked, args)), {key: self._marked(one) for key, one in kwargs.items()}))
        )

    def _marked(self, value: Any) -> Any:
        """The argument of a block, or what stands for it if it is a board. Raises ModelError."""
        number = next((number for number, board in enumerate(self._seen) if board is value), len(self._seen))
        if number == len(self._seen) and (not isinstance(value, MutableMapping) or value):
            return value
        if value:
            raise ModelError(
                f"{self.path}.{len(self.now)}: is called with a mapping that the model itself writes on between its "
                "blocks, which is not supported yet"
            )
        if number == len(self._seen):
            self._seen.append(value)
            self._empty += [copy.copy(value)] if number == len(self._empty) else []
        return Board(number)

    def hand_on(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the stub that was called last puts out: random numbers in the shape of `hidden`."""
        self.handed = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        return self.handed.normal_(generator=self._random)

    def require_equal(self, calls: list[Call]) -> None:
        """Raises ModelError if these calls, of another forward of the same tokens, are not this one's.

        Then they depend on what blocks put out, which is another thing in every forward on stubs.
        """
        compared: Compared = {}
        for index, (one, other) in enumerate(zip(calls, self.now, strict=True)):
            if merged(one, other, compared) is not one:
                raise ModelError(
                    f"{self.path}.{index}: what it is called with depends on what the blocks before it put "
                    "out, which is not supported yet"
                )

    def keep(self, states: torch.Tensor) -> None:
        """Keeps this forward's calls for the micro-batch `states` (sequences, length, width)."""
        kept = self._shared.setdefault(tuple(states.shape[:2]), self.now)
        compared: Compared = {}
        calls = [merged(one, other, compared) for one, other in zip(kept, self.now, strict=True)]
        if any(new is not old for new, old in zip(calls, kept, strict=True)):
            self._own[states.data_ptr()] = calls
            known = {_storage(value) for call in kept for value in _leaves(call) if isinstance(value, torch.Tensor)}
            for call in calls:
                self._count(call, known)
        self.begin()

    def require_room(self, done: int, count: int, left: Callable[[], int], boards: int) -> None:
        """Raises BudgetError if arguments that depend on the tokens will take more than half of the memory `left`.

        They are kept for `done` of `count` micro-batches so far; `boards` are the bytes of what blocks will write.
        """
        needed = self.own_bytes * count // done + boards
        if needed and self.own_bytes * (count - done) // done + boards > max(left(), 0) // 2:
            raise BudgetError(
                f"{self.path}: its blocks are called with values for each token, which take {needed / 1e6:.0f} MB in "
                "all, more than half of the memory that is left: give fewer or shorter sequences (--sequences --length)"
            )

    def of(self, states: torch.Tensor, index: int) -> Call:
        """What a block is called with for a micro-batch."""
        calls = self._own.get(states.data_ptr()) or self._shared[tuple(states.shape[:2])]
        return self.with_boards(calls[index], states.data_ptr())

    def with_boards(self, call: Call, whose: int = 0) -> Call:
        """A call with the boards of a micro-batch, or those of blocks that are traced."""

        def board(value: Any) -> Any:
            if not isinstance(value, Board):
                return value
            return self._boards.setdefault((whose, value.number), copy.copy(self._empty[value.number]))

        args, kwargs = fresh(call)
        return tuple(map(board, args)), {key: board(value) for key, value in kwargs.items()}

    def traced_bytes(self) -> int:
        """The bytes of what traced blocks have written on their boards."""
        written = (value for (whose, _), board in self._boards.items() if not whose for value in _leaves(dict(board)))
        return sum(value.nbytes for value in written if isinstance(value, torch.Tensor))

    def clear(self) -> None:
        """Forgets all calls."""
        self._shared.clear()
        self._own.clear()
        self._boards.clear()
        self.begin()

    def _count(self, call: Call, known: set[int]) -> None:
        for value in _leaves(call):
            if isinstance(value, torch.Tensor) and (place := _storage(value)) not in known | self._storages:
                self._storages.add(place)
                self.own_bytes += value.untyped_storage().nbytes()


def _same(hidden: torch.Tensor, handed: torch.Tensor) -> bool:
    return hidden is handed or (hidden.shape == handed.shape and torch.equal(hidden.to(handed.dtype), handed))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _leaves(value: Any) -> Iterator[Any]:
    """Yields what is in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value
