"""The benchmarks run, at a size that says nothing, and their files say what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LONG = pytest.mark.skipif("BENCHMARKS" not in os.environ, reason="takes a minute; `make benchmarks` runs it")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(tmp_path, name, *flags):
    out = tmp_path / "results.json"
    subprocess.run([sys.executable, BENCHMARKS / name, *flags, "--out", out], check=True, capture_output=True)
    return json.loads(out.read_bytes())


def test_gpu_70b_in_its_smoke_size(tmp_path):
    result = run(tmp_path, "gpu_70b.py", "--shape", "smoke", "--device", "cpu", "--sequences", "4", "--length", "32")
    (row,) = result["runs"]
    assert row["passes"] == pytest.approx(1.744, abs=1e-3) and row["all_blocks_minutes"] > 0
    assert row["parts_per_block"].keys() == {
        "read",
        "upload",
        "target",
        "measure",
        "prune",
        "recover",
        "onward",
        "download",
        "write",
    }
    assert row["rates"].keys() >= {"product", "copy GB/s", "score GB/s", "2:4 GB/s", "50% GB/s"}


@LONG
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_overlap_in_a_small_size(tmp_path):
    flags = ("--width", "128", "--blocks", "3", "--length", "32", "--rounds", "1")
    result = run(tmp_path, "overlap.py", *flags)
    assert result["rows"].keys() == {"1 pread", "3 pread", "1 mmap", "3 mmap"}
    assert result["serial_over_overlapped"].keys() == {"pread", "mmap"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shrink_in_a_small_size(tmp_path):
    flags = ("--layers", "2", "--width", "256", "--inner", "256", "--vocabulary", "512", "--rounds", "1")
    rows = run(tmp_path, "shrink.py", *flags)["rows"]
    assert len(rows) == 5 and all(row["seconds"] > 0 and row["written_gb"] >= 0 for row in rows.values())


@pytest.mark.real
def test_experts_are_as_in_the_documents(shared, tmp_path):
    folder = shared / "models"
    files = ("mixed-moe-2.6m-gguf/moe-q8.gguf", "mixed-moe-2.6m-gguf/moe.imatrix.gguf", "mixed-moe-2.6m")
    rows = run(tmp_path, "experts.py", *(folder / file for file in files), shared / "corpora/moe-eval.npy")["rows"]
    page = (BENCHMARKS.parent / "lowmem_wanda/docs/llama-cpp.md").read_text("utf-8")
    for row in rows[1:]:
        assert (f"{row['kl']:.4f}" if row["score"][0] != "r" else f"{row['kl']:.3f}") in page


@LONG
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_copying_in_a_small_size(tmp_path):
    shape = ("--width", "128", "--hidden", "256", "--blocks", "2", "--vocabulary", "64", "--rounds", "1")
    rows = run(tmp_path, "copying.py", *shape)["rows"]
    assert len(rows) == 4 and rows["cp -r, sync"]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows.values())


@LONG
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_in_a_small_size(tmp_path):
    rows = run(tmp_path, "busy.py", "--width", "128", "--blocks", "2", "--rounds", "1", "--sequences", "2")["rows"]
    assert len(rows) == 4 and all(row["ratio"] == row["busy"] / row["quiet"] > 0 for row in rows)
