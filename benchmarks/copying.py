"""Pruning without a forward beside a copy: `python benchmarks/copying.py` (a copy.py would hide Python's own).

A random checkpoint of 8 blocks of Llama-3-8B's shape (4 GB in bfloat16) is copied (`cp -r` and `sync`), and pruned by
magnitude and by the norms of an importance matrix, in rounds, each time from a cold cache. Ours waits until its files
are on the disk (fsync). Prints medians and their multiples of the copy, and writes results/copying.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from checkpoints import random_llama
from measure import ROOT, Usage, commit, drop_cache, follow, machine, size_of

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.llamacpp.imatrix import About, Entry, write
from lowmem_wanda.llamacpp.names import gguf_names

COPY = "cp -r, sync"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=14336)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/copying.json")
    arguments = parser.parse_args()
    heads = arguments.width // 128
    shape = {"width": arguments.width, "hidden": arguments.hidden, "heads": heads, "kv_heads": max(1, heads // 4)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source = random_llama(folder / "source", blocks=arguments.blocks, vocab=arguments.vocabulary, **shape)
        matrix = random_matrix(source, folder / "matrix.gguf")
        prune: list[str | Path] = [sys.executable, ROOT / "cli.py", "prune", source, folder / "out", "--json"]
        commands: dict[str, list[str | Path]] = {
            COPY: ["sh", "-c", 'cp -r "$0" "$1" && sync', source, folder / "out"],
            "magnitude 2:4": [*prune, "--method", "magnitude"],
            "wanda 2:4, --norms": [*prune, "--norms", matrix],
            "magnitude 50%": [*prune, "--method", "magnitude", "--pattern", "50%"],
        }
        rounds = [{name: run(command, source, folder / "out") for name, command in commands.items()}
                  for _ in range(arguments.rounds)]  # fmt: skip
        size = size_of(source)
    rows = {name: figures([one[name] for one in rounds], [one[COPY] for one in rounds]) for name in commands}
    result = {
        "machine": machine(), "commit": commit(), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "checkpoint_mb": round(size / 1e6), "rows": rows,
    }  # fmt: skip
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']}; commit {result['commit']}; {result['checkpoint_mb']} MB; {arguments.rounds} rounds")
    print("| | seconds | of each round's copy | CPU seconds | anonymous MB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.1f} | {row['ratio']:.2f} | {row['cpu']:.1f} | {row['anonymous_mb']:.0f} |")


def random_matrix(source: Path, path: Path) -> Path:
    """An importance matrix of random norms for all matrices in blocks."""
    shapes = {name: one.shape for name, one in Checkpoint(source).tensors.items()
              if ".layers." in name and len(one.shape) == 2}  # fmt: skip
    names, rng = gguf_names(list(shapes), "a benchmark"), np.random.default_rng(0)
    entries = [(names[name], Entry(rng.random((1, shape[1])) + 0.5, np.array([1]))) for name, shape in shapes.items()]
    write(path, {name: entry.sums.shape for name, entry in entries}, entries, About(("random",), 1, 1))
    return path


def run(command: list[str | Path], source: Path, out: Path) -> Usage:
    """One run from a cold cache; what it wrote is removed."""
    os.sync()
    drop_cache(source)
    used = follow(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(out)
    return used


def figures(runs: list[Usage], copies: list[Usage]) -> dict[str, Any]:
    """Medians; `ratio` is that of the seconds to those of the copy in the same round."""
    return {
        "seconds": median(one.seconds for one in runs),
        "ratio": median(one.seconds / copy.seconds for one, copy in zip(runs, copies, strict=True)),
        "cpu": median(one.cpu_seconds for one in runs),
        "anonymous_mb": median(one.anonymous for one in runs) / 1e6,
        "rounds": [round(one.seconds, 2) for one in runs],
    }


if __name__ == "__main__":
    main()
