"""Threads by the load of the machine: what is set, what is kept, and that results do not depend on it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import digests, save_tiny

from lowmem_wanda.cli import load

CLI = [sys.executable, str(Path(__file__).resolve().parents[2] / "cli.py")]


@pytest.fixture
def environment(monkeypatch):
    """An environment without settings of threads, four cores, and no torch yet."""
    made = {}
    monkeypatch.setattr(load, "os", SimpleNamespace(environ=made))
    monkeypatch.setattr(load, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(load, "_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(load, "exact_products", lambda: True)  # as on Intel's CPUs
    return made


def command(name="prune", dtype="auto", target="nowhere"):
    return argparse.Namespace(command=name, device="auto", dtype=dtype, target=target)


@pytest.mark.parametrize(
    ("busy", "given", "expected"),
    [
        (0.2, command(), {}),
        (1.1, command(), {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "3"}),
        (3.7, command("eval"), {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}),
        (3.7, command(dtype="bfloat16"), {"OMP_WAIT_POLICY": "passive"}),
        (3.7, command("compare"), {"OMP_WAIT_POLICY": "passive"}),
        (3.7, argparse.Namespace(command="check"), {}),
    ],
)
def test_threads_sleep_and_are_fewer_where_others_work(environment, monkeypatch, busy, given, expected):
    monkeypatch.setattr(load, "busy_cores", lambda cores: busy)
    load.settle(given)
    assert environment == expected


@pytest.mark.parametrize("setting", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS"])
def test_who_sets_threads_keeps_the_setting(environment, monkeypatch, setting):
    monkeypatch.setattr(load, "busy_cores", lambda cores: 4.0)
    environment[setting] = "7"
    load.settle(command())
    assert environment == {setting: "7"}


@pytest.mark.parametrize(("held", "expected"), [('{"threads": 3}', "3"), ('{"threads": 64}', None), ("[", None)])
def test_a_job_goes_on_with_the_threads_that_it_began_with(environment, monkeypatch, tmp_path, held, expected):
    (tmp_path / "job.json").write_text(held)
    monkeypatch.setattr(load, "busy_cores", lambda cores: 0.0)
    load.settle(command(target=str(tmp_path)))
    assert environment.get("OMP_NUM_THREADS") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_busy_program_is_seen():
    cores = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert load.busy_cores(cores) >= load.BUSY
        finally:
            other.kill()


@pytest.mark.skipif(not load.exact_products(), reason="products depend on the number of threads here")
def test_long_products_are_the_same_with_one_thread_and_two():
    code = (
        "import torch, hashlib, lowmem_wanda.streaming.resources; torch.manual_seed(0); "
        "made = torch.randn(64, 8192) @ torch.randn(1024, 8192).t(); print(hashlib.sha256(made.numpy()).hexdigest())"
    )
    free = {name: value for name, value in os.environ.items() if not name.startswith(load.SETTINGS)}
    made = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env=free | {"OMP_NUM_THREADS": threads}
        ).stdout
        for threads in "12"
    ]
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="needs two cores")
def test_a_job_that_began_with_one_thread_is_the_same_with_two_and_goes_on(token_file, tmp_path):
    source = save_tiny(tmp_path / "source", "llama")
    for threads in "12":
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        flags = ["--text", str(token_file)]
        subprocess.run([*CLI, "prune", source, tmp_path / threads, *flags], check=True, env=environment)
    one, two = (digests(tmp_path / threads) for threads in "12")
    shards = {name for name in one if name.endswith(".safetensors")}
    assert shards and all(one[name] == two[name] for name in shards)
    assert json.loads((tmp_path / "1/job.json").read_text())["threads"] == 1
    (tmp_path / "1/config.json").unlink()
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(load.SETTINGS)}
    subprocess.run([*CLI, "prune", source, tmp_path / "1", *flags], check=True, env=quiet)
