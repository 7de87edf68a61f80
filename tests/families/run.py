"""Verifies many model types, each in a process of its own, and keeps what was found: `python tests/families/run.py`."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process cannot use its parent's threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from families.build import IMAGES, known
from families.verify import CRASHED, verify_apart
from transformers.utils import logging

SECONDS = 180  # that a type may take
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Runs the command line; gives the exit code, 1 where a type is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help='such as "mixtral", or "vl:llava" for images and text (default: all)')
    parser.add_argument("--out", type=Path, default=ROOT / "tests/families/families.json")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the files")
    parser.add_argument("--again", action="store_true", help="also those that --out has already")
    options = parser.parse_args()
    kept = read(options.out, options.dtype)
    prepare()
    for family in options.types or known():
        if options.again or family not in kept["types"]:
            kept["types"][family] = apart(family, getattr(torch, options.dtype))
            options.out.write_text(json.dumps(kept, indent=1))
            print(line(family, kept["types"][family]), flush=True)
    print(summary(kept["types"]))
    return int(any(found["outcome"] in ("WRONG", CRASHED) for found in kept["types"].values()))


def read(path: Path, dtype: str) -> dict[str, Any]:
    """What a run with the same versions has found before."""
    made_with = {name: metadata.version(name) for name in ("transformers", "torch")} | {"dtype": dtype}
    if path.exists() and (kept := json.loads(path.read_text()))["made_with"] == made_with:
        return kept
    return {"made_with": made_with, "types": {}}


def prepare() -> None:
    """Imports what takes long, once for all processes, and makes transformers quiet."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    verify_apart("llama")


def apart(family: str, dtype: torch.dtype) -> dict[str, Any]:
    """The outcome of a type in a forked process, which is killed where it takes too long."""
    start = time.perf_counter()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        os._exit(_child(family, dtype, writing))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    ended = {"outcome": CRASHED, "reason": f"its process ended with status {status} after {SECONDS} s at most"}
    found = json.loads(text) if text else ended
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _child(family: str, dtype: torch.dtype, writing: int) -> int:
    try:
        found = verify_apart(family, dtype)
    except Exception:  # of the harness itself
        found = {"outcome": CRASHED, "reason": traceback.format_exc()}
    with os.fdopen(writing, "w") as pipe:
        json.dump(found, pipe)
    return 0


def line(family: str, found: dict[str, Any]) -> str:
    """One line of a type."""
    reason = " ".join(found["reason"].split())
    return f"{family:28} {found['outcome']:10} {found['seconds']:5} s  {reason[-150:] if found['outcome'] == CRASHED else reason[:150]}"


def kind(family: str) -> str:
    """What a name stands for."""
    return "image-text" if family.startswith(IMAGES) else "variants" if "+" in family else "causal"


def summary(types: dict[str, Any]) -> str:
    """How many types have which outcome, by kind."""
    lines = []
    for title in ("causal", "variants", "image-text"):
        counts = Counter(found["outcome"] for name, found in types.items() if kind(name) == title)
        lines.append(f"{title}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
