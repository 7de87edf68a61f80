"""Seconds by part of the work, none counted twice."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

COMPUTING = ("embed", "measure", "prune", "onward", "compare", "head")  # other parts read, copy and write beside them


class Clock:
    """Time on one device's stream of work; on a GPU it is read from events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._name = ""
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within counts for `name`, but for the parts within that."""
        before = self._name
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part so far; waits for the device, and begins anew."""
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            marks[-1][1].synchronize()
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(marks, marks[1:], strict=False):
            if name:
                spent[name] = spent.get(name, 0.0) + (start.elapsed_time(end) / 1e3 if self._cuda else end - start)
        return spent

    def _mark(self, name: str) -> None:
        """From here on it is `name`."""
        self._name = name
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, now))


def add(spent: dict[str, float], seconds: dict[str, float]) -> None:
    """Adds seconds by part to those that were spent before."""
    for part, more in seconds.items():
        spent[part] = spent.get(part, 0.0) + more


def timing(wall: float, spent: dict[str, float]) -> dict[str, Any]:
    """Seconds on the wall, of each part, of all parts one after the other; and the share in which it was computed."""
    computing, serial = sum(spent.get(part, 0.0) for part in COMPUTING), sum(spent.values())
    return {
        "wall": wall,
        "parts": spent,
        "serial": serial,
        "serial_over_wall": serial / max(wall, 1e-9),
        "compute_busy": computing / max(wall, 1e-9),
    }
