"""What a system leaves to this process: memory within control groups, and a temporary folder that is no memory."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from lowmem_wanda.errors import BudgetError

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")  # file systems whose files take memory
UNIFIED, MEMORY = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")  # where versions 2 and 1 are mounted
MEMBERSHIP = Path("/proc/self/cgroup")
# of versions 2 and 1: limits, what is taken, and in memory.stat the page cache, which the kernel gives up first
VERSIONS = (
    (UNIFIED, ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    (MEMORY, ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def left_by_groups() -> int:
    """The bytes that may still be taken: the least of all groups above this process, `sys.maxsize` without a limit.

    Page cache counts as free: a program that has read files holds little else.
    """
    paths = _memberships()
    left = sys.maxsize
    for root, limits, current, cache in VERSIONS:
        for folder in _upward(root, paths.get(root, "/")):
            taken = _number(folder / current)
            known = [limit for name in limits if (limit := _number(folder / name)) is not None]
            if taken is not None and known:
                left = min(left, min(known) - max(0, taken - _cached(folder, cache)))
    return max(0, left)


def _memberships() -> dict[Path, str]:
    """{mount: path of this process's group below it}; empty where the system does not say it."""
    found = {}
    try:
        lines = MEMBERSHIP.read_text("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return {}
    for line in lines:  # "0::/user.slice" of version 2, "4:memory:/docker/ab" of version 1
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[UNIFIED] = path
        elif "memory" in controllers.split(","):
            found[MEMORY] = path
    return found


def _upward(root: Path, path: str) -> Iterator[Path]:
    """Yields the folders of a group and of all that it lies in. In a container most of them may not be there."""
    parts = [part for part in path.split("/") if part]
    for count in range(len(parts) if ".." not in parts else 0, -1, -1):
        yield root.joinpath(*parts[:count])


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, as "max" where nothing is limited."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _cached(folder: Path, names: tuple[str, ...]) -> int:
    """The bytes of page cache in a group and below it."""
    try:
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in names)
    except (OSError, ValueError):
        return 0


def folder_on_disk() -> str:
    """A folder for large temporary files: that of `tempfile`, /var/tmp, or the working directory.

    The first one is taken that can be written to and lies on a disk. Raises BudgetError where there is none.
    """
    places = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    for folder in (tempfile.gettempdir(), "/var/tmp", str(Path.cwd())):
        whole = Path(folder).resolve()
        mounted = next((str(path) for path in (whole, *whole.parents) if str(path) in places), "")
        if os.access(folder, os.W_OK | os.X_OK) and places.get(mounted) not in IN_MEMORY:
            return folder
    raise BudgetError(
        f"hidden states do not fit in memory, and {tempfile.gettempdir()} lies in memory, too: set TMPDIR to a folder "
        "on a disk, or give fewer or shorter windows (--windows, --length)"
    )
