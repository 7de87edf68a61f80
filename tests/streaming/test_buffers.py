"""Blocks on their way: order, buffers given back, errors brought forward, and what each layout can do."""

import threading

import numpy as np
import pytest
import torch

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import CheckpointError, OutputError
from lowmem_wanda.streaming.buffers import BlockBuffers
from lowmem_wanda.streaming.states import hidden_states

CPU = torch.device("cpu")


@pytest.fixture
def blocks(tmp_path):
    """Nine blocks of two tensors, all in one file; the values of block i are i."""
    file = tmp_path / "data"
    file.write_bytes(b"".join(np.full(8, index, "<f4").tobytes() for index in range(9)))
    return [
        [
            (Tensor("a", file, "F32", (2, 3), 32 * index, 24),),
            (Tensor("b", file, "F32", (2,), 32 * index + 24, 8),),
        ]
        for index in range(9)
    ]


@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("way", ["pread", "mmap"])
def test_every_block_comes_and_goes_once_in_order(blocks, hosts, way):
    written = []
    with BlockBuffers(CPU, 128, hosts, read_by=way) as ring:
        for slot in ring.prefetch(blocks):
            slot.stored["a"].mul_(2)
            ring.release(slot, lambda slot: written.append((slot.stored["a"].tolist(), slot.stored["b"].tolist())))
        ring.drain()
    assert written == [([[2.0 * i] * 3] * 2, [float(i)] * 2) for i in range(9)]
    assert ring.spent.keys() == {"read"}


@pytest.mark.parametrize(("hosts", "devices"), [(3, 2), (3, 1), (1, 1)])
def test_blocks_are_copied_to_a_device_and_back(blocks, hosts, devices):
    """A host's memory plays the device: what is computed with is not what is read into, or written from."""
    written = []
    with BlockBuffers(CPU, 128, hosts, devices) as ring:
        ring._beside = True
        for slot in ring.prefetch(blocks):
            assert slot.stored["a"].data_ptr() == slot.device.data_ptr() != slot.host.data_ptr()
            slot.stored["b"].add_(1)
            ring.release(slot, lambda slot: written.append((slot.stored["b"][0].item(), slot.stored["a"].data_ptr())))
            assert slot.stored["a"].data_ptr() == slot.host.data_ptr()
        ring.drain()
    assert [value for value, _ in written] == [index + 1.0 for index in range(9)]
    assert ring.spent.keys() == {"read", "upload", "download"}


def test_a_buffer_is_not_read_into_before_it_is_written(blocks):
    written, go = [], threading.Event()

    def slow(slot):
        go.wait(5)
        written.append(slot.stored["b"].tolist())

    with BlockBuffers(CPU, 128, 2) as ring:
        for number, slot in enumerate(ring.prefetch(blocks[:3])):
            ring.release(slot, slow)
            if number == 0:
                threading.Timer(0.2, go.set).start()
    assert written == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_three_buffers_work_at_the_same_time(blocks):
    """While one block is computed, the next one is read and the last one written: a barrier that only three pass."""
    meet = threading.Barrier(3, timeout=5)
    with BlockBuffers(CPU, 128, 3) as ring:
        fetch = ring._fetch
        ring._fetch = lambda tensors: (meet.wait() if tensors is blocks[2] else None, fetch(tensors))[1]
        for number, slot in enumerate(ring.prefetch(blocks[:3])):
            if number == 1:
                meet.wait()
            ring.release(slot, (lambda slot: meet.wait()) if number == 0 else None)


@pytest.mark.parametrize("hosts", [1, 3])
def test_what_the_writer_raises_ends_the_walk(blocks, hosts):
    def fail(slot):
        raise OSError("full")

    with pytest.raises(OSError, match="full"), BlockBuffers(CPU, 128, hosts) as ring:
        for slot in ring.prefetch(blocks):
            ring.release(slot, fail)


def test_what_the_reader_raises_comes_with_its_block(blocks):
    seen = 0
    with pytest.raises(CheckpointError, match="cut short"), BlockBuffers(CPU, 128) as ring:
        blocks[2][0][0].file.write_bytes(bytes(64))
        for slot in ring.prefetch(blocks):
            seen += 1
            ring.release(slot, None)
    assert seen == 2


def test_leaving_early_wakes_a_reader_that_waits(blocks):
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), BlockBuffers(CPU, 128, 1) as ring:
        for _ in ring.prefetch(blocks):
            raise KeyboardInterrupt
    assert threading.active_count() == before


def test_a_full_disk_leaves_no_hidden_states(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowmem_wanda.streaming.states.preallocate", full)
    with (
        pytest.raises(OutputError, match="the disk is full"),
        hidden_states("file", (4, 8), torch.float32, torch.device("cpu"), tmp_path, lambda nbytes: None),
    ):
        pass
    assert not list(tmp_path.iterdir())
