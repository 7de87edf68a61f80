"""What is asked of a GPU, and on which one, told by stubs; `tests/gpu` has what only a GPU can show."""

import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import opened, save_tiny

from lowmem_wanda.cli.evaluate import evaluation_tables
from lowmem_wanda.cli.terminal import add_peaks, pairs
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.evaluation import likelihood
from lowmem_wanda.evaluation.likelihood import Batch, token_likelihoods
from lowmem_wanda.streaming import containers, walk
from lowmem_wanda.streaming.buffers import BlockBuffers
from lowmem_wanda.streaming.model import find_dtype
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.resources import Peak, host_memory, limited
from lowmem_wanda.streaming.states import hidden_states
from lowmem_wanda.streaming.workload import Workload

SECOND = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    """The calls of CUDA as pairs (name, what with); `current` is the device of each thread, 0 in a new one."""
    local, calls, answers = threading.local(), [], {"register": 0, "fraction": 1.0}

    def current():
        return getattr(local, "device", torch.device("cuda", 0))

    @contextmanager
    def device(one):
        before, local.device = current(), one
        yield
        local.device = before

    class Event:
        def __init__(self, **how):
            calls.append(("event", how))

        def record(self, stream):
            calls.append(("record", stream))

        def synchronize(self):
            calls.append(("synchronize", "event"))

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            calls.append(("wait_stream", other))

    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: calls.append(("register", current())) or answers["register"],
        cudaHostUnregister=lambda *_: calls.append(("unregister", current())) or 0,
    )
    for name, stub in {
        "cudart": lambda: runtime,
        "device": device,
        "set_device": lambda one: setattr(local, "device", one),
        "synchronize": lambda one: calls.append(("wait", one)),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda one: f"stream of {threading.current_thread().name}",
        "set_per_process_memory_fraction": lambda share, one: calls.append(("fraction", (share, one))),
        "get_device_properties": lambda one: SimpleNamespace(total_memory=1000),
        "max_memory_allocated": lambda one: 7,
        "max_memory_reserved": lambda one: 9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return SimpleNamespace(calls=calls, answers=answers, current=current)


def test_memory_is_page_locked_on_its_own_gpu(cuda):
    refused = []
    with host_memory(64, SECOND, refused.append) as memory:
        assert memory.numel() == 64 and cuda.current().index == 0
    assert cuda.calls == [("register", SECOND), ("wait", SECOND), ("unregister", SECOND)] and not refused


def test_memory_that_cannot_be_page_locked_is_used_and_said(cuda, monkeypatch):
    cuda.answers["register"] = 2
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    peak = Peak(SECOND)
    with host_memory(64_000_000, SECOND, peak.count_not_locked) as memory:
        memory.fill_(1)
    with hidden_states("host", (1_000_000, 4), torch.float32, SECOND, Path(), peak.count_not_locked) as states:
        states.fill_(1)
    assert cuda.calls == [("register", SECOND)] * 2
    memory = peak.beside(5, 6)
    assert memory["host_not_locked"] == 80_000_000 and memory["device_reserved"] == 9
    table = pairs("x")
    add_peaks(table, memory)
    assert "refused it for 80.0 MB" in list(table.columns[1].cells)[-1]
    said = evaluation_tables({"models": [{"path": "x", "peak_memory": memory}], "against": None})
    assert said == [said[0]] and "refused it for 80.0 MB" in said[0]
    assert "host_not_locked" not in Peak(torch.device("cpu")).beside(5, 6)


def test_both_threads_work_on_the_gpu_of_the_walk(cuda):
    with BlockBuffers(SECOND, 64) as buffers:
        assert buffers._reader.submit(cuda.current).result() == buffers._writer.submit(cuda.current).result() == SECOND


def test_who_waits_for_the_gpu_sleeps_and_new_memory_waits_for_the_callers_stream(cuda, monkeypatch):
    whole = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **how: whole(*shape, **how))
    with BlockBuffers(SECOND, 64) as buffers:
        buffers._reader.submit(buffers._make_on_device).result()
        assert ("wait_stream", f"stream of {threading.current_thread().name}") in cuda.calls
        buffers._store = lambda *_: None
        buffers.release(None, None)
    assert [how for name, how in cuda.calls if name == "event"] == [{"blocking": True}]


