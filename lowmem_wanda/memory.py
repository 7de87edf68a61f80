"""The most memory that this process has held, sampled; devices are asked for their own figure."""

import threading

import psutil
import torch


def anonymous() -> int:
    """Resident bytes that no file backs (all resident bytes where the system does not tell the two apart)."""
    used = psutil.Process().memory_info()
    return int(used.rss - getattr(used, "shared", 0))


class Peak:
    """A context that samples `anonymous()` every few milliseconds; `host` and `device` are peaks in bytes."""

    def __init__(self, device: torch.device, interval: float = 0.005) -> None:
        self._device, self._interval = device, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.host = anonymous()

    @property
    def device(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def __enter__(self) -> "Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self.host = max(self.host, anonymous())

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self.host = max(self.host, anonymous())
