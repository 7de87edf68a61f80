"""What `shrink` shows: its lines, its table, and what it closes with."""

from collections.abc import Mapping
from typing import Any

from lowmem_wanda.cli.terminal import (
    add_needs,
    add_peaks,
    calibration_text,
    duration,
    number,
    pairs,
    printable,
    ranges,
    short_duration,
    size,
)


def about_checkpoint(facts: Mapping[str, Any]) -> str:
    """The lines before the work."""
    line = f"{about(facts)}, by {facts['score']}, on {facts['device']}"
    if calibration := facts["calibration"]:
        line += f"\ncalibration: {calibration_text(calibration)}"
        line += "".join(f"\nwarning: {warning}" for warning in calibration["warnings"])
    for file, why in facts["left_out_files"].items():
        line += f"\nnot copied: {file}, which {why}"
    return line


def block_line(record: Mapping[str, Any], depth: int) -> str:
    """One aligned line for a finished block."""
    digits = len(str(depth))
    what = f"keeps {ranges(record['kept'])}" if "kept" in record else "has no experts"
    what = "is measured" if record.get("measured") else what
    seconds, host = short_duration(record["seconds"]), size(record["host_bytes"])
    return f"block {record['index'] + 1:>{digits}}/{depth}  {seconds:>7}  host {host:>9}  {what}"


def about(facts: Mapping[str, Any]) -> str:
    """The line before the work."""
    what = f"{facts['layers']} layers with {facts['experts']} experts, of which {facts['kept']} are kept"
    return f"{facts['source']}: {what}"


def lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each layer: what chose, the tokens that went to dropped experts, and the ids that are kept."""
    width = len(str(max(layer["layer"] for layer in report["layers"])))
    made = []
    for layer in report["layers"]:
        lost = layer["tokens_lost"]
        text = f"  {lost:7.2%} of its tokens went to dropped ones" if lost is not None else ""
        made.append(f"layer {layer['layer']:>{width}}  {layer['by']:>9}{text}  keeps {ranges(layer['kept'])}")
    return made


def table(report: Mapping[str, Any]) -> Any:
    """The table of what was removed and what that means."""
    experts, before, after = report["experts"], report["bytes"]["before"], report["bytes"]["after"]
    table = pairs(f"shrunk: {report['target']}")
    layers = f"{experts['layers']} layers of {report['architecture']}"
    if experts["predicting"]:
        layers += f", {experts['predicting']} of them for predicting further tokens (MTP)"
    kept = kept_text(experts)
    table.add_row("experts", f"{kept} of {layers}; {experts['used']} at work for a token, as before")
    table.add_row("chosen by", printable(report["how"]))
    files = f" in {len(report['files'])} files" if len(report["files"]) > 1 else ""
    table.add_row("size", f"{size(before)} before, {size(after)} now{files} ({after / before:.1%})")
    if tokens := report["tokens"]:
        lost = f"{tokens['lost_mean']:.2%} of routed tokens went to dropped experts"
        table.add_row("tokens", f"{lost}; at most {tokens['lost_most']:.2%}, in layer {tokens['lost_most_in']}")
    else:
        move = "--score reap" if report.get("shards") else "--from imatrix.gguf"
        table.add_row("tokens", f"not known what went to dropped experts; {move} tells")
    if refit := report.get("refit"):
        table.add_row("refit", refit_text(refit))
    if "pattern" in report:
        table.add_row("zeros", zeros_text(report))
    if protected := protected_text(report):
        table.add_row("protected", protected)
    if matrix := report.get("imatrix"):
        table.add_row("imatrix", imatrix_text(matrix))
    table.add_row("routing", report["routing_text"])
    table.add_row("time", duration(report["seconds"]))
    if memory := report.get("peak_memory"):
        add_peaks(table, memory)
    for warning in report["warnings"]:
        table.add_row("warning", printable(warning))
    for cost in report["costs"]:
        table.add_row("costs", cost)
    return table


def kept_text(experts: Mapping[str, Any]) -> str:
    """How many experts are kept, in words: of each group, where routers choose among groups first."""
    groups = experts.get("groups", 1)
    if groups == 1:
        return f"{experts['kept']} of {experts['before']} kept in each"
    each, of = experts["kept"] // groups, experts["before"] // groups
    return f"{experts['kept']} of {experts['before']} kept, {each} of {of} in each of {groups} groups, in each"


def refit_text(refit: Mapping[str, Any]) -> str:
    """What fitting kept experts did, in words."""
    before, after = refit["held_out"]
    text = (
        f"layers lose {before:.2%} of the squares of their outputs before it, {after:.2%} after it, in the mean over "
        f"an eighth of the calibration that is held out ({refit['before']:.2%} and {refit['after']:.2%} over all of it)"
    )
    left = refit["not_taken"]
    return text + (f"; without use, and so not taken, in layers {ranges(left)}" if left else "")


def zeros_text(report: Mapping[str, Any]) -> str:
    """What was pruned of what is left, in words."""
    summary = report["summary"]
    return (
        f"{report['pattern']} by wanda in {summary['linears']} matrices that are left: {number(summary['zeros'])} of "
        f"{number(summary['weights'])} weights ({summary['sparsity']:.2%}); they do not make the files smaller"
    )


def protected_text(report: Mapping[str, Any]) -> str:
    """The experts that are kept because of outlying outputs, in words; "" where none were to be protected."""
    if all("protected" not in layer for layer in report["layers"]):
        return ""
    found = {layer["layer"]: layer["protected"] for layer in report["layers"] if layer.get("protected")}
    named = "; ".join(f"layer {layer}: {ranges(ids)}" for layer, ids in found.items())
    return f"kept for outlying outputs: {named}" if named else "no expert puts out outlying values"


def imatrix_text(matrix: Mapping[str, Any]) -> str:
    """The importance matrix that was written, in words."""
    text = f"{matrix['file']}, of the smaller model: {matrix['sequences']} sequences of {matrix['length']} tokens"
    return printable(text + (f", without {', '.join(matrix['left_out'])}" if matrix["left_out"] else ""))


def closing(report: Mapping[str, Any], page: Any) -> list[str]:
    """The lines after the table: how to measure, how to prove, where the report is."""
    return [
        measuring(report),
        *(f"  {command}" for command in report["commands"]),
        "Prove it:",
        f"  {report['proof']}",
        f"report: {page}",
    ]


def measuring(report: Mapping[str, Any]) -> str:
    """The line before the commands that measure."""
    if (written := report.get("commands_write")) is None and report.get("shards"):
        return "Measure what it costs (perplexity, and KL divergence from the whole model):"
    disk = f"; the first command writes about {size(written)}" if written else ""
    return f"Measure what it costs (KL divergence from the whole model; your own text after -f is better{disk}):"


def plan_table(source: str, plan: Any) -> Any:
    """The table that says what a removal of experts would need, and give."""
    table = pairs(f"plan: {source}, without {plan.experts - plan.kept} of {plan.experts} experts")
    table.add_row("layers", f"{plan.layers} with experts, of {plan.blocks} blocks; {plan.used} at work for a token")
    table.add_row("size", f"{size(plan.before)} before, {size(plan.after)} after ({plan.after / plan.before:.1%})")
    fused = "runs" if plan.routing["fused_cuda_routing"] else "does not run"
    multiple = "" if plan.routing["multiple_of_8"] else "not "
    table.add_row("routing", f"{plan.kept} experts: llama.cpp's fused CUDA routing {fused}; {multiple}a multiple of 8")
    table.add_row("calibration", f"{plan.sequences} sequences of {plan.length}: {number(plan.tokens)} tokens, "
        f"{number(plan.tokens_per_expert)} for an expert in the mean")  # fmt: skip
    table.add_row("layout", str(plan.layout))
    add_needs(table, plan)
    return table
