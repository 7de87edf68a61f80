"""report.json: what was asked, what was done to every linear, what it cost."""

import platform
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

from lowmem_wanda import __version__
from lowmem_wanda.memory import Peak
from lowmem_wanda.plan import Plan
from lowmem_wanda.task import Task

GIVES = (
    "A checkpoint of the same names, shapes and size in which the pruned weights are exactly zero; "
    "it loads and converts wherever the source does."
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
        "source": str(task.checkpoint.path),
        "arguments": arguments,
        "versions": versions(),
        "summary": summarize(plan, shards, blocks),
        "calibration": {
            "text": arguments["--text"],
            "sequences": plan.sequences,
            "length": plan.length,
            "tokens": plan.tokens,
        },
        "peak_memory": {
            "host_predicted": plan.host_peak,
            "host_measured": peak.host,
            "device_predicted": plan.device_peak,
            "device_measured": peak.device,
        },
        "layout": {**asdict(plan.layout), "reading": task.limits.reading},
        "timing": timing,
        "copied_tensors": next(record["tensors"] for record in shards.values() if "tensors" in record),
        "copied_files": [str(file) for file in task.files],
        "shards": [
            {"name": name, "nbytes": record["nbytes"], "sha256": record["sha256"]} for name, record in shards.items()
        ],
        "blocks": blocks,
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
    zeros = sum(linear["zeros"] for linear in linears)
    return {
        "parameters": plan.parameters,
        "linears": len(linears),
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "bytes": sum(record["nbytes"] for record in shards.values()),
        "seconds": sum(block["seconds"] for block in blocks),
        "forward_passes_per_block": sum(block["passes"] for block in blocks) / len(blocks),
        "gives": GIVES,
        "gives_not": GIVES_NOT,
    }
