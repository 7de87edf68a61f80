"""A model of many tiny blocks: memory, descriptors and threads stay as they are after the first (`make soak`: 300)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import save_tiny

BLOCKS = int(os.environ.get("SOAK", "60"))
FIRST = 20  # block from which on nothing may grow
CODE = """
import json, os, sys, threading
from pathlib import Path
from lowmem_wanda import prune
seen = []
def note(record):
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    seen.append([int(fields["RssAnon"].split()[0]), len(os.listdir("/proc/self/fd")), threading.active_count()])
prune(sys.argv[1], sys.argv[2], text=[sys.argv[3]], device="cpu", batch=4, on_block=note, statistics=sys.argv[4])
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("order", ["block", "dense", "sequential"] if "SOAK" in os.environ else ["sequential"])
def test_nothing_grows_with_depth(tmp_path, order):
    source = save_tiny(tmp_path / "source", "llama", torch.bfloat16, shard="1GB", num_hidden_layers=BLOCKS)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 96, (16, 32)))
    command = [sys.executable, "-c", CODE, source, tmp_path / "out", tmp_path / "ids.npy", order]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(seen) == BLOCKS
    memory, files, threads = (np.array(column) for column in zip(*seen[FIRST:], strict=True))
    assert files.max() <= files.min() + 4 and threads.max() <= threads[0]  # files that are read, written and mapped
    # KB; the records of a block, which the report has, take 20
    assert memory[-10:].mean() < memory[:10].mean() + 2000 + 25 * (BLOCKS - FIRST), memory.tolist()
