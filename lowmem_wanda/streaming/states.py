"""The place of the hidden states."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lowmem_wanda.checkpoint.writer import PARTIAL, explained, preallocate
from lowmem_wanda.streaming.resources import host_memory

Bytes = Callable[[int], None]  # called with a number of bytes


@contextmanager
def hidden_states(
    place: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path, not_locked: Bytes
) -> Iterator[torch.Tensor]:
    """Gives uninitialised hidden states on the "device", on the "host" beside a GPU (page-locked) or in a "file".

    The file has no name in `folder` while it is used. `not_locked` is that of `host_memory`. Raises OutputError.
    """
    numel = math.prod(shape)
    if place == "device":
        yield torch.empty(shape, dtype=dtype, device=device)
    elif place == "host":
        with host_memory(numel * dtype.itemsize, device, not_locked) as memory:
            yield memory.view(dtype).view(shape)
    else:
        path = folder / f".hidden-states{PARTIAL}"
        with explained(path):
            try:
                with open(path, "wb") as file:
                    file.truncate(numel * dtype.itemsize)
                    preallocate(file.fileno(), numel * dtype.itemsize)  # else a page without room raises SIGBUS
                memory = torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
            finally:
                with suppress(OSError):  # Windows keeps the name of an open file; the next run removes it
                    path.unlink()
        yield memory.view(shape)
