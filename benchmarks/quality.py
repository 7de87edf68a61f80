"""What each method costs and keeps on real models: `python benchmarks/quality.py ../shared`.

Every way of pruning is run as a process of its own, with each pattern, on two dense models: craftgpt-5m, calibrated and
evaluated on its own token ids, and stories260K, on stories that lie apart. Then all prunings of a pattern are evaluated
beside the dense model. Prints a Markdown table for each model and writes results/quality.json: perplexity with its
standard error, KL divergence from the dense model, seconds of pruning, and the peak of anonymous memory. The file is
written after each pattern, and `--resume` leaves out what it has.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ROOT, commit, follow, machine

from lowmem_wanda import evaluate

PATTERNS = ("50%", "60%", "4:8", "2:4")
WAYS: dict[str, list[str]] = {
    "magnitude": ["--method", "magnitude"],
    "wanda": [],
    "wanda, variant": ["--variant"],
    "ria": ["--method", "ria"],
    "wanda, owl": ["--allocation", "owl"],
    "wanda, atp": ["--allocation", "atp"],
    "wanda + swaps": ["--refine", "swaps"],
    "sparsegpt": ["--method", "sparsegpt"],
    "wanda + lsq": ["--update", "lsq"],
    "wanda + swaps + lsq": ["--refine", "swaps", "--update", "lsq"],
    "alps": ["--method", "alps"],
    "alps, sequential": ["--method", "alps", "--statistics", "sequential"],
    "alps, owl": ["--method", "alps", "--allocation", "owl"],
    "alps + norms": ["--method", "alps", "--recover", "norms"],
    "wanda + block": ["--recover", "block"],
    "alps + block": ["--method", "alps", "--recover", "block"],
}
OF_SHARES = ("variant", "owl", "atp")  # words of ways that N:M has no use for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path, help="the folder with models and corpora")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--windows", type=int, help="evaluate on so many windows (default: 512, and 64 of the stories)")
    parser.add_argument("--resume", action="store_true", help="keep the patterns that the file has")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quality.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text())["rows"] if arguments.resume else []
    done = {(row["model"], row["pattern"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for model in models(arguments.shared, Path(folder)):
            for pattern in (one for one in arguments.patterns if (model["name"], one) not in done):
                rows += measured(model, pattern, Path(folder), arguments)
                result = {"machine": machine(), "commit": commit(), "rows": rows}
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{model['name']} {pattern} done", file=sys.stderr, flush=True)
    print(table(rows))


def models(shared: Path, folder: Path) -> list[dict[str, Any]]:
    """The two models, what they are calibrated and evaluated on, and the matrices that 4:8 does not fit."""
    stories = (shared / "corpora/tinystories/calibration.txt").read_text().split("<|endoftext|>")
    for name, part in (("calibration", stories[:600]), ("evaluation", stories[600:800])):
        (folder / f"{name}.txt").write_text("<|endoftext|>".join(part))
    return [
        {
            "name": "craftgpt-5m", "path": shared / "models/craftgpt-5m", "sequences": 128, "length": 64,
            "calibration": shared / "corpora/craftgpt-calib.npy", "text": shared / "corpora/craftgpt-eval.npy",
            "windows": 512, "unfit": "",
        },
        {
            "name": "stories260K", "path": shared / "models/stories260K", "sequences": 64, "length": 512,
            "calibration": folder / "calibration.txt", "text": folder / "evaluation.txt",
            "windows": 64, "unfit": "*down_proj*",
        },
    ]  # fmt: skip


def measured(model: dict[str, Any], pattern: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model and a pattern, with one of the dense model."""
    rows, made = [], []
    for way in arguments.only:
        if ":" in pattern and any(word in way for word in OF_SHARES):
            continue
        target = folder / re.sub(r"\W+", "-", f"{model['name']} {pattern} {way}")
        flags = [
            "--text",
            model["calibration"],
            "--sequences",
            str(model["sequences"]),
            "--length",
            str(model["length"]),
        ]
        flags += ["--exclude", model["unfit"]] if pattern == "4:8" and model["unfit"] else []
        command = [sys.executable, ROOT / "cli.py", "prune", model["path"], target, "--pattern", pattern, *flags]
        with open(folder / "log", "w") as log:
            usage = follow([*command, *WAYS[way]], stdout=log, stderr=log)
        seconds = json.loads((target / "report.json").read_text())["summary"]["seconds"]
        rows.append({"model": model["name"], "pattern": pattern, "way": way, "seconds": seconds,
                     "cpu_seconds": usage.cpu_seconds, "anonymous": usage.anonymous})  # fmt: skip
        made.append(target)
    windows = arguments.windows or model["windows"]
    reports = evaluate(made, text=[model["text"]], against=model["path"], length=model["length"], windows=windows)
    for row, one in zip(rows, reports, strict=True):
        row |= {key: one[key] for key in ("perplexity", "perplexity_stderr", "kl_mean", "kl_mean_stderr")}
    dense = reports[0]["dense"]
    return [{"model": model["name"], "pattern": pattern, "way": "dense",
             **{key: dense[key] for key in ("perplexity", "perplexity_stderr")}}, *rows]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each model: perplexities by pattern, then KL, seconds and memory of the last pattern."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = {(row["way"], row["pattern"]): row for row in rows if row["model"] == model}
        patterns = list(dict.fromkeys(pattern for _, pattern in mine))
        dense = mine["dense", patterns[0]]
        lines += ["", f"{model}, dense {dense['perplexity']:.2f} +- {dense['perplexity_stderr']:.2f}", ""]
        lines += ["| | " + " | ".join(patterns) + f" | KL at {patterns[-1]} | seconds | CPU seconds | memory |"]
        lines += ["|---" * (len(patterns) + 5) + "|"]
        for way in dict.fromkeys(way for way, _ in mine if way != "dense"):
            cells = [
                f"{mine[way, one]['perplexity']:.2f} +- {mine[way, one]['perplexity_stderr']:.2f}"
                if (way, one) in mine
                else ""
                for one in patterns
            ]
            last = next(mine[way, one] for one in reversed(patterns) if (way, one) in mine)
            kl = f"{last['kl_mean']:.3f}" if (way, patterns[-1]) in mine else ""
            cells += [kl, f"{last['seconds']:.1f}", f"{last['cpu_seconds']:.1f}", f"{last['anonymous'] / 1e6:.0f} MB"]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
