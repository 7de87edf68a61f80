"""Seconds by part: none counted twice. Memory that runs out: said in a sentence."""

import pytest
import torch

from lowmem_wanda.errors import BudgetError
from lowmem_wanda.streaming import resources
from lowmem_wanda.streaming.resources import Clock, limited


def test_a_part_does_not_count_for_the_one_around_it(monkeypatch):
    now = iter([0, 2, 5, 6, 10, 11])  # seconds, at each change of part
    monkeypatch.setattr(resources.time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock.part("outer"), clock.part("inner"):  # from 0, from 2 to 5; to 6
        pass
    with clock.part("inner"):  # 10 to 11
        pass
    assert clock.seconds() == {"outer": 3, "inner": 4} and clock.seconds() == {}


def test_memory_that_runs_out_is_said_in_a_sentence():
    long = "CUDA out of memory. Tried to allocate 112.00 MiB.\nGPU 0 has a total capacity of 79.18 GiB"
    says = r"ran out though the plan had room \(CUDA out of memory. Tried to allocate 112.00 MiB.\): end .*--sequences"
    with pytest.raises(BudgetError, match=says), limited(torch.device("cpu"), None, 1 << 20):
        raise torch.OutOfMemoryError(long)
