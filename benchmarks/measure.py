"""What the benchmarks share: one process followed from outside, and where it was measured (Linux)."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import random_llama

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096


@dataclass(frozen=True)
class Usage:
    """What a process took until its end.

    `seconds` are those of the clock, `cpu_seconds` those of all its CPUs. `anonymous` and `mapped` are the peaks of its
    RssAnon and RssFile in bytes, without its children: a child that is forked and does not run another program yet
    would count the same pages twice. `disk_read` and `disk_written` are `read_bytes` and `write_bytes` of /proc/PID/io.
    The first has the pages that a mapping faults in, but not those that were cached; the second counts a page when it
    is dirtied. `called_read` and `called_written` are the bytes that it passed to read(2) and write(2), `rchar` and
    `wchar`, with cached pages and without mapped ones.
    """

    seconds: float
    cpu_seconds: float
    anonymous: int
    mapped: int
    disk_read: int
    disk_written: int
    called_read: int
    called_written: int


def follow(command: Sequence[str | Path], interval: float = 0.005, **options: Any) -> Usage:
    """Runs a command, sampling its memory every `interval` seconds. Raises CalledProcessError."""
    start, peaks = time.perf_counter(), {"RssAnon": 0, "RssFile": 0}
    child = subprocess.Popen(command, **options)
    try:
        # with WNOWAIT it stays a zombie, so that /proc still has its counters when all its threads are gone
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            status = fields(Path(f"/proc/{child.pid}/status"))
            peaks = {key: max(peak, status.get(key, 0) * 1024) for key, peak in peaks.items()}
            time.sleep(interval)
        seconds = time.perf_counter() - start
        io = fields(Path(f"/proc/{child.pid}/io"))
        _, code, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(code)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, [str(part) for part in command])
    return Usage(
        seconds, used.ru_utime + used.ru_stime, peaks["RssAnon"], peaks["RssFile"],
        io["read_bytes"], io["write_bytes"], io["rchar"], io["wchar"],
    )  # fmt: skip


def fields(file: Path) -> dict[str, int]:
    """{key: number} of a /proc file whose lines have a key and a number."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def llama(path: Path, width: int, blocks: int) -> Path:
    """A random bfloat16 Llama with heads of width 64, four of which share a key."""
    heads = width // 64
    return random_llama(
        path, width=width, hidden=11 * width // 4, blocks=blocks, heads=heads, kv_heads=max(1, heads // 4),
        vocab=VOCABULARY,
    )  # fmt: skip


def random_tokens(file: Path, sequences: int, length: int) -> Path:
    """The same tokens (sequences, length) every time, as .npy."""
    np.save(file, np.random.default_rng(0).integers(0, VOCABULARY, (sequences, length)))
    return file


def size_of(checkpoint: Path) -> int:
    """The bytes of a checkpoint's shards."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def drop_cache(checkpoint: Path) -> None:
    """Drops a checkpoint's shards from the page cache, so that the next reader reads them from the disk."""
    for file in checkpoint.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def machine() -> str:
    """The processor, cores, memory and Python of this machine, and nothing that tells whose it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
