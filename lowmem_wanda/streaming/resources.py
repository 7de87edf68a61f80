"""The seconds and bytes of this process: how they are measured, and how memory is kept low."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch

from lowmem_wanda.checkpoint.writer import library
from lowmem_wanda.errors import BudgetError, limit_of_machine
from lowmem_wanda.streaming.containers import left_by_groups
from lowmem_wanda.streaming.machine import exact_products

# the other parts read, copy and write meanwhile
COMPUTING = ("embed", "target", "measure", "prune", "recover", "onward", "compare", "head")
SAMPLES = 200  # of memory over time: up to twice as many are kept, then every second one goes
SMALL = 1 << 20  # bytes, for `map_blocks_from` while nothing is computed


def anonymous() -> int:
    """The resident bytes that no file backs, or all resident bytes where the system does not tell the two apart."""
    used = psutil.Process().memory_info()
    return int(used.rss - getattr(used, "shared", 0))


def free_memory(device: torch.device) -> int:
    """The bytes that are free now, on the GPU or on the host."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for later
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(int(psutil.virtual_memory().available), left_by_groups())


@contextmanager
def limited(device: torch.device, max_vram: int | None, mapped: int) -> Iterator[None]:
    """Limits memory while blocks are walked: that of torch on a GPU, and the holes that glibc keeps on the host.

    Raises BudgetError where tensors would take more than `max_vram` bytes of the GPU, or all of it. Allocations of at
    least `mapped` bytes are mapped on their own (see `map_blocks_from`).
    """
    cuda = device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if max_vram is None else min(1.0, max_vram / total)  # an earlier cap is taken away
        torch.cuda.set_per_process_memory_fraction(share, device)
    map_blocks_from(mapped)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"memory of {device} ran out though the plan had room ({' '.join(str(error).split()[:9])}): end other "
            "programs that use it, or give fewer or shorter sequences (--sequences, --length)"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if told := limit_of_machine(error):
            raise BudgetError(told) from error
        raise
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def map_blocks_from(nbytes: int) -> None:
    """Has glibc map each allocation of at least `nbytes` bytes on its own, so that its pages go back when it is freed.

    As large allocations are freed, glibc raises that limit to 32 MiB and then keeps the holes between them: it held
    557 MB at most for work that needs 380 MB (width 1024, float32). SMALL keeps memory low before the walk. While
    blocks are computed it costs a tenth of the CPU time, in page faults; 32 MiB, and `return_freed` after each block,
    take 2 % more memory instead.
    """
    if mallopt := library("mallopt"):
        mallopt(-3, nbytes)  # M_MMAP_THRESHOLD; another C library ignores it or has no such function


def return_freed() -> None:
    """Gives the holes between allocations back to the system. They added up to 0.6 MB for each decoder block."""
    if malloc_trim := library("malloc_trim"):
        malloc_trim(0)


def wait(device: torch.device) -> None:
    """Waits until all that was given to the device is done, so that the host may read what it wrote."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def host_memory(
    nbytes: int, device: torch.device, not_locked: Callable[[int], None] = lambda nbytes: None
) -> Iterator[torch.Tensor]:
    """Gives uninitialised host bytes (uint8), page-locked beside a CUDA device.

    Where the system does not allow this, `not_locked` is called with the bytes, and the memory can be used all the
    same. It is registered rather than allocated as pinned, because torch's pinned allocator rounds up to a power of 2.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    locked = device.type == "cuda" and _register(memory, device)
    if device.type == "cuda" and not locked:
        not_locked(nbytes)
    try:
        yield memory
    finally:
        if locked:
            wait(device)  # copies may be under way
            with torch.cuda.device(device):
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _register(memory: torch.Tensor, device: torch.device) -> bool:
    """Page-locks host memory for a CUDA device; gives whether that succeeded.

    It is done on the thread's current device, and in a new thread that is GPU 0.
    """
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0:
            return True
        with suppress(RuntimeError):  # otherwise the next kernel would report the failure
            torch.ones(1, device=device)
    return False


