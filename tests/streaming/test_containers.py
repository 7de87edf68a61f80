"""What control groups leave: page cache is free, limits of all groups above count, both versions."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from lowmem_wanda.streaming.containers import left_by_groups
from lowmem_wanda.streaming.resources import free_memory

V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
GB = 10**9


@pytest.fixture
def system(monkeypatch):
    """A function that gives the system these files, and no others of control groups."""

    def pretend(files):
        whole = Path.read_text

        def read_text(self, *given, **named):
            if str(self) in files:
                return str(files[str(self)])
            if str(self).startswith(V2) or str(self) == "/proc/self/cgroup":
                raise FileNotFoundError(self)
            return whole(self, *given, **named)

        monkeypatch.setattr(Path, "read_text", read_text)

    return pretend


def stat(inactive, active, total=""):
    """A memory.stat, whose other lines do not count."""
    return f"anon 5\nfile 999\n{total}inactive_anon 7\n{total}inactive_file {inactive}\n{total}active_file {active}\n"


def group(folder, limit, taken, cached=(0, 0)):
    if folder.startswith(V1):
        return {f"{folder}/memory.limit_in_bytes": limit, f"{folder}/memory.usage_in_bytes": taken,
                f"{folder}/memory.stat": "inactive_file 3\n" + stat(*cached, "total_")}  # fmt: skip
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": taken, f"{folder}/memory.stat": stat(*cached)}


CASES = {
    "nothing": ({}, sys.maxsize),
    "no limit": (group(V2, "max", 5 * GB), sys.maxsize),
    "cache": (group(V2, 8 * GB, 7 * GB, (4 * GB, 2 * GB)), 7 * GB),
    "no cache": (group(V2, 8 * GB, 7 * GB), GB),
    "overdrawn": (group(V2, 8 * GB, 9 * GB), 0),
    "odd figures": (group(V2, 8 * GB, 1 * GB, (4 * GB, 2 * GB)), 8 * GB),
    "high": (group(V2, "max", 1 * GB) | {f"{V2}/memory.high": 3 * GB}, 2 * GB),
    "parent": (group(f"{V2}/a.slice/b", "max", GB) | group(f"{V2}/a.slice", 4 * GB, 3 * GB, (GB, 0))
               | {"/proc/self/cgroup": "0::/a.slice/b\n"}, 2 * GB),
    "own": (group(f"{V2}/a.slice/b", GB, GB // 2) | group(f"{V2}/a.slice", 4 * GB, GB)
            | {"/proc/self/cgroup": "0::/a.slice/b\n"}, GB // 2),
    "v1": (group(V1, 8 * GB, 7 * GB, (2 * GB, GB)) | {"/proc/self/cgroup": "4:cpu:/x\n3:memory:/docker/ab\n"}, 4 * GB),
    "v1 below": (group(f"{V1}/docker/ab", 2 * GB, GB) | group(V1, 9223372036854771712, 50 * GB)
                 | {"/proc/self/cgroup": "4:cpu:/x\n3:blkio,memory:/docker/ab\n0::/\n"}, GB),
    "outside": (group(V2, 8 * GB, GB) | {"/proc/self/cgroup": "0::/../../x\n"}, 7 * GB),
    "garbage": (group(V2, 8 * GB, GB) | {"/proc/self/cgroup": "\n::\nx", f"{V2}/memory.stat": "inactive_file x\n"}, 7 * GB),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_groups_leave(system, case):
    files, left = CASES[case]
    system(files)
    assert left_by_groups() == left
    assert free_memory(torch.device("cpu")) <= min(left, psutil.virtual_memory().total)
