"""Writes files that are whole or not there at all: under a temporary name, then fsync, then a rename.

`os.open` with mode 0666 gives a file the permissions that the umask allows; safetensors' own `save_file` gives it 0600.
"""

import ctypes
import errno
import json
import os
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.checksum import FASTEST, KINDS, digest_of
from lowmem_wanda.checkpoint.reader import ITEMSIZE, PIECE, Tensor, advise, nonfinite, opened
from lowmem_wanda.errors import NumberError, OutputError

COPIED_PIECE = 4 << 20  # bytes that are copied at a time; two such pieces are in memory
PARTIAL = ".partial"  # the end of an unfinished file's name
WAIT_BEFORE, WRITE, WAIT_AFTER = 1, 2, 4  # flags of sync_file_range(2)
# errors that only say that a file system cannot do what was asked for
NOT_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True)
class ShardFile:
    """A shard that was written: its file name, its size in bytes, and {kind: digest in hex} of its checksum."""

    name: str
    nbytes: int
    checksum: dict[str, str]


def write_shard(
    path: Path, tensors: Iterable[tuple[Tensor, Iterable[bytes | memoryview] | None]], finite: Container[str] = ()
) -> ShardFile:
    """Writes tensors to one safetensors file; returns its name, size and checksum.

    Each tensor comes with the pieces of its bytes, or with None if its bytes are copied from its own file. The header
    is known before the first byte is written and keeps each tensor's name, dtype and shape. Tensors of larger items
    come first, so that every tensor is aligned to its own dtype. Raises OutputError, and NumberError if one of those
    named in `finite` holds NaN or infinity.
    """
    ordered = sorted(tensors, key=lambda pair: -ITEMSIZE[pair[0].dtype])
    text, starts, size = layout([tensor for tensor, _ in ordered])
    with replacing(path, size, FASTEST) as file:
        file.write(text)
        for tensor, pieces in ordered:
            looks = tensor.name in finite
            for piece in pieces if pieces is not None else file.copied(tensor):
                if looks:
                    require_finite(tensor, piece)
                if pieces is not None:
                    file.write(piece)
        if file.size != size:
            raise OutputError(
                f"{path.name}: {file.size} bytes were written where its header promises {size}; report this bug"
            )
    return ShardFile(path.name, file.size, {FASTEST: file.digest.hexdigest()})


def layout(tensors: Sequence[Tensor]) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file of these tensors, where each of them begins in it, and its size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (end, end + tensor.nbytes)}
        starts[tensor.name] = end
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    return begin, {name: len(begin) + start for name, start in starts.items()}, len(begin) + end


