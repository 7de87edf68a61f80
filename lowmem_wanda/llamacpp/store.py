"""The sums of an importance matrix on the disk, block by block, until all blocks are done."""

import hashlib
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lowmem_wanda.checkpoint.output import LOCK, exclusive
from lowmem_wanda.checkpoint.reader import Tensor, read_header
from lowmem_wanda.checkpoint.writer import PARTIAL, require_new, write_shard
from lowmem_wanda.errors import CheckpointError, OutputError
from lowmem_wanda.llamacpp.imatrix import Entry

SUMS, COUNTS, STORED = ".sums", ".counts", ".imatrix"
# names in the folder of sums: the store, its files, hidden states, the lock
LEFT = re.compile(rf"{STORED}|\.?\d{{5,}}-[0-9a-f]{{16}}\.safetensors({PARTIAL})?|\.hidden-states{PARTIAL}|{LOCK}")


class Store:
    """The entries of finished blocks, one file for each, in a hidden directory of the output.

    Entries that were stored under another `key`, such as another calibration, count as missing.
    """

    def __init__(self, folder: Path, key: str = "") -> None:
        self.path = folder / STORED
        self._mark = hashlib.sha256(key.encode()).hexdigest()[:16]

    def has(self, index: int) -> bool:
        """Whether the entries of a block are stored."""
        return self._file(index).exists()

    def put(self, index: int, entries: Mapping[str, Entry]) -> None:
        """Stores the entries of a block, {matrix: entry}."""
        arrays = {name + SUMS: entry.sums.astype("<f8") for name, entry in entries.items()}
        counts = {name + COUNTS: entry.counts.astype("<i8") for name, entry in entries.items()}
        kinds = dict.fromkeys(arrays, "F64") | dict.fromkeys(counts, "I64")
        self.path.mkdir(exist_ok=True)
        file = self._file(index)
        tensors = [
            (Tensor(name, file, kinds[name], array.shape, 0, array.nbytes), [array.tobytes()])
            for name, array in {**arrays, **counts}.items()
        ]
        write_shard(file, tensors)

    def get(self, index: int, names: Collection[str]) -> dict[str, Entry]:
        """{matrix: entry} for the matrices `names` of a block. Raises CheckpointError and removes a damaged file."""
        try:
            found = read_header(self._file(index))
            return {name: Entry(_array(found[name + SUMS]), _array(found[name + COUNTS])) for name in names}
        except (CheckpointError, KeyError):
            self._file(index).unlink(missing_ok=True)
            raise CheckpointError(f"{self._file(index)}: was damaged; run the same command again") from None

    def remove(self) -> None:
        """Removes all entries."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.path / f"{index:05d}-{self._mark}.safetensors"


def _array(tensor: Tensor) -> np.ndarray:
    kind = {"F64": "<f8", "I64": "<i8"}[tensor.dtype]
    return np.frombuffer(b"".join(tensor.pieces()), kind).reshape(tensor.shape)


@contextmanager
def alone(target: Path) -> Iterator[Path]:
    """An empty folder for the sums of `target`, which is removed in the end. A second process is kept out.

    What a killed run left in it is removed first. Raises OutputError where a folder of that name holds anything else.
    """
    folder = target.with_name(f".{target.name}.blocks")
    _require_ours(folder)
    with exclusive(folder):
        try:
            _clear(folder)
            require_new(target)
            yield folder
        finally:
            _clear(folder)
    with suppress(OSError):  # another process may have begun in it
        folder.rmdir()


def _require_ours(folder: Path) -> None:
    """Raises OutputError for what no run of `imatrix` leaves."""
    strange = folder.is_symlink() or (folder.exists() and not folder.is_dir())
    if not strange and folder.is_dir():
        held = [*folder.iterdir(), *((folder / STORED).iterdir() if (folder / STORED).is_dir() else ())]
        strange = not all(LEFT.fullmatch(path.name) and not path.is_symlink() for path in held)
    if strange:
        raise OutputError(
            f"{folder}: holds what is not of an importance matrix; move it away, or give another out_file"
        )


def _clear(folder: Path) -> None:
    """Removes what a run leaves in its folder, but for the lock."""
    Store(folder).remove()
    (folder / f".hidden-states{PARTIAL}").unlink(missing_ok=True)
