"""The most memory that this process has held, sampled, and how it is kept low."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from lowmem_wanda.checkpoint.system import library

SAMPLES = 200  # of memory over time that are kept, up to twice as many


def anonymous() -> int:
    """Resident bytes that no file backs (all resident bytes where the system does not tell the two apart)."""
    used = psutil.Process().memory_info()
    return int(used.rss - getattr(used, "shared", 0))


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now, on the GPU or of the host."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # a container's limit ("max": none)
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def limit_vram(device: torch.device, most: int | None) -> None:
    """Has torch raise OutOfMemoryError where it would reserve more of a GPU for tensors than so many bytes."""
    if most is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def map_blocks_from(nbytes: int) -> None:
    """Has glibc map every block of at least so many bytes by itself, so that its pages go back when it is freed.

    glibc moves that limit to 32 MiB as large blocks are freed, and keeps the holes between them after that:
    557 MB at most for work that needs 380 (width 1024, float32). 1 MiB keeps imports and preparations small.
    While blocks are computed it costs a tenth of the CPU time, in page faults, where 32 MiB and
    `return_freed` after each block hold 2 % more.
    """
    if mallopt := library("mallopt"):
        mallopt(-3, nbytes)  # M_MMAP_THRESHOLD; another C library ignores it or has no such function


def return_freed() -> None:
    """Gives the holes between blocks that are not mapped back; they added up to 0.6 MB for each decoder block."""
    if malloc_trim := library("malloc_trim"):
        malloc_trim(0)


@contextmanager
def host_memory(nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Uninitialised host bytes (uint8), page-locked beside a CUDA device where the system lets it.

    Registered rather than allocated as pinned: torch's pinned allocator rounds up to a power of two.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    locked = device.type == "cuda" and int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)) == 0
    if device.type == "cuda" and not locked:
        with suppress(RuntimeError):  # the failure would else be told by the next kernel
            torch.ones(1, device=device)
    try:
        yield memory
    finally:
        if locked:
            torch.cuda.synchronize(device)  # copies may be under way
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class Peak:
    """A context that samples `anonymous()` every few milliseconds; `host` and `device` are peaks in bytes.

    `series` are some hundred [seconds, bytes] over its time, each the most of its span.
    """

    def __init__(self, device: torch.device, interval: float = 0.005) -> None:
        self._device, self._interval = device, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.host = anonymous()
        self.series: list[list[float]] = []
        self._start = time.perf_counter()

    @property
    def device(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def beside(self, host: int, device: int) -> dict[str, int]:
        """The peaks beside those that were predicted, in bytes."""
        return {
            "host_predicted": host,
            "host_measured": self.host,
            "device_predicted": device,
            "device_measured": self.device,
        }

    def __enter__(self) -> "Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.host = max(self.host, anonymous())

    def _sample(self) -> None:
        span, count, most = 1, 0, 0
        while not self._done.wait(self._interval):
            now = anonymous()
            count, most, self.host = count + 1, max(most, now), max(self.host, now)
            if count < span:
                continue
            self.series.append([round(time.perf_counter() - self._start, 3), most])
            count = most = 0
            if len(self.series) == 2 * SAMPLES:  # each of the rest stands for twice as long
                pairs = zip(self.series[::2], self.series[1::2], strict=True)
                self.series = [[later[0], max(one[1], later[1])] for one, later in pairs]
                span *= 2
