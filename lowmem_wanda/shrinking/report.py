"""The facts of a removal of experts, as they stand in report.json."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from lowmem_wanda.checkpoint.checksum import checksum_in
from lowmem_wanda.checkpoint.directory import seen_share
from lowmem_wanda.checkpoint.output import FORMAT, Output
from lowmem_wanda.llamacpp.expert_layers import routing_facts
from lowmem_wanda.llamacpp.shrink_report import FEW, routing_text
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.shrinking.refit import LEAST
from lowmem_wanda.sparsity import MEASURED
from lowmem_wanda.streaming.model import versions

COSTS = (
    "A quarter of the experts is near free on models with many; a half is a cliff for some: Moonlight-16B (64 experts) "
    "solves 83 % of GSM8K, 66 % without a quarter, 14 % without a half (llm-compressor, by REAP). Languages and "
    "subjects that the calibration saw little of, and multiple choice, go first.",
    "What it has to beat is a lower quantization of the whole model at the same size. Measure both.",
)


class ShrinkReport(TypedDict, total=False):
    """What was removed of a checkpoint. Bytes are those of tensors; layers have scores and sums by the source's ids."""

    format: int
    kind: str
    source: str
    target: str
    architecture: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    bytes: dict[str, int]
    files: list[dict[str, Any]]
    shards: list[dict[str, Any]]
    experts: dict[str, int]
    routing: dict[str, bool]
    routing_text: str
    how: str
    calibration: dict[str, Any] | None
    tokens: dict[str, Any] | None
    refit: dict[str, Any] | None
    imatrix: dict[str, Any]
    layers: list[dict[str, Any]]
    pattern: str
    blocks: list[dict[str, Any]]
    warnings: list[str]
    costs: list[str]
    commands: list[str]
    proof: str
    peak_memory: dict[str, int] | None
    layout: dict[str, Any]
    timing: dict[str, Any]
    copied_files: list[str]
    left_out_files: dict[str, str]
    without: list[str]
    seconds: float
    summary: dict[str, Any]


def started(job: ShrinkJob) -> dict[str, Any]:
    """A record of what will be done, for `on_start`."""
    return {
        "source": str(job.source.path),
        "blocks": job.model.depth,
        "layers": len(job.layers),
        "experts": job.layout.count,
        "kept": job.keep,
        "score": job.score,
        "device": job.model.place,
        "calibration": job.calibration and job.calibration.facts,
        "left_out_files": job.companions.left_out,
        "source_seen": 1.0 if job.verify_source else seen_share(job.source),
    }


def build(
    job: ShrinkJob, output: Output, placement: dict[str, Any], timing: dict[str, Any], peak: dict[str, int] | None
) -> ShrinkReport:
    """The report of a job whose shards are all written."""
    shards = dict(sorted(output.finished.items()))
    further = [one for record in shards.values() for one in record.get("further", ())]
    layers = [_layer(job, one) for one in [*(one for one in shards.values() if "kept" in one), *further]]
    names = [{"name": name, "nbytes": record["nbytes"], **checksum_in(record)} for name, record in shards.items()]
    tokens, begun = _tokens(layers), started(job)
    target, source = str(output.path), str(job.source.path)
    return {
        "format": FORMAT,
        "kind": "shrink",
        "source": source,
        "target": target,
        "architecture": type(job.model.skeleton.model).__name__,
        "arguments": {name: value for name, value in output.arguments.items() if name != "format"},
        "versions": versions(),
        "bytes": {"before": sum(file.stat().st_size for file in job.source.files), "after": _sum_of(names)},
        "files": names,
        "shards": names,
        **_chosen(job, begun["calibration"], len(layers), len(further)),  # type: ignore[typeddict-item]
        "calibration": begun["calibration"],
        "tokens": tokens,
        "refit": _refit(layers),
        "layers": layers,
        "warnings": _warnings(job, layers, tokens),
        "costs": list(COSTS),
        "commands": [_command("eval", target, "--against", source, "--text", "your.txt")],
        "proof": _command("check", target, "--against", source),
        "peak_memory": peak,
        "layout": placement,
        "timing": timing,
        "copied_files": [str(file) for file in job.companions.files],
        "left_out_files": job.companions.left_out,
        "without": list(job.layout.predicted) if job.mtp == "drop" else [],
        **_masks(job, shards),  # type: ignore[typeddict-item]
    }


