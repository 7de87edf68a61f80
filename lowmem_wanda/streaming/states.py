"""Where hidden states lie: on the device, on the host beside a GPU, or in a file."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lowmem_wanda.checkpoint.system import preallocate
from lowmem_wanda.checkpoint.writer import PARTIAL, explained
from lowmem_wanda.streaming.resources import host_memory


@contextmanager
def hidden_states(
    place: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path
) -> Iterator[torch.Tensor]:
    """Uninitialised hidden states on the "device", the "host" or in a "file". Raises OutputError where the disk is
    too full for the file.

    The file has no name in `folder` while it is used, so that nothing is left of it after a kill.
    """
    numel = math.prod(shape)
    if place == "device":
        yield torch.empty(shape, dtype=dtype, device=device)
    elif place == "host":
        with host_memory(numel * dtype.itemsize, device) as memory:
            yield memory.view(dtype).view(shape)
    else:
        path = folder / f".hidden-states{PARTIAL}"
        with explained(path):
            with open(path, "wb") as file:
                file.truncate(numel * dtype.itemsize)
                # a page that the full disk has no place for would kill with SIGBUS
                preallocate(file.fileno(), numel * dtype.itemsize)
            memory = torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
            with suppress(PermissionError):  # Windows keeps the name of an open file; the next run clears it away
                path.unlink()
        yield memory.view(shape)
