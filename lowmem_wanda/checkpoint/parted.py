"""A shard that is written in parts, in any order, to the bytes that `write_shard` would write."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lowmem_wanda.checkpoint.checksum import FASTEST, digest_of
from lowmem_wanda.checkpoint.reader import ITEMSIZE, Tensor
from lowmem_wanda.checkpoint.writer import (
    PARTIAL,
    ShardFile,
    explained,
    layout,
    preallocate,
    require_finite,
    sync_directory,
)
from lowmem_wanda.errors import OutputError


class PartedShard:
    """The shard at `path` of all `tensors`, which appears there when it is finished.

    What was written of one that is not finished is removed when the job goes on.
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}{PARTIAL}")
        self._left = sum(tensor.nbytes for tensor in tensors)
        begin, self._starts, self._size = layout(sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype]))
        with explained(path):
            self._file = open(self._partial, "wb")  # noqa: SIM115 - parts are written by calls
            preallocate(self._file.fileno(), self._size)
            self._file.write(begin)

    def write(self, tensor: Tensor, start: int, pieces: Iterable[memoryview], looks: bool) -> None:
        """Writes bytes of a tensor from its byte `start` on. Raises OutputError, and if it `looks`, NumberError."""
        with explained(self.path):
            self._file.seek(self._starts[tensor.name] + start)
            for piece in pieces:
                if looks:
                    require_finite(tensor, piece)
                self._file.write(piece)
                self._left -= len(piece)

    def close(self) -> None:
        """Closes the file where it was not finished; it has no name yet."""
        self._file.close()

    def finish(self) -> ShardFile:
        """Gives the file its name. Raises OutputError unless all of it was written."""
        if self._left:
            raise OutputError(f"{self.path.name}: {self._left} of its bytes were not written; report this bug")
        with explained(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            digest = digest_of(self._partial, FASTEST)
            os.replace(self._partial, self.path)
            sync_directory(self.path.parent)
        return ShardFile(self.path.name, self._size, {FASTEST: digest})