class Peak:
    """A context that samples `anonymous()` every `interval` seconds. `host` and `device` are peaks in bytes.

    `not_locked` are bytes of host memory that were to be page-locked beside a GPU, which the system did not allow.
    `series` is the memory over time, as a few hundred pairs [seconds, bytes], each the maximum of its span.
    """

    def __init__(self, device: torch.device, interval: float = 0.005) -> None:
        self._device, self._interval = device, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.host, self.not_locked = anonymous(), 0
        self.series: list[list[float]] = []
        self._start = time.perf_counter()

    @property
    def device(self) -> int:
        """The peak of tensors on the GPU in bytes; 0 without a GPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def count_not_locked(self, nbytes: int) -> None:
        """Adds bytes that could not be page-locked."""
        self.not_locked += nbytes

    def beside(self, host: int, device: int) -> dict[str, int]:
        """The measured peaks beside the predicted ones, in bytes, and what could not be page-locked if there is any."""
        more = {"host_not_locked": self.not_locked} if self.not_locked else {}
        if self._device.type == "cuda":
            more["device_reserved"] = torch.cuda.max_memory_reserved(self._device)  # with the allocator's holes
        return {
            **more,
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
            if len(self.series) == 2 * SAMPLES:  # pairs become one, of twice the span
                pairs = zip(self.series[::2], self.series[1::2], strict=True)
                self.series = [[later[0], max(one[1], later[1])] for one, later in pairs]
                span *= 2


class Clock:
    """Seconds by part of the work on one device. On a GPU they are read from events, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._name = ""
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time counts for the part `name`, except the time of other parts within it."""
        before = self._name
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def seconds(self) -> dict[str, float]:
        """The seconds of each part since the last call. Waits for the device."""
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            marks[-1][1].synchronize()
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(marks, marks[1:], strict=False):
            if name:
                spent[name] = spent.get(name, 0.0) + (start.elapsed_time(end) / 1e3 if self._cuda else end - start)
        return spent

    def _mark(self, name: str) -> None:
        """Ends the current part and begins the part `name`."""
        self._name = name
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True, blocking=True)  # waiting for it must not take a core
            now.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, now))


def add_seconds(spent: dict[str, float], seconds: dict[str, float]) -> None:
    """Adds the seconds of each part to those in `spent`."""
    for part, more in seconds.items():
        spent[part] = spent.get(part, 0.0) + more


def timing(wall: float, spent: dict[str, float]) -> dict[str, Any]:
    """The seconds on the wall, of each part and of all parts in turn, and the share of the wall that was computing."""
    computing, serial = sum(spent.get(part, 0.0) for part in COMPUTING), sum(spent.values())
    return {
        "wall": wall,
        "parts": spent,
        "serial": serial,
        "serial_over_wall": serial / max(wall, 1e-9),
        "compute_busy": computing / max(wall, 1e-9),
    }


def set_up_products() -> None:
    """Has MKL give products the same bits with any number of threads, where it can (see `exact_products`).

    Else it divides long rows of float32 among threads in an order of its own (1024 columns and more). Products take as
    long (317 GFLOP/s for 318, 4096 x 4096, 2 threads, AVX-512 and AMX). MKL reads this variable at its first product.
    """
    if exact_products():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def set_up_vector_functions() -> None:
    """Has each vector function of MKL find its code, on one number and so in one thread.

    Where two threads are the first to call one, the results of a thread can be off by 1.5e-4: in 2 of 16 processes the
    cosines of 16384 numbers were (torch 2.13, Intel Xeon with AVX-512; https://github.com/pytorch/pytorch/issues/188792).
    """
    names = "acos asin atan cos cosh erf erfc exp expm1 lgamma log log10 log1p log2 rsqrt sin sinh sqrt tan tanh"
    for dtype in (torch.float32, torch.float64):
        for name in names.split():
            getattr(torch, name)(torch.ones(1, dtype=dtype))


set_up_products()
set_up_vector_functions()
map_blocks_from(SMALL)  # before transformers is imported: 10 MB less at the peak (width 1024)
