"""Copies tensors from their files to memory, in one of two ways.

mmap    exactly their bytes are mapped read-only, copied and unmapped, 16 MiB at a time
pread   their bytes are read to their place, 16 MiB at a time

Either way a tensor is copied once, and the system can have its pages back afterwards. The two take the same time. A
file that has changed since its header was read is an error. A mapping past the end of a file would kill the process, so
on Linux its bytes are copied by a call that fails instead. On network file systems another machine can cut a file
short, and on FUSE a mapping can be slow or missing: there files are not mapped unless it was asked for.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lowmem_wanda.checkpoint.reader import PIECE, Tensor, advise, changed, fill, opened
from lowmem_wanda.checkpoint.writer import library

MOUNTS = Path("/proc/self/mountinfo")
LOCAL = {  # file systems of this machine's own disks and memory, by the names that Linux gives them
    "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfsplus", "iso9660", "jfs", "nilfs2",
    "ntfs", "ntfs3", "overlay", "ramfs", "reiserfs", "squashfs", "tmpfs", "udf", "vfat", "xfs", "zfs",
}  # fmt: skip


def read(destinations: Sequence[tuple[Tensor, np.ndarray]], way: str = "auto", drop: bool = False) -> set[str]:
    """Copies the bytes of each tensor into its array, uint8 (nbytes,), in the order in which they lie on disk.

    `way` is "mmap", "pread", or "auto": mapped on local disks, read elsewhere and where mapping fails. With `drop` the
    pages are given back to the system afterwards. Returns the ways that were taken. Raises CheckpointError.
    """
    ordered = sorted(destinations, key=lambda pair: (pair[0].file, pair[0].offset))
    taken: set[str] = set()
    for path, group in groupby(ordered, key=lambda pair: pair[0].file):
        chosen = way if way != "auto" else "mmap" if is_local(path.resolve().parent) else "pread"
        with opened(path) as file:
            advise(file, 0, 0, "SEQUENTIAL")  # a cold file: 1,130 MB/s with this advice, 580 without
            for tensor, out in group:
                tensor.check(file)
                chosen = _copied(file, tensor, out, chosen, may_fail=way == "auto")
                taken.add(chosen)
                tensor.check(file)
                if drop:
                    advise(file, tensor.offset, tensor.nbytes, "DONTNEED")
    return taken


def forget_cached(tensor: Tensor) -> None:
    """Gives the pages of a tensor that are in memory back to the system, so that it will be read from the disk."""
    with opened(tensor.file) as file:
        advise(file, tensor.offset, tensor.nbytes, "DONTNEED")


@lru_cache
def is_local(folder: Path) -> bool:
    """Whether a folder is known to lie on a disk of this machine; False where the system does not tell (not Linux)."""
    try:
        lines = MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
        number = os.stat(folder).st_dev
    except OSError:
        return False
    device = f"{os.major(number)}:{os.minor(number)}"
    found = [line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2:3] == [device]]
    if not found:  # btrfs and overlay give files another number than their mount
        found = [_kind_above(str(folder.resolve()), lines)]
    return all(kind in LOCAL for kind in found)


def _kind_above(path: str, lines: Sequence[str]) -> str:
    """The kind of the file system that is mounted nearest above a path."""
    mounts: dict[str, str] = {}
    for line in lines:
        words = line.split(" ")
        if len(words) > 5:
            mounts[words[4].replace("\\040", " ")] = line.partition(" - ")[2].split(" ")[0]
    above = [place for place in mounts if path == place or path.startswith(f"{place.rstrip('/')}/")]
    return mounts[max(above, key=len)] if above else ""


def _copied(file: BinaryIO, tensor: Tensor, out: np.ndarray, way: str, may_fail: bool) -> str:
    """Copies a tensor in a way, and by reading where it cannot be mapped and this `may_fail`; gives the way taken."""
    if tensor.is_made:
        done = 0
        for piece in tensor.pieces():
            out[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        return "pread"
    if way == "mmap":
        try:
            for start in range(0, tensor.nbytes, PIECE):
                _copy_mapped(file, tensor, start, out[start : start + PIECE])
            return way
        except (OSError, ValueError):
            if not may_fail:
                raise
    file.seek(tensor.offset)
    for start in range(0, tensor.nbytes, PIECE):
        fill(file, tensor, out[start : start + PIECE].data)
    return "pread"


def _copy_mapped(file: BinaryIO, tensor: Tensor, start: int, out: np.ndarray) -> None:
    """Copies the bytes of a tensor from its byte `start` on."""
    at = tensor.offset + start
    skip = at % mmap.ALLOCATIONGRANULARITY
    tensor.check(file)
    if os.fstat(file.fileno()).st_size < at + len(out):
        raise changed(tensor)
    with mmap.mmap(file.fileno(), skip + len(out), offset=at - skip, access=mmap.ACCESS_READ) as mapped:
        if hasattr(mmap, "MADV_SEQUENTIAL"):  # else a fault reads what lies before it, too: 7 % of matrices of 1 MB
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        if not _copy(mapped, skip, out):
            raise changed(tensor)


def _copy(mapped: mmap.mmap, skip: int, out: np.ndarray) -> bool:
    """Copies the bytes of a mapping from `skip` on; False where its file has none for them any more.

    Linux does it by a call that fails for such pages (process_vm_readv, of this process itself). Where that is missing
    or not allowed, it is a plain copy, which the system would end the process for.
    """
    source = np.frombuffer(mapped, np.uint8, len(out), skip)
    if call := library("process_vm_readv"):
        call.restype = ctypes.c_ssize_t
        pieces = [_Piece(array.ctypes.data, len(out)) for array in (out, source)]
        to, of = map(ctypes.byref, pieces)
        done = call(os.getpid(), to, ctypes.c_ulong(1), of, ctypes.c_ulong(1), ctypes.c_ulong(0))
        if done >= 0 or ctypes.get_errno() == errno.EFAULT:
            return bool(done == len(out))
    out[:] = source
    return True


class _Piece(ctypes.Structure):
    """An `iovec` of the C library."""

    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))
