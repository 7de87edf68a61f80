"""What Linux alone has, taken away: the same bytes come of it, as on Windows and macOS."""

import os
import sys

import moe_ggufs
import numpy as np
import pytest
import torch
from helpers import digests, save_tiny

from lowmem_wanda import check, check_gguf, prune
from lowmem_wanda import shrink_gguf as shrink
from lowmem_wanda.checkpoint import writer
from lowmem_wanda.streaming import containers, resources

LINUX = ("posix_fadvise", "copy_file_range", "O_DIRECTORY", "O_NONBLOCK", "sched_getaffinity", "POSIX_FADV_SEQUENTIAL")


@pytest.fixture
def elsewhere(monkeypatch):
    """This process without what other systems do not have: calls of the C library, advice, locks, control groups."""
    for name in LINUX:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(writer, "library", lambda name: None)
    monkeypatch.setattr(resources, "library", lambda name: None)
    monkeypatch.setattr(containers, "left_by_groups", lambda: sys.maxsize)
    monkeypatch.setattr(resources, "left_by_groups", lambda: sys.maxsize)


def test_a_pruning_and_its_resumption_are_the_same_bytes(tmp_path, request):
    source = save_tiny(tmp_path / "source", "llama", torch.bfloat16)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 96, (6, 16)))
    settings = {"text": [str(tmp_path / "ids.npy")], "batch": 4, "device": "cpu"}
    prune(source, tmp_path / "here", **settings)
    request.getfixturevalue("elsewhere")

    class Stopped(Exception):
        pass

    def stop(record):
        if record["index"] == 1:
            raise Stopped

    with pytest.raises(Stopped):
        prune(source, tmp_path / "there", on_block=stop, states="file", **settings)
    prune(source, tmp_path / "there", states="file", **settings)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert not check(tmp_path / "there", source).problems


def test_experts_are_removed_alike(tmp_path, request):
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", 8)
    shrink(model, tmp_path / "here.gguf", "50%", score="aimer")
    request.getfixturevalue("elsewhere")
    shrink(model, tmp_path / "there.gguf", "50%", score="aimer")
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert not check_gguf(tmp_path / "there.gguf", model).problems
