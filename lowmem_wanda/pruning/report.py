"""The facts of a pruning, typed, as they stand in report.json: what was asked for, what was done, what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lowmem_wanda.checkpoint.checksum import checksum_in
from lowmem_wanda.checkpoint.directory import seen_share
from lowmem_wanda.checkpoint.output import FORMAT
from lowmem_wanda.pruning.experts import OfExperts
from lowmem_wanda.pruning.job import PruneJob
from lowmem_wanda.pruning.records import Left, PruneReport, Summary
from lowmem_wanda.streaming.model import versions
from lowmem_wanda.streaming.resources import Peak
from lowmem_wanda.streaming.walk import left_dense

if TYPE_CHECKING:
    from lowmem_wanda.pruning.plan import Plan

GIVES = (
    "A checkpoint of the same names, shapes and size in which the pruned weights are exactly zero; "
    "it loads and converts wherever the source does."
)
GIVES_TINY = (
    "A checkpoint of the same names, shapes and size in which the pruned weights are not zeros, but the smallest "
    "numbers of their dtype with random signs, for IQ2 types of llama.cpp alone."
)
MOVED = " The kept weights were updated, so they are not the source's."
GIVES_NOT = (
    "Zeros are stored like other numbers: files, a GGUF made of them and memory in use stay as large, "
    "and no program runs faster that does not use the zeros."
)


def started(job: PruneJob) -> dict[str, Any]:
    """A record of what will be done, for `on_start`."""
    return {
        "source": str(job.model.checkpoint.path),
        "blocks": job.model.depth,
        "device": job.model.place,
        "method": str(job.method),
        "pattern": str(job.pattern),
        "also": described(job),
        "calibration": job.calibration and job.calibration.facts,
        "norms": str(job.norms) if job.norms else None,
        **left(job),  # type: ignore[typeddict-item]
    }


def described(job: PruneJob) -> list[str]:
    """What is done beside the method, in words."""
    allocations = {
        "owl": "shares of blocks by their outliers (OWL)",
        "atp": "shares that rise from block to block (ATP)",
    }
    what = {"block": "its kept weights and vectors", "norms": "its vectors"}
    found = [allocations[job.allocation]] if job.allocation in allocations else []
    if job.model.skeleton.sees_images:
        found.append("text alone measured: images were not, and what sees them is copied as it is")
    if job.experts.observe.every:
        found.append("every expert measured on every token")
    if job.experts.observe.weighted:
        found.append("inputs of experts weighed by their routing weights (MoE-Pruner)")
    if job.recovers:
        found.append(f"each block recovered by training {what[job.recover]}, at most {job.recover_steps} steps")
    return found


def recovery(records: Sequence[Any]) -> str:
    """What recovering the blocks of some records did, in words; "" where none was recovered."""
    trained = [block["recovered"] for block in records if "recovered" in block]
    if not trained:
        return ""
    before, after = (sum(record[key] for record in trained) / len(trained) for key in ("before", "after"))
    text = f"mean error of a block {before:.2%} before, {after:.2%} after, on sequences held out"
    same = sum(record["before"] == record["after"] for record in trained)
    return text + (f"; {same} of {len(trained)} blocks stay as they were, where it did not help" if same else "")


def raised_damping(records: Sequence[Any]) -> str:
    """Where X^T X needed more damping than usual, in words; "" where it did not."""
    named = [(name, one["damping"]) for block in records for name, one in block["linears"].items() if "damping" in one]
    if not named:
        return ""
    name, damping = max(named, key=lambda pair: pair[1])
    return (
        f"X^T X of {len(named)} linears needed more damping than 1% of its diagonal, {name} {damping:.0%}: too few "
        "tokens, or inputs that go together; give more --sequences"
    )


def few_tokens(records: Sequence[Any], experts: OfExperts) -> str:
    """How many experts saw few tokens, in words; "" where none did."""
    seen: dict[tuple[int, int], list[int]] = {}
    for block in records:
        for linear in block["linears"].values():
            if "tokens" in linear:
                seen.setdefault((block["index"], linear["expert"]), []).append(linear["tokens"])
    few = {key: min(tokens) for key, tokens in seen.items() if min(tokens) < experts.min_tokens}
    if not few:
        return ""
    blocks = sorted({index for index, _ in few})
    unseen = sum(tokens == 0 for tokens in few.values())
    return (
        f"WARNING: {len(few)} of {len(seen)} experts, in {len(blocks)} blocks (first: block {blocks[0]}), saw fewer "
        f"than {experts.min_tokens} tokens, {unseen} of them none; they are scored by all tokens of their layer, or by "
        "magnitude: give more --sequences, or text of more kinds"
    )


def left(job: PruneJob) -> Left:
    """What is not pruned, not copied, and not looked at."""
    matrices = [tensor for tensor in job.model.outside if len(tensor.shape) > 1 and min(tensor.shape) > 1]
    parameters = sum(tensor.numel for tensor in job.model.checkpoint.tensors.values())
    return {
        "untouched": list(job.model.skeleton.untouched),
        "dense_outside": [tensor.name for tensor in matrices],
        "dense_outside_share": sum(tensor.numel for tensor in matrices) / parameters,
        "left_dense": left_dense(job.model),
        "left_out_files": job.companions.left_out,
        "source_seen": 1.0 if job.verify_source else seen_share(job.model.checkpoint),
    }


def build(
    job: PruneJob,
    plan: "Plan",
    peak: Peak,
    finished: Mapping[str, dict[str, Any]],
    arguments: dict[str, Any],
    timing: dict[str, Any],
) -> PruneReport:
    """The report of a job whose shards are all `finished`."""
    shards = dict(sorted(finished.items()))
    blocks: Any = [{"shard": name, **record} for name, record in shards.items() if "index" in record]
    return {
        "format": FORMAT,
        "kind": "prune",
        "source": str(job.model.checkpoint.path),
        "arguments": arguments,
        "versions": versions(),
        "summary": summarize(job, plan, shards, blocks),
        "calibration": {
            "text": arguments["text"],
            "sequences": plan.sequences,
            "length": plan.length,
            "tokens": plan.tokens,
            "norms": str(job.norms) if job.norms else None,
            "files": list(job.calibration.files) if job.calibration else [],
            "warnings": list(job.calibration.warnings) if job.calibration else [],
        },
        "imatrix": _imatrix(job, plan),
        "peak_memory": peak.beside(plan.host_peak, plan.device_peak),
        "memory": list(peak.series),
        "layout": {**asdict(plan.layout), "reading": timing["reading"]},
        "timing": timing,
        "copied_tensors": next(record["tensors"] for record in shards.values() if "tensors" in record),
        "copied_files": [str(file) for file in job.companions.files],
        **left(job),  # type: ignore[typeddict-item]
        "shards": [
            {"name": name, "nbytes": record["nbytes"], **checksum_in(record)} for name, record in shards.items()
        ],
        "blocks": blocks,
    }


def summarize(job: PruneJob, plan: "Plan", shards: Mapping[str, dict[str, Any]], blocks: list[Any]) -> Summary:
    """Sums over all matrices and blocks."""
    linears = [linear for block in blocks for linear in block["linears"].values()]
    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in linears)
    said = recovery(blocks), raised_damping(blocks), few_tokens(blocks, job.experts)
    zeros, filled = (sum(linear.get(key, 0) for linear in linears) for key in ("zeros", "filled"))
    return {
        "parameters": plan.parameters,
        "linears": len(linears),
        "weights": weights,
        "zeros": zeros,
        "filled": filled,
        "sparsity": (zeros + filled) / weights,
        "compared_per": job.pattern.compared_per,
        "also": [*described(job), *filter(None, said)],
        "keeps_bits": job.keeps_bits,
        "bytes": sum(record["nbytes"] for record in shards.values()),
        "seconds": sum(block["seconds"] for block in blocks),
        "forward_passes_per_block": sum(block["passes"] for block in blocks) / len(blocks),
        "gives": (GIVES_TINY if filled else GIVES) + ("" if job.keeps_bits else MOVED),
        "gives_not": GIVES_NOT,
    }


def _imatrix(job: PruneJob, plan: "Plan") -> dict[str, Any] | None:
    """Where the importance matrix is, which model it is of, and what it was computed on; None without one."""
    if job.imatrix is None or job.calibration is None:
        return None
    return {
        "file": str(job.imatrix),
        "of": "the dense model" if job.moved_on_dense else "the pruned model",
        "text": list(job.calibration.sources),
        "sequences": plan.sequences,
        "length": plan.length,
        "recorded_on": job.recorded_on,
    }
