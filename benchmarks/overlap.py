"""Serial against overlapped: `python benchmarks/overlap.py`.

Prunes one random checkpoint with one block buffer (reading, computing and writing in turn) and with three, each with
both ways of reading, interleaved. The calibration is short, so that disk and computing take about as long. The source's
cached pages are dropped before every run, and the walk drops the pages behind it, so that everything comes from the
disk. Prints medians and ratios, and writes results/overlap.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, commit, follow, llama, machine, random_tokens, size_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/overlap.json")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source = llama(folder / "source", arguments.width, arguments.blocks)
        tokens = random_tokens(folder / "tokens.npy", arguments.sequences, arguments.length)
        size = size_of(source)
        for _ in range(arguments.rounds):
            for slots, way in ((1, "pread"), (3, "pread"), (1, "mmap"), (3, "mmap")):
                runs.setdefault(f"{slots} {way}", []).append(run(folder, source, tokens, slots, way))
    rows = {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in runs.items()}
    result = {
        "machine": machine(), "commit": commit(), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "checkpoint_mb": round(size / 1e6), "rows": rows,
        "serial_over_overlapped": {w: rows[f"1 {w}"]["wall"] / rows[f"3 {w}"]["wall"] for w in ("pread", "mmap")},
    }  # fmt: skip
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print("| buffers, reading | " + " | ".join(rows["1 pread"]) + " |")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    print("serial / overlapped:", {way: round(ratio, 2) for way, ratio in result["serial_over_overlapped"].items()})


def run(folder: Path, source: Path, tokens: Path, slots: int, way: str) -> dict[str, float]:
    """The seconds by part and the peaks of one pruning, with nothing of the checkpoint cached."""
    os.sync()
    for file in source.iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, ROOT / "cli.py", "prune", source, folder / "out", "--json", "--text", tokens,
               "--slots", str(slots), "--read", way]  # fmt: skip
    with (folder / "report.json").open("wb") as file:
        used = follow(command, stdout=file, stderr=subprocess.DEVNULL)
    timing = json.loads((folder / "report.json").read_bytes())["timing"]
    subprocess.run(["rm", "-r", folder / "out"], check=True)
    parts = timing["parts"]
    computing = sum(parts[part] for part in ("embed", "measure", "prune", "onward"))
    return {
        "wall": timing["wall"], "read": parts["read"], "compute": computing, "write": parts["write"] + parts["copy"],
        "busy": timing["compute_busy"], "cpu": used.cpu_seconds,
        "anonymous_mb": used.anonymous / 1e6, "mapped_mb": used.mapped / 1e6,
        "disk_read_mb": used.disk_read / 1e6, "disk_written_mb": used.disk_written / 1e6,
    }  # fmt: skip


if __name__ == "__main__":
    main()
