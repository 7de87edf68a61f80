"""report.json and report.html: what was asked, what was done to every linear, what it cost."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

from lowmem_wanda import __version__
from lowmem_wanda.checkpoint.directory import read_json
from lowmem_wanda.checkpoint.output import REPORT
from lowmem_wanda.checkpoint.writer import explained, write_bytes, write_json
from lowmem_wanda.cli.page import page
from lowmem_wanda.data.windows import Windows
from lowmem_wanda.errors import OutputError
from lowmem_wanda.pruning.job import Task
from lowmem_wanda.pruning.plan import Plan
from lowmem_wanda.streaming.model import Work
from lowmem_wanda.streaming.resources import Peak

PAGE = "report.html"
UNSEEDED = ("method", "pattern", "group", "statistics", "sequences")

GIVES = (
    "A checkpoint of the same names, shapes and size in which the pruned weights are exactly zero; "
    "it loads and converts wherever the source does."
)
GIVES_TINY = (
    "A checkpoint of the same names, shapes and size in which the pruned weights are no zeros, but the smallest "
    "numbers of their dtype with random signs, for IQ2 types of llama.cpp alone."
)
GIVES_NOT = (
    "Zeros are stored like other numbers: files, a GGUF made of them and memory in use stay as large, "
    "and no program runs faster that does not use the zeros."
)


def build(
    task: Task,
    plan: Plan,
    peak: Peak,
    finished: dict[str, dict[str, Any]],
    arguments: dict[str, Any],
    timing: dict[str, Any],
) -> dict[str, Any]:
    """The report of a finished job, as JSON. Memory in bytes, times in seconds; `timing` is that of the last run."""
    shards = dict(sorted(finished.items()))
    blocks = [{"shard": name, **record} for name, record in shards.items() if "index" in record]
    return {
        "kind": "prune",
        "source": str(task.checkpoint.path),
        "arguments": arguments,
        "versions": versions(),
        "summary": summarize(plan, shards, blocks),
        "calibration": {
            "text": arguments["--text"],
            "sequences": plan.sequences,
            "length": plan.length,
            "tokens": plan.tokens,
            "norms": str(task.norms) if task.norms else None,
        },
        "imatrix": _imatrix(task, plan),
        "peak_memory": peak.beside(plan.host_peak, plan.device_peak),
        "memory": list(peak.series),
        "layout": {**asdict(plan.layout), "reading": task.limits.reading},
        "timing": timing,
        "copied_tensors": next(record["tensors"] for record in shards.values() if "tensors" in record),
        "copied_files": [str(file) for file in task.files],
        "shards": [
            {"name": name, "nbytes": record["nbytes"], "sha256": record["sha256"]} for name, record in shards.items()
        ],
        "blocks": blocks,
    }


def _imatrix(task: Task, plan: Plan) -> dict[str, Any] | None:
    """Where the importance matrix is, of which model, and on what it was computed."""
    if task.imatrix is None or task.calibration is None:
        return None
    return {
        "file": str(task.imatrix),
        "of": "the dense model" if task.moved_on_dense else "the pruned model",
        "text": list(task.calibration.sources),
        "sequences": plan.sequences,
        "length": plan.length,
        "recorded_on": task.recorded_on,
    }


def versions() -> dict[str, str]:
    """What the job ran on."""
    return {
        "lowmem-wanda": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def summarize(plan: Plan, shards: dict[str, dict[str, Any]], blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over all linears and blocks, and what they amount to."""
    linears = [linear for block in blocks for linear in block["linears"].values()]
    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in linears)
    zeros, filled = (sum(linear.get(key, 0) for linear in linears) for key in ("zeros", "filled"))
    return {
        "parameters": plan.parameters,
        "linears": len(linears),
        "weights": weights,
        "zeros": zeros,
        "filled": filled,
        "sparsity": (zeros + filled) / weights,
        "bytes": sum(record["nbytes"] for record in shards.values()),
        "seconds": sum(block["seconds"] for block in blocks),
        "forward_passes_per_block": sum(block["passes"] for block in blocks) / len(blocks),
        "gives": GIVES_TINY if filled else GIVES,
        "gives_not": GIVES_NOT,
    }


def evaluation(text: Windows | None, models: Sequence[dict[str, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The report of an evaluation: what `evaluate` gives of each model, and `tasks` where they were run."""
    computed = {f"--{key}": models[-1][key] for key in ("device", "dtype") if key in models[-1]}
    return {
        "kind": "eval",
        "arguments": {**arguments, **computed},
        "versions": versions(),
        **_windows(text),
        "against": next((model["dense"] for model in models if "dense" in model), None),
        "models": [{key: value for key, value in model.items() if key != "dense"} for model in models],
    }


def comparison(
    dense: Work,
    text: Windows,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The report of a comparison; `spread` is over the rows that differ in their seed alone."""
    spread = []
    for row in rows:
        alike = [other for other in rows if all(other[key] == row[key] for key in UNSEEDED)]
        if len(alike) > 1 and row is alike[0]:
            values = [other["perplexity"] for other in alike]
            name = row["name"].replace(f" seed {row['seed']}", "")
            mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
            spread.append({"name": name, "rows": len(alike), "perplexity_mean": mean, "perplexity_sd": sd})
    return {
        "kind": "compare",
        "source": str(dense.checkpoint.path),
        "arguments": {**arguments, "--device": settings["device"], "--dtype": settings["dtype"]},
        "settings": dict(settings),
        "versions": versions(),
        **_windows(text),
        "dense": rows[0]["dense"] if rows else None,
        "rows": list(rows),
        "spread": spread,
    }


def read_rows(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a comparison that was begun in a folder. Raises OutputError where its settings are others."""
    if not (folder / REPORT).exists():
        return []
    report = read_json(folder / REPORT)
    before = report.get("settings", {})
    for key, value in json.loads(json.dumps(settings)).items():
        if before.get(key) != value:
            raise OutputError(
                f"{folder}: holds rows of another {key}; repeat the first command or give another directory"
            )
    return list(report["rows"])


def report_folder(path: str | Path, kind: str) -> Path:
    """A folder that takes a report: new, empty, or with one of the same kind. Raises OutputError."""
    folder = Path(path)
    with explained(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            held = folder / REPORT
            if not held.is_file() or read_json(held).get("kind") != kind:
                raise OutputError(f"{folder}: exists and holds no report of {kind}; give a new or empty directory")
    return folder


def save(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.html and report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / PAGE, page(report).encode("utf-8"))
    write_json(folder / REPORT, report)


def _windows(text: Windows | None) -> dict[str, Any]:
    if text is None:
        return {}
    count, length = text.tokens.shape
    return {"text": list(text.sources), "convention": text.convention, "length": length, "windows": count}