@pytest.mark.parametrize(("cap", "share"), [(None, 1.0), (250, 0.25), (5000, 1.0), (0, 0.0)])
def test_an_earlier_cap_of_the_gpu_is_taken_away(cuda, cap, share):
    with limited(SECOND, cap, 1 << 20):
        assert cuda.calls == [("fraction", (share, SECOND))]
    assert cuda.calls[1:] == [("fraction", (1.0, SECOND))]


@pytest.mark.parametrize(("stored", "has", "expected"), [
    (torch.bfloat16, True, torch.bfloat16), (torch.bfloat16, False, torch.float32),
    (torch.float16, False, torch.float16), (torch.float32, False, torch.float32),
])  # fmt: skip
def test_bfloat16_only_where_the_gpu_has_it(cuda, monkeypatch, tmp_path, stored, has, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.append((cuda.current(), how)) or has)
    model = opened(save_tiny(tmp_path / "source", "llama", stored))
    assert find_dtype("auto", SECOND, model.checkpoint) == expected
    assert all(one == (SECOND, {"including_emulation": False}) for one in asked)
    assert find_dtype("bfloat16", SECOND, model.checkpoint) == torch.bfloat16
    object.__setattr__(model, "device", SECOND), object.__setattr__(model, "dtype", expected)
    lacks = stored == torch.bfloat16 and not has
    assert model.place == "cuda:1" + " (in float32, because it has no bfloat16)" * lacks


@pytest.fixture
def work(tiny):
    """A model, and two windows to evaluate it on."""
    model, ids = opened(tiny("llama")), np.arange(32).reshape(2, 16) + 3
    return model, [Batch(ids, np.arange(15), ids.reshape(-1)[1:16])]


def test_heads_wait_for_the_hidden_states_without_a_clock(work, monkeypatch):
    """On a GPU copies to the host may be under way when the last block is done, whatever a clock waits for."""
    order = []
    monkeypatch.setattr(likelihood.Clock, "seconds", lambda self: {})
    monkeypatch.setattr(likelihood, "wait", lambda device: order.append("wait"))
    heads = likelihood._apply_heads
    monkeypatch.setattr(likelihood, "_apply_heads", lambda *given: order.append("heads") or heads(*given))
    model, batches = work
    placement, _ = choose(Workload((model,), 2, 16, needs_logits=True))
    token_likelihoods(model, batches, placement, on_block=lambda record: order.append(record["index"]))
    assert order == [0, 1, 2, "wait", "heads"]


def disks(monkeypatch, **kinds):
    """Has the system say that these folders are mounts of these kinds."""
    parts = [SimpleNamespace(mountpoint=path, fstype=kind) for path, kind in kinds.items()]
    monkeypatch.setattr(containers.psutil, "disk_partitions", lambda all: parts)


@pytest.mark.parametrize("states", ["device", "file"])
def test_hidden_states_in_a_file_lie_on_a_disk(work, monkeypatch, tmp_path, states):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir(), disk.mkdir()
    disks(monkeypatch, **{str(memory): "tmpfs", "/var": "ramfs", "/": "ext4", str(tmp_path): "tmpfs", str(disk): "xfs"})
    monkeypatch.setattr(containers.tempfile, "gettempdir", lambda: str(memory / "."))
    monkeypatch.chdir(disk)
    made, whole = [], walk.tempfile.TemporaryDirectory
    monkeypatch.setattr(walk.tempfile, "TemporaryDirectory", lambda **how: made.append(how["dir"]) or whole(**how))
    model, batches = work
    object.__setattr__(model.budget, "states", states)
    placement, _ = choose(Workload((model,), 2, 16, needs_logits=True))
    token_likelihoods(model, batches, placement)
    assert made == ([str(disk)] if states == "file" else []) and not list(disk.iterdir())


def test_without_a_disk_it_is_said_what_to_do(monkeypatch):
    disks(monkeypatch, **{"/": "tmpfs"})
    with pytest.raises(BudgetError, match=r"lies in memory, too: set TMPDIR to a folder on a disk"):
        containers.folder_on_disk()
