"""Memory of micro-batches that wait at experts: on the host until it is their turn, so that a GPU holds less of it.

What a micro-batch waits with lies in local variables of the model's own code. Its tensors stay what they are; their
memory is given back while they wait, and filled again before the code goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowmem_wanda.streaming.flows import current


class Parking:
    """Places on the host, which `allocate` makes of a number of bytes (uint8) and which are used again and again."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: list[torch.Tensor] = []
        self._moved: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def of(self, hidden: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
        """Gives a copy of a micro-batch's hidden states on the device, which need no place while they wait."""
        flow = current()
        copy = hidden.to(device, non_blocking=device.type == "cuda", copy=True)
        self._moved[flow] = copy, hidden
        try:
            yield copy
        finally:
            del self._moved[flow]

    @contextmanager
    def parked(self, *tensors: torch.Tensor) -> Iterator[None]:
        """The memory of tensors of this micro-batch, and of its hidden states, is free within the context."""
        copy, hidden = self._moved[current()]
        places = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        places.pop(copy.untyped_storage().data_ptr(), None)
        parked = [(storage, _bytes(storage, copy.device), self._taken(storage.nbytes())) for storage in places.values()]
        for storage, content, place in parked:
            place[: len(content)].copy_(content)
            storage.resize_(0)
        copy.untyped_storage().resize_(0)
        try:
            yield
        finally:
            copy.untyped_storage().resize_(copy.numel() * copy.itemsize)
            copy.copy_(hidden)
            for storage, content, place in parked:
                storage.resize_(len(content))
                _bytes(storage, copy.device).copy_(place[: len(content)])
                self._free.append(place)

    def _taken(self, nbytes: int) -> torch.Tensor:
        """A place that is free and large enough."""
        found = next((place for place in self._free if len(place) >= nbytes), None)
        if found is None:
            return self._allocate(nbytes)
        self._free = [place for place in self._free if place is not found]
        return found


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """All bytes of a storage (uint8)."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # type: ignore[call-overload, no-any-return]
