"""Faults by a seeded schedule: 12 by default, as many as FAULTS says (`make faults`: 200).

After each, no file of a final name is broken, nothing looks finished that is not, and the same command gives the bytes of
an uninterrupted run.
"""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from helpers import digests, save_tiny

from lowmem_wanda import prune
from lowmem_wanda.checkpoint.reader import read_header
from lowmem_wanda.errors import limit_of_machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sends SIGKILL, forks, and limits memory")
COUNT = int(os.environ.get("FAULTS", "12"))
SETTINGS = [
    {"batch": 4},
    {"batch": 4, "statistics": "dense"},
    {"method": "magnitude"},
    {"batch": 4, "slots": 1, "read": "mmap"},
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    save_tiny(folder / "source", "llama", torch.bfloat16)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 96, (8, 16)))
    return folder


@pytest.fixture(scope="module")
def forked():
    """Runs a function in a process that has imported all there is already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowmem_wanda.pruning.prune", "faulty"])

    def run(function, *args):
        process = context.Process(target=function, args=args)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def expected(places):
    """The files of uninterrupted runs, by the place of their settings."""
    found = []
    for place, settings in enumerate(SETTINGS):
        prune(places / "source", places / f"whole-{place}", text=[str(places / "ids.npy")], device="cpu", **settings)
        found.append(digests(places / f"whole-{place}"))
    return found


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_fault_loses_nothing(places, forked, expected, tmp_path, seed):
    kind, at = faulty.schedule(seed)
    place = seed // len(faulty.KINDS) % len(SETTINGS)
    settings = {"text": [str(places / "ids.npy")], "device": "cpu", **SETTINGS[place]}
    source, out, answer = places / "source", tmp_path / "out", tmp_path / "answer"
    if kind == "changed":
        source = shutil.copytree(source, tmp_path / "source")
    code = forked(faulty.run, str(source), str(out), settings, kind, at, seed, str(answer))
    said = json.loads(answer.read_text()) if answer.exists() else ["killed", str(code)]
    assert said[0] != "BUG" or limit_of_machine_said(said[1]), said
    assert answer.exists() or code == -9
    whole(out, expected[place] if said[0] == "done" else None)
    if kind == "changed":
        for file in (places / "source").iterdir():
            shutil.copy2(file, source / file.name)
        if said[0] == "done":  # the change came after the last byte was read
            return
    prune(source, out, **settings)
    assert digests(out) == expected[place], (kind, at, said)


def limit_of_machine_said(text):
    return bool(limit_of_machine(RuntimeError(text))) or "MemoryError" in text


def whole(out: Path, expected):
    """No file of a final name is broken, and only what is finished looks so."""
    for shard in out.glob("*.safetensors"):
        assert read_header(shard)
    for file in out.glob("*.json"):
        json.loads(file.read_bytes())
    if expected is not None:
        assert digests(out) == expected
    elif (out / "config.json").exists():
        assert (out / "report.json").exists()
