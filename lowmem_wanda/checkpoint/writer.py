"""Files that are whole or not there: a temporary name, fsync, rename.

`os.open` with mode 0666 gives what the umask allows; safetensors' own `save_file` leaves 0600.
"""

import ctypes
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.reader import ITEMSIZE, PIECE, Tensor, advise, opened
from lowmem_wanda.errors import OutputError

COPIED_PIECE = 4 << 20  # bytes that are copied at a time; two such pieces are held
PARTIAL = ".partial"  # what no finished file ends in
WAIT_BEFORE, WRITE, WAIT_AFTER = 1, 2, 4  # of sync_file_range(2)
NOT_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was written: sizes in bytes, SHA-256 in hex."""

    name: str
    nbytes: int
    sha256: str


def write_shard(path: Path, tensors: Iterable[tuple[Tensor, Iterable[bytes | memoryview] | None]]) -> ShardFile:
    """Writes tensors, each with the pieces of its bytes (None: those of its own file), as one safetensors file.

    The header is known before the first byte and keeps each tensor's name, dtype and shape. Larger items
    come first, so that every tensor is aligned to its own dtype. Raises OutputError.
    """
    ordered = sorted(tensors, key=lambda pair: -ITEMSIZE[pair[0].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, _ in ordered:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (end, end + tensor.nbytes)}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, pieces in ordered:
            if pieces is None:
                file.copy(tensor)
            else:
                for piece in pieces:
                    file.write(piece)
        if file.size != 8 + len(text) + end:
            raise OutputError(
                f"{path.name}: {file.size} bytes were written where its header promises {8 + len(text) + end}; "
                "report this bug"
            )
    return ShardFile(path.name, file.size, file.digest.hexdigest())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole. Raises OutputError."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, two spaces deep, with a last newline. Raises OutputError."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator["Growing"]:
    """Gives a file to write to, of `size` bytes if that is known; it is at `path` when all went well, and not
    there at all otherwise."""
    with _partial(path) as partial:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            file = Growing(handle)
            preallocate(handle, size)
            yield file
            os.fsync(handle)
            forget(handle)
        finally:
            os.close(handle)
        os.replace(partial, path)
        sync_directory(path.parent)


@contextmanager
def named_partial(path: Path) -> Iterator[Path]:
    """Gives a path to write to, for libraries that open files themselves; the file is at `path` when all went well.

    It takes no other file's place: one of the same bytes is left. Raises OutputError for another one.
    """
    with _partial(path) as partial:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        if path.exists() and sha256_of(path) == sha256_of(partial):
            return
        require_new(path)
        os.replace(partial, path)
        sync_directory(path.parent)


def require_new(path: str | Path) -> None:
    """Raises OutputError for a file that is there."""
    if Path(path).exists():
        raise OutputError(f"{path}: exists, and is not replaced; give another name or remove it")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """The name beside `path` that an unfinished file has, which is gone in the end."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with explained(path):
            yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class Growing:
    """A file that is written from its start to its end, on the disk soon after: what is written is sent there
    at once and leaves the page cache two windows later, so that nothing is left for fsync to wait for
    (1.6 GB: 4.5-5 s, against 16-19 s).

    `size` is what was written, in bytes; `digest` the SHA-256 of it.
    """

    def __init__(self, handle: int) -> None:
        self.size, self.digest = 0, hashlib.sha256()
        self._handle, self._sent = handle, 0

    def write(self, content: bytes | memoryview) -> None:
        """Appends all of it. Raises OSError."""
        self._append(memoryview(content).cast("B"), copied=0)

    def copy(self, tensor: Tensor) -> None:
        """Appends a tensor as it lies in its file, by the kernel where that copies between the two files."""
        with opened(tensor.file) as file:
            source = os.dup(file.fileno())
        with open(source, "rb", buffering=0) as file:  # not `opened`: what goes wrong here is the target's trouble
            at = tensor.offset
            for piece in tensor.pieces(COPIED_PIECE):
                copied = copy_range(source, self._handle, at, len(piece))
                self._append(memoryview(piece), copied)
                at += len(piece)
            advise(file, tensor.offset, tensor.nbytes, "DONTNEED")  # type: ignore[arg-type]

    def _append(self, content: memoryview, copied: int) -> None:
        """Takes note of the content and writes it, but for the first `copied` bytes, which are there already."""
        self.digest.update(content)
        self.size += len(content)
        rest = content[copied:]
        while rest:  # on a full disk a plain write goes short once, then raises ENOSPC
            rest = rest[os.write(self._handle, rest) :]
        while self._sent + PIECE <= self.size:
            start_writeback(self._handle, self._sent, PIECE)
            self._sent += PIECE
            if self._sent >= 3 * PIECE:
                end_writeback(self._handle, self._sent - 3 * PIECE, PIECE)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Makes what the system says against writing `path` an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path.name}: the disk is full; free some space and run the same command again to continue"
            ) from None
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); make the directory writable and run again"
        ) from None


def sync_directory(path: Path) -> None:
    """Makes renames in a directory last (a no-op where directories cannot be opened)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not
                raise
        finally:
            os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read 16 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(16 << 20):
            digest.update(piece)
    return digest.hexdigest()


# What Linux can do with files beyond Python's own. Elsewhere each of these does nothing, and all still works.


@lru_cache
def library(name: str) -> Any:
    """A function of the C library, or None; it lets go of Python's lock while it runs."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform == "linux" else None


def preallocate(handle: int, nbytes: int) -> None:
    """Takes the disk space of a file at once. Raises OSError (ENOSPC) where it is not to be had.

    `os.posix_fallocate` would write to every page where the file system cannot do this.
    """
    function = library("fallocate64")
    if function and nbytes and function(handle, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number not in (*NOT_HERE, errno.EINTR):
            raise OSError(number, os.strerror(number))


def start_writeback(handle: int, offset: int, nbytes: int) -> None:
    """Has the system begin to write a range to the disk, without waiting."""
    if function := library("sync_file_range"):
        function(handle, ctypes.c_int64(offset), ctypes.c_int64(nbytes), WRITE)


def end_writeback(handle: int, offset: int, nbytes: int) -> None:
    """Waits until a range is on the disk, and gives its pages back. Raises OSError where it could not be written."""
    if function := library("sync_file_range"):
        if function(handle, ctypes.c_int64(offset), ctypes.c_int64(nbytes), WAIT_BEFORE | WRITE | WAIT_AFTER):
            number = ctypes.get_errno()
            if number not in (*NOT_HERE, errno.EINTR, errno.ESPIPE):  # told here, an error is not told by fsync again
                raise OSError(number, os.strerror(number))
        os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


def forget(handle: int) -> None:
    """Gives all pages of a file that is on the disk back."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def copy_range(source: int, target: int, offset: int, nbytes: int) -> int:
    """How many bytes from `offset` of one file the kernel has appended to another; 0 where it cannot."""
    done = 0
    while done < nbytes and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, nbytes - done, offset + done)
        except OSError:  # a plain write will do it, or say why not
            break
        if not copied:
            break
        done += copied
    return done
