"""What blocks are called with beside their hidden states, and the proof that these go from block to block as a chain.

A walk hands each block what the block before it put out. That is right only for a model that does so itself: it calls
every block once, in order, with the very output of the one before, and its head works on the output of the last. Stubs
prove it: each hands on random numbers, which must arrive unchanged at the next one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lowmem_wanda.errors import BudgetError, ModelError
from lowmem_wanda.streaming.stubs import Compared, fresh, merged

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments beside the hidden states


class Beside:
    """What a stub gives where its block gives more than hidden states. No block may be called with one."""


class Calls:
    """The calls of the `depth` blocks at `path`, for all micro-batches.

    Micro-batches of one shape share them, but for arguments that depend on the tokens: those are kept for each
    micro-batch, and take `own_bytes` bytes so far.
    """

    def __init__(self, path: str, depth: int, device: torch.device) -> None:
        self.path, self.depth = path, depth
        self._random = torch.Generator(device)
        self.own_bytes = 0
        self._shared: dict[tuple[int, ...], list[Call]] = {}
        self._own: dict[int, list[Call]] = {}
        self._storages: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """A forward of the model begins."""
        self.now: list[Call] = []
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
        self.now.append(fresh(call))

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

    def require_room(self, done: int, count: int, left: Callable[[], int]) -> None:
        """Raises BudgetError if arguments that depend on the tokens will take more than half of the memory `left`.

        They are kept for `done` of `count` micro-batches so far.
        """
        needed = self.own_bytes * count // done
        if needed and needed * (count - done) // count > max(left(), 0) // 2:
            raise BudgetError(
                f"{self.path}: its blocks are called with values for each token, which take {needed / 1e6:.0f} MB in "
                "all, more than half of the memory that is left: give fewer or shorter sequences (--sequences --length)"
            )

    def of(self, states: torch.Tensor, index: int) -> Call:
        """What a block is called with for a micro-batch."""
        calls = self._own.get(states.data_ptr()) or self._shared[tuple(states.shape[:2])]
        call: Call = fresh(calls[index])
        return call

    def clear(self) -> None:
        """Forgets all calls."""
        self._shared.clear()
        self._own.clear()
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