def require_finite(tensor: Tensor, piece: bytes | bytearray | memoryview) -> None:
    """Raises NumberError if a piece of a tensor's bytes holds NaN or infinity."""
    if nonfinite(piece, tensor.dtype):
        raise NumberError(f"{tensor.file.name}: tensor {tensor.name} holds NaN or infinity; download it again")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file, whole or not at all. Raises OutputError."""
    with replacing(path) as file:
        file.write(content)


def copy_file(source: Path, target: Path, sha256: str) -> None:
    """Copies a small file, whole or not at all. Raises OutputError if its bytes do not have this SHA-256 in hex."""
    with replacing(target) as file:
        with opened(source) as content:
            while piece := content.read(PIECE):
                file.write(piece)
        if file.digest.hexdigest() != sha256:
            raise OutputError(
                f"{source}: was changed while the job ran; put back what was there when it began, and run again"
            )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, indented by two spaces, with a newline at its end. Raises OutputError."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


@contextmanager
def replacing(path: Path, size: int = 0, kind: str = "sha256") -> Iterator["Growing"]:
    """A file to write to. It appears at `path` when all went well, and not at all otherwise.

    Its disk space is taken at once if its `size` in bytes is known (0: unknown). `kind` is that of its checksum. Raises
    OutputError.
    """
    with _partial(path) as partial:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            file = Growing(handle, kind)
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
    """A path to write to, for libraries that open files themselves. The file is at `path` when all went well.

    It never replaces a file: a file of the same bytes stays, and for a file of other bytes OutputError is raised.
    """
    with _partial(path) as partial:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        if path.exists() and digest_of(path, FASTEST) == digest_of(partial, FASTEST):
            return
        require_new(path)
        os.replace(partial, path)
        sync_directory(path.parent)


def require_new(path: str | Path) -> None:
    """Raises OutputError if a file exists."""
    if Path(path).exists():
        raise OutputError(f"{path}: exists, and is not replaced; give another name or remove it")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """The path that an unfinished file has beside `path`. If a file is still there in the end, it is removed."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with explained(path):
            yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class Growing:
    """A file that is written from its start to its end and reaches the disk soon after.

    Each piece of 16 MiB is sent to the disk at once and leaves the page cache two pieces later, so that nothing is left
    for fsync to wait for (1.6 GB take 4.5-5 s, against 16-19 s). `size` is the number of bytes that were written,
    `digest` is their checksum.
    """

    def __init__(self, handle: int, kind: str) -> None:
        self.size, self.digest = 0, KINDS[kind]()
        self._handle, self._sent = handle, 0

    def write(self, content: bytes | bytearray | memoryview) -> None:
        """Appends all of the content. Raises OSError."""
        self._append(memoryview(content).cast("B"), copied=0)

    def copied(self, tensor: Tensor) -> Iterator[bytearray]:
        """Appends the bytes of a tensor in its file and yields them; the kernel copies them if it can between the two.

        Raises CheckpointError if the tensor cannot be read, OSError if this file cannot be written.
        """
        with opened(tensor.file) as file:
            source = os.dup(file.fileno())
        with open(source, "rb", buffering=0) as file:  # not `opened`: errors here concern the target
            at = tensor.offset
            for piece in tensor.pieces(COPIED_PIECE):
                copied = copy_range(source, self._handle, at, len(piece))
                self._append(memoryview(piece), copied)
                at += len(piece)
                yield piece
            advise(file, tensor.offset, tensor.nbytes, "DONTNEED")  # type: ignore[arg-type]

    def _append(self, content: memoryview, copied: int) -> None:
        """Adds the content to the digest and writes it, except its first `copied` bytes, which are already written."""
        self.digest.update(content)
        self.size += len(content)
        rest = content[copied:]
        while rest:  # on a full disk one write takes only a part, the next raises ENOSPC
            rest = rest[os.write(self._handle, rest) :]
        while self._sent + PIECE <= self.size:
            start_writeback(self._handle, self._sent, PIECE)
            self._sent += PIECE
            if self._sent >= 3 * PIECE:
                end_writeback(self._handle, self._sent - 3 * PIECE, PIECE)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error of the system while `path` is written into an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path.name}: the disk is full; free some space and run the same command again"
            ) from None
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{path.name}: is larger than a file may be here; lift the limit (ulimit -f), or take another disk"
            ) from None
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); make the directory writable and run again"
        ) from None


def sync_directory(path: Path) -> None:
    """Makes sure that renames in a directory are on the disk. Does nothing where directories cannot be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do this need not do it
                raise
        finally:
            os.close(handle)


# What Linux can do with files beyond writing them. On other systems these functions do nothing, and all still works.


@lru_cache
def library(name: str) -> Any:
    """A function of the C library, which releases Python's lock while it runs; None where it is missing."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform == "linux" else None


def preallocate(handle: int, nbytes: int) -> None:
    """Takes the disk space of a whole file at once. Raises OSError (ENOSPC) if there is too little.

    `os.posix_fallocate` is not used: it writes to every page if the file system cannot do this.
    """
    function = library("fallocate64")
    if function and nbytes and function(handle, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number not in (*NOT_HERE, errno.EINTR):
            raise OSError(number, os.strerror(number))


def start_writeback(handle: int, offset: int, nbytes: int) -> None:
    """Asks the system to start writing a range to the disk, and does not wait for it."""
    if function := library("sync_file_range"):
        function(handle, ctypes.c_int64(offset), ctypes.c_int64(nbytes), WRITE)


def end_writeback(handle: int, offset: int, nbytes: int) -> None:
    """Waits until a range is on the disk and gives its pages back. Raises OSError if it could not be written."""
    if function := library("sync_file_range"):
        if function(handle, ctypes.c_int64(offset), ctypes.c_int64(nbytes), WAIT_BEFORE | WRITE | WAIT_AFTER):
            number = ctypes.get_errno()
            if number not in (*NOT_HERE, errno.EINTR, errno.ESPIPE):  # fsync would not report it again
                raise OSError(number, os.strerror(number))
        os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


def forget(handle: int) -> None:
    """Gives back all pages of a file that is on the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def copy_range(source: int, target: int, offset: int, nbytes: int) -> int:
    """The number of bytes from `offset` of one file that the kernel appended to another; 0 if it cannot."""
    done = 0
    while done < nbytes and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, nbytes - done, offset + done)
        except OSError:  # a plain write follows, which succeeds or says why it cannot
            break
        if not copied:
            break
        done += copied
    return done