def _masks(job: ShrinkJob, shards: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What was pruned of what is left: the records of its matrices, block by block, and their sparsity."""
    if job.pruning is None:
        return {"summary": {"sparsity": 0.0}}
    records = [one for one in shards.values() if "linears" in one]
    blocks = [{name: one[name] for name in ("index", "linears", "passes")} for one in records]
    linears = [linear for block in blocks for linear in block["linears"].values()]
    weights = [math.prod(linear["shape"]) for linear in linears]
    zeros = sum(linear["zeros"] for linear in linears)
    counts = {"linears": len(linears), "zeros": zeros, "weights": sum(weights)}
    return {
        "summary": {"sparsity": zeros / max(1, sum(weights)), **counts},
        "pattern": str(job.pruning.pattern),
        "blocks": blocks,
    }


def _chosen(job: ShrinkJob, calibration: Any, layers: int, predicting: int) -> dict[str, Any]:
    """How many experts are kept, what that means for programs, and what chose them."""
    return {
        "experts": {
            "before": job.layout.count, "kept": job.keep, "used": job.layout.used, "groups": job.layout.groups,
            "layers": layers, "predicting": predicting,
        },
        "routing": routing_facts(job.keep),
        "routing_text": routing_text(job.keep),
        "how": _how(job, calibration),
    }  # fmt: skip


def _sum_of(files: Sequence[Mapping[str, Any]]) -> int:
    return sum(file["nbytes"] for file in files)


def _command(*words: str) -> str:
    return shlex.join(["lowmem-wanda", *words])


def _how(job: ShrinkJob, calibration: Mapping[str, Any] | None) -> str:
    if job.planned:
        return f"plan {job.origin}"
    if job.known:
        return f"{job.score} from {job.origin}"
    return f"{job.score} on {', '.join(calibration['text'])}" if calibration else job.score


def _layer(job: ShrinkJob, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a layer, with the share of routed tokens that went to the experts that it loses."""
    sums, lost = record["sums"], None
    counts = None if sums is None else [int(one) for one in sums["tokens"]]
    if counts and sum(counts):
        lost = 1 - sum(counts[expert] for expert in record["kept"]) / sum(counts)
    fields = {name: record[name] for name in ("layer", "kept", "by", "scores", "sums")}
    fields |= {name: record[name] for name in ("refit", "protected") if name in record}
    return {**fields, "stem": job.layout.stem(record["layer"]), "tokens_lost": lost, "counts": counts}


def _tokens(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of all layers: tokens of an expert, experts that saw few or none, shares that went to dropped experts."""
    counts = np.array([one for layer in layers for one in layer["counts"] or ()])
    lost = {layer["layer"]: layer["tokens_lost"] for layer in layers if layer["tokens_lost"] is not None}
    if not lost:
        return None
    worst = max(lost, key=lambda layer: lost[layer])
    return {
        "least": int(counts.min()),
        "median": float(np.median(counts)),
        "few": int((counts < FEW).sum()),
        "unseen": int((counts == 0).sum()),
        "experts": len(counts),
        "lost_mean": float(np.mean(list(lost.values()))),
        "lost_most": lost[worst],
        "lost_most_in": worst,
    }


def _refit(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What fitting kept experts did: the mean share of layers' outputs that is lost before and after, and who was not.

    `held_out` are both on an eighth of the tokens, which nothing is fitted to; where that did not fall, the layers
    `not_taken`, all keep their weights. `not_fitted` are {layer: ids in the source} of the experts that saw too few
    tokens. None without a refit.
    """
    fitted = {layer["layer"]: layer["refit"] for layer in layers if "refit" in layer}
    if not fitted:
        return None
    before, after = (float(np.mean([one[key] for one in fitted.values()])) for key in ("before", "after"))
    few = {str(layer): one["few_tokens"] for layer, one in fitted.items() if one["few_tokens"]}
    held = [float(one) for one in np.mean([one["held_out"] for one in fitted.values()], axis=0)]
    left = [layer for layer, one in fitted.items() if not one["taken"]]
    return {"before": before, "after": after, "held_out": held, "not_taken": left, "not_fitted": few}


def _warnings(job: ShrinkJob, layers: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any] | None) -> list[str]:
    """What makes the choice doubtful."""
    found = list(job.calibration.warnings) if job.calibration else []
    if tokens and job.score in MEASURED and (few := tokens["few"]):
        found.append(
            f"{few} of {tokens['experts']} experts saw fewer than {FEW} tokens"
            + (f", {tokens['unseen']} of them none" if tokens["unseen"] else "")
            + ": where they rank is partly chance; give more --sequences, or text of more kinds"
        )
    few = {layer["layer"]: layer["refit"]["few_tokens"] for layer in layers if layer.get("refit", {}).get("few_tokens")}
    if few:
        named = "; ".join(f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in few.items())
        found.append(f"experts that saw fewer tokens than {LEAST}, or than their inputs, were not refitted: {named}")
    if job.score == "random":
        found.append("chosen at random, to compare with")
    if job.score == "frequency":
        found.append("counts alone say little where the router spreads tokens evenly; --score reap weighs outputs")
    aimed = [layer["layer"] for layer in layers if layer["by"] == "aimer"]
    if aimed and job.score != "aimer":
        found.append(
            f"layer {aimed[0]} predicts further tokens (MTP) and was not measured: its experts were chosen by their "
            "weights alone (aimer)"
        )
    return found
