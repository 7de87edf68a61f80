"""Seconds by part: none counted twice. Memory that runs out: said in a sentence."""

import re

import pytest
import torch

from lowmem_wanda.cli.main import main
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


FULL = {
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 5":
        "host memory is full .*--max-ram",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes.": "host memory is full .*--max-ram",
    "unable to mmap 5 bytes from file </x>: Cannot allocate memory (12)": "host memory is full .*--max-ram",
    "std::bad_alloc": "host memory is full .*--max-ram",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "memory of the GPU is full .*--max-vram",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": "memory of the GPU is full",
    "CUDA error: out of memory\nCUDA kernel errors might be reported later": "memory of the GPU is full",
    "MPS backend out of memory (MPS allocated: 5 GB)": "memory of the GPU is full",
    "CUDA driver version is insufficient for CUDA runtime version": "update NVIDIA's driver .*--device cpu",
    "The NVIDIA driver on your system is too old (found version 11040).": "update NVIDIA's driver .*--device cpu",
    "CUDA error: no kernel image is available for execution on the device": "built for it, or give --device cpu",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`": "give --dtype float32",
    "can't start new thread": "ulimit -u",
    "Symlink loop from 'x'": "a link leads to itself .*another path",
}  # fmt: skip


@pytest.mark.parametrize("said", FULL)
def test_limits_of_the_machine_are_one_sentence_everywhere(monkeypatch, capsys, said):
    """In a walk and, by the command line, outside of one."""
    with pytest.raises(BudgetError, match=FULL[said]), limited(torch.device("cpu"), None, 1 << 20):
        raise RuntimeError(said)

    def fail(*given, **named):
        raise RuntimeError(said)

    monkeypatch.setattr("lowmem_wanda.check", fail)
    assert main(["check", "x"]) == 1
    shown = capsys.readouterr().err
    assert re.match(f"error: .*{FULL[said]}", shown) and shown.count("\n") == 1 and "Traceback" not in shown


@pytest.mark.parametrize("error", [RuntimeError("shape '[1, 1, 64]' is invalid for input of size 12160"),
                                   RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RecursionError("deep")])  # fmt: skip
def test_any_other_runtime_error_is_a_bug_with_its_traceback(monkeypatch, error):
    def fail(*given, **named):
        raise error

    monkeypatch.setattr("lowmem_wanda.check", fail)
    with pytest.raises(type(error)), limited(torch.device("cpu"), None, 1 << 20):
        main(["check", "x"])


def test_memory_errors_of_python_and_the_system_say_what_to_do(monkeypatch, capsys):
    for error in (MemoryError(), MemoryError("Unable to allocate 5 GiB"), OSError(12, "Cannot allocate memory")):
        monkeypatch.setattr("lowmem_wanda.check", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert main(["check", "x"]) == 1
        assert re.match("error: host memory is full .*--max-ram", capsys.readouterr().err)
