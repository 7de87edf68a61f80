"""Seconds by part: none counted twice."""

import torch

from lowmem_wanda.streaming import resources
from lowmem_wanda.streaming.resources import Clock


def test_a_part_does_not_count_for_the_one_around_it(monkeypatch):
    now = iter([0, 2, 5, 6, 10, 11])  # seconds, at each change of part
    monkeypatch.setattr(resources.time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock.part("outer"), clock.part("inner"):  # from 0, from 2 to 5; to 6
        pass
    with clock.part("inner"):  # 10 to 11
        pass
    assert clock.seconds() == {"outer": 3, "inner": 4} and clock.seconds() == {}
