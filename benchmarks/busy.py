"""Pruning on a busy machine: `python benchmarks/busy.py [CHECKPOINT]` (default: the bundled demo model).

The checkpoint (32 x 512 tokens) and a random one of 16 blocks of width 1024 (8 x 256 tokens) are pruned on the quiet
machine and with as many busy programs beside as there are cores, in rounds. Each is done as the program chooses by
itself, and with torch's threads left as torch has them. Prints medians and ratios, and writes results/busy.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, commit, follow, llama, machine, random_tokens

CORES = len(os.sched_getaffinity(0))
AS = {"as we choose": {}, "as torch has them": {"OMP_DYNAMIC": "false"}}  # a setting of the user's own is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "lowmem_wanda/data/demo")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32, help="of the checkpoint (default: 32)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/busy.json")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = ["--text", random_tokens(folder / "tokens.npy", 8, 256), "--sequences", "8"]
        work = {
            arguments.checkpoint.name: [
                arguments.checkpoint,
                "--sequences",
                str(arguments.sequences),
                "--length",
                "512",
            ],
            f"{arguments.blocks} blocks": [llama(folder / "source", arguments.width, arguments.blocks), *tokens],
        }
        for _ in range(arguments.rounds):
            for busy in (0, CORES):
                with programs(busy):
                    for name, flags in work.items():
                        for how, settings in AS.items():
                            key = f"{name}, {'busy' if busy else 'quiet'}, {how}"
                            seconds.setdefault(key, []).append(pruned(folder / "out", flags, settings))
    rows: list[dict[str, Any]] = []
    for name in work:
        for how in AS:
            quiet, busy = (median(seconds[f"{name}, {state}, {how}"]) for state in ("quiet", "busy"))
            rows.append({"name": name, "threads": how, "quiet": quiet, "busy": busy, "ratio": busy / quiet})
    result = {
        "machine": machine(), "commit": commit(), "busy_programs": CORES, "rows": rows,
        "rounds": {key: [round(one, 2) for one in ones] for key, ones in seconds.items()},
    }  # fmt: skip
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']}; commit {result['commit']}; {CORES} busy programs; medians of {arguments.rounds}")
    print("| checkpoint | threads | quiet | busy | ratio |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['threads']} | {row['quiet']:.1f} | {row['busy']:.1f} | {row['ratio']:.2f} |")


@contextmanager
def programs(count: int) -> Iterator[None]:
    """So many programs that do nothing but keep a core busy."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for program in started:
            program.kill()
            program.wait()


def pruned(out: Path, flags: list[Any], settings: dict[str, str]) -> float:
    """The seconds of one pruning to 50 %."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, ROOT / "cli.py", "prune", flags[0], out, "--json", "--pattern", "50%", *flags[1:]]
    used = follow(command, env=inherited | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(out)
    return used.seconds


if __name__ == "__main__":
    main()
