"""The command `shrink`."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_wanda import CHECKPOINT_SCORES, EXPERT_SCORES
from lowmem_wanda.cli.options import MACHINE, add_calibration, add_command, add_machine, machine, positive, taken
from lowmem_wanda.cli.options import size as byte_count
from lowmem_wanda.cli.terminal import (
    Bar,
    add_peaks,
    calibration_text,
    duration,
    number,
    pairs,
    printable,
    ranges,
    short_duration,
    shown,
    size,
    time_text,
)
from lowmem_wanda.errors import PatternError

MEGA = 10**6  # bytes
BOTH = ("drop_experts", "keep_experts", "scores_from", "score", "seed", "plan", "write_plan")
OF_GGUF = ("imatrix_out", "split_size")
OF_CHECKPOINT = ("record", "mtp", "statistics", "refit", "text", "sequences", "length", "verify_source")


def add(commands: Any) -> None:
    text = "write a smaller copy of a mixture of experts, without some of its experts"
    command = add_command(commands, "shrink", text, run)
    add = command.add_argument
    add("source", metavar="ckpt_dir", help="folder of a safetensors checkpoint, or a GGUF (of a split one, the first "
        "file)")  # fmt: skip
    add("target", metavar="out_dir", help="new folder, or that of an interrupted run; of a GGUF, a new file")
    add_numbers(command)
    add("--score", choices=dict.fromkeys((*CHECKPOINT_SCORES, *EXPERT_SCORES)), help="how experts are scored. Of what "
        "they put out: reap (mean of gate times norm), weighted (its sum), squares (sum of its squares), ean (sum of "
        "norms), man, msan (means of norms, of their squares), frequency (tokens). Of weights alone, without data: "
        "aimer. Or random (default: reap, of a GGUF ean, which is estimated from --from)")  # fmt: skip
    add("--from", dest="scores_from", metavar="FILE", help="scores that --record wrote, or the importance matrix of "
        "this very model (.gguf), instead of a forward pass; of a GGUF, the latter")  # fmt: skip
    add("--record", metavar="FILE", help="write what was measured of all experts, to shrink again in seconds (.json)")
    add("--plan", metavar="FILE", help='JSON of the experts to keep, {"layer": [ids]}, instead of a score')
    add("--write-plan", metavar="FILE", help="write the choice as such a plan, too")
    add("--mtp", choices=("keep", "drop"), default="keep", help="layers that predict further tokens: keep them, with "
        "as many experts, or drop them (default: keep)")  # fmt: skip
    add("--statistics", choices=("dense", "block"), default="dense", help="what layers are measured on: the whole "
        "model (dense), or what the smaller blocks before them put out (block) (default: dense)")  # fmt: skip
    add("--refit", action="store_true", help="fit the kept experts' down projections to what the whole layer put out; "
        "then these weights are not the source's")  # fmt: skip
    add_calibration(command, seeds="seed of the calibration sample, and of --score random")
    add("--verify-source", action="store_true", help="know the source again by all of its bytes when the job goes on")
    add_machine(command)
    add("--imatrix-out", metavar="FILE", help="of a GGUF, write the importance matrix of --from cut alike, to quantize "
        "again (.gguf)")  # fmt: skip
    add("--split-size", type=byte_count, metavar="SIZE", help="of a GGUF, write several files of at most this size, "
        "such as 20GB (default: one file)")  # fmt: skip
    command.set_defaults(default_of=command.get_default)


def add_numbers(command: argparse.ArgumentParser) -> None:
    """Adds the flags that say how many experts are removed."""
    number = command.add_mutually_exclusive_group()
    number.add_argument("--drop-experts", metavar="SHARE", help="experts to remove from each layer: a share (25%%, "
        "0.25), rounded down to whole experts, or a number")  # fmt: skip
    number.add_argument("--keep-experts", type=positive, metavar="N", help="experts to keep in each layer instead")


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import is_gguf

    if is_gguf(arguments.source):
        _require_defaults(arguments, (*OF_CHECKPOINT, *MACHINE), "a GGUF")
        return _run_gguf(arguments)
    _require_defaults(arguments, OF_GGUF, "a checkpoint")
    return _run_checkpoint(arguments)


def _require_defaults(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    """Raises PatternError for a flag that `what` is given has no use for."""
    for name in names:
        if getattr(arguments, name) != arguments.default_of(name):
            raise PatternError(
                f"--{name.replace('_', '-')} has no use here: {arguments.source} is {what}; leave it out"
            )


def _run_checkpoint(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import shrink
    from lowmem_wanda.cli.page import PAGE
    from lowmem_wanda.cli.shrink_page import save_page

    page = Path(arguments.target) / PAGE
    settings = {**taken(arguments, *BOTH, *OF_CHECKPOINT), **machine(arguments)}
    with Bar("shrinking") as bar:

        def begin(facts: Mapping[str, Any]) -> None:
            bar.line(about_checkpoint(facts))
            bar.begin(facts["blocks"])

        report = shrink(
            arguments.source,
            arguments.target,
            **settings,
            on_start=begin,
            on_block=lambda record: bar.show(record, block_line(record, bar.total)),
            on_report=lambda report: save_page(page, report),
        )
    return shown(arguments, report, table(report), *closing(report, page))


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
    seconds, host = short_duration(record["seconds"]), size(record["host_bytes"])
    return f"block {record['index'] + 1:>{digits}}/{depth}  {seconds:>7}  host {host:>9}  {what}"


def _run_gguf(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import shrink_gguf
    from lowmem_wanda.cli.shrink_page import save_page

    if arguments.score not in (None, *EXPERT_SCORES):
        raise PatternError(
            f"--score {arguments.score} is of what experts put out, which a GGUF is not computed for; give one of "
            f"{', '.join(EXPERT_SCORES)}"
        )
    settings = taken(arguments, *BOTH, *OF_GGUF)
    if settings["seed"] == arguments.default_of("seed"):
        settings["seed"] = None
    with Bar("writing MB") as bar:
        report = shrink_gguf(
            arguments.source,
            arguments.target,
            **settings,
            on_start=lambda facts: bar.line(about(facts)),
            on_progress=_Progress(bar),
        )
    page = Path(f"{arguments.target}.report.html")
    save_page(page, report)
    return shown(arguments, report, *lines(report), table(report), *closing(report, page))


class _Progress:
    """Moves a bar by megabytes that were written."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.at = bar, -1

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self.at < 0:
            self.bar.begin(-(-record["total"] // MEGA))
        if (done := record["done"] // MEGA) != self.at:
            self.at = done
            self.bar.show({"index": done - 1})


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
    table.add_row("experts", f"{experts['kept']} of {experts['before']} kept in each of {layers}; {experts['used']} at "
        "work for a token, as before")  # fmt: skip
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
    table.add_row("routing", report["routing_text"])
    table.add_row("time", duration(report["seconds"]))
    if memory := report.get("peak_memory"):
        add_peaks(table, memory)
    for warning in report["warnings"]:
        table.add_row("warning", printable(warning))
    for cost in report["costs"]:
        table.add_row("costs", cost)
    return table


def refit_text(refit: Mapping[str, Any]) -> str:
    """What fitting kept experts did, in words."""
    before, after = refit["before"], refit["after"]
    return f"layers lose {before:.1%} of the squares of their outputs before it, {after:.1%} after it, in the mean"


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


def show_plan(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """What `plan` shows of a removal of experts."""
    from lowmem_wanda import plan_shrink

    wanted = ("drop_experts", "keep_experts", "refit", "text", "sequences", "length", "seed")
    order = "dense" if arguments.statistics == arguments.default_of("statistics") else arguments.statistics
    plan = plan_shrink(arguments.source, statistics=order, **taken(arguments, *wanted), **settings)
    return shown(arguments, asdict(plan), plan_table(arguments.source, plan))


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
    table.add_row("computing", f"{plan.flops / 1e12:.3g} TFLOP")
    table.add_row("time", time_text(plan))
    table.add_row("host memory", f"{size(plan.host_peak)} predicted at most")
    if plan.device_peak:
        table.add_row("device memory", f"{size(plan.device_peak)} predicted at most")
    table.add_row("disk", f"{size(plan.disk)}: {size(plan.read)} are read, {size(plan.written)} written")
    return table
