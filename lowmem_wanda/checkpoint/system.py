"""What Linux can do with files beyond Python's own; elsewhere each of these does nothing, and all still works."""

import ctypes
import errno
import os
import sys
from functools import lru_cache
from typing import Any

WAIT_BEFORE, WRITE, WAIT_AFTER = 1, 2, 4  # of sync_file_range(2)
NOT_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM)


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
