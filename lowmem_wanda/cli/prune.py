"""The commands `prune` and `plan`: their flags, what they run and what they show."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_wanda import ALLOCATIONS, METHODS, ORDERS, QUALITIES, RECOVERIES, REFINEMENTS, UPDATES
from lowmem_wanda.cli.gguf import show_outline
from lowmem_wanda.cli.options import (
    GIVEN,
    MACHINE,
    Given,
    add_calibration,
    add_command,
    add_machine,
    add_selection,
    add_source,
    machine,
    positive,
    rate,
    taken,
)
from lowmem_wanda.cli.options import (
    size as size_flag,
)
from lowmem_wanda.cli.shrink import add_numbers, show_plan
from lowmem_wanda.cli.terminal import (
    Bar,
    add_needs,
    add_peaks,
    calibration_text,
    duration,
    expected,
    number,
    pairs,
    shown,
    size,
)
from lowmem_wanda.errors import OutputError, PatternError

PRUNING = (
    "method", "refine", "update", "variant", "quality", "recover", "recover_steps", "allocation", "pattern", "group",
    "min_tokens", "all_experts", "gate_weighted",
    "text", "sequences", "length", "seed", "statistics", "include", "exclude", "norms", "imatrix", "zeros",
)  # fmt: skip
ABSENT = ("vram", "ram", "flops", "disk")  # of a machine that is not here


def add(commands: Any) -> None:
    prune = add_command(commands, "prune", "write a pruned copy of a checkpoint", run_prune)
    add_source(prune)
    prune.add_argument("target", metavar="out_dir", help="new folder, or the folder of an interrupted run to continue")
    prune.add_argument("--verify-source", action="store_true", help="know the source again by all of its bytes when "
        "the job goes on (default: by 1.6%% of what is more than 256 MiB)")  # fmt: skip
    plan = add_command(commands, "plan", "say what pruning would need, without reading weights", run_plan)
    add_source(plan)
    for command in (prune, plan):
        add_pruning(command)
        add_machine(command)
    add_absent(plan)
    add_numbers(plan)
    plan.add_argument("--refit", action="store_true", help="with --drop-experts: plan for shrink --refit")
    plan.set_defaults(default_of=plan.get_default)


def add_pruning(command: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is pruned, and what it is measured on."""
    add = command.add_argument
    add("--pattern", default="2:4", help="N:M to keep N of each M inputs (2:4, 4:8), or a share to prune (0.5, "
        "60%%) (default: 2:4)")  # fmt: skip
    add(
        "--method",
        default="wanda",
        action=Given,
        choices=METHODS,
        help="how weights are scored, or solved for (default: wanda)",
    )
    add("--refine", default="none", choices=REFINEMENTS, help="improve the mask by swaps that lower the output's error "
        "(default: none)")  # fmt: skip
    add("--update", default="none", choices=UPDATES, help="fit kept weights to the dense outputs by least "
        "squares (default: none)")  # fmt: skip
    add("--recover", choices=RECOVERIES, help="train what is kept of each pruned block, or its norms alone, towards "
        "what the dense block put out (default: none)")  # fmt: skip
    add("--recover-steps", type=positive, default=200, metavar="N", help="the most steps for a block (default: 200)")
    add("--quality", choices=QUALITIES, help="choose for me: fast is wanda, good is alps, best is alps with --recover "
        "block")  # fmt: skip
    add("--allocation", default="uniform", choices=ALLOCATIONS, help="how a share is divided among blocks: evenly, "
        "by their outliers (owl), rising (atp) (default: uniform)")  # fmt: skip
    add("--variant", action="store_true", help="with wanda, prune each row up to a share of its scores, as a variant "
        "in the paper's code")  # fmt: skip
    add("--min-tokens", type=positive, default=8, metavar="N", help="score an expert that saw fewer tokens by all "
        "tokens of its layer (default: 8)")  # fmt: skip
    add("--all-experts", action="store_true", help="measure every expert on every token, not on its own alone")
    add("--gate-weighted", action="store_true", help="weigh the inputs of experts by their routing weights")
    add("--group", choices=("row", "matrix"),
        help="what is compared for a share (default: row for wanda, matrix for magnitude)")  # fmt: skip
    add("--norms", metavar="FILE", help="importance matrix of the dense model (.gguf, .dat), whose norms replace "
        "calibration and forward passes")  # fmt: skip
    add("--imatrix", metavar="FILE", help="write the pruned model's importance matrix too, for llama.cpp (.gguf, .dat)")
    add("--zeros", default="exact", choices=("exact", "signed-tiny"), help="what pruned weights become: +0.0, or the "
        "smallest number with a random sign, only for IQ2 types of llama.cpp (default: exact)")  # fmt: skip
    add_calibration(command, seeds="seed of the calibration sample, and of the signs of --zeros signed-tiny")
    add("--statistics", default="block", choices=ORDERS, help="what matrices are measured on: the dense block after "
        "pruned blocks (block, as the paper's code); the dense model (dense); also the pruned matrices before them in "
        "the block (sequential) (default: block)")  # fmt: skip
    add_selection(command)


def add_absent(command: argparse.ArgumentParser) -> None:
    """Adds the flags that describe a machine that is not here."""
    add = command.add_argument
    add(
        "--vram",
        type=size_flag,
        metavar="SIZE",
        help="plan for another machine, with a GPU of so much memory, such as 24GB",
    )
    add("--ram", type=size_flag, metavar="SIZE", help="plan for another machine, with so much host memory free")
    add("--flops", type=rate, metavar="RATE", help="operations of that machine in a second, in the dtype that is "
        "computed in, such as 80T")  # fmt: skip
    add("--disk", type=rate, metavar="RATE", help="bytes that its disk reads, or writes, in a second, such as 3GB/s")


def run_prune(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import prune
    from lowmem_wanda.cli.page import PAGE, save_page

    _require_one_choice(arguments)
    settings = {**taken(arguments, *PRUNING, "verify_source"), **machine(arguments)}
    made: list[Mapping[str, Any]] = []
    with Bar("pruning") as bar:

        def finish(report: Mapping[str, Any]) -> None:
            made.append(report)
            save_page(arguments.target, report)

        def begin(facts: Mapping[str, Any]) -> None:
            bar.line(about(facts))
            bar.begin(facts["blocks"], expected(facts.get("seconds")))

        report = prune(
            arguments.source,
            arguments.target,
            **settings,
            on_start=begin,
            on_block=lambda record: bar.show(record, block_line(record, bar.total)),
            on_report=finish,
        )
    try:
        if not (Path(arguments.target) / PAGE).exists():
            save_page(arguments.target, report)
        return shown(arguments, report, closing(report, arguments.target))
    except (LookupError, TypeError, ValueError, AttributeError):
        if made:
            raise
        again = f"delete {arguments.target} and run again"  # the report of a finished job, read from its file
        raise OutputError(f"{arguments.target}: its report.json is not what prune wrote; {again}") from None


def run_plan(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import is_gguf, plan

    if is_gguf(arguments.source):
        _require_defaults(arguments)
        return show_outline(arguments)
    if arguments.drop_experts is not None or arguments.keep_experts is not None:
        return show_plan(arguments, {**taken(arguments, *ABSENT), **machine(arguments)})
    _require_one_choice(arguments)
    facts: dict[str, Any] = {}
    settings = {**taken(arguments, *PRUNING, *ABSENT), **machine(arguments)}
    found = plan(arguments.source, **settings, on_start=facts.update)
    return shown(arguments, asdict(found), plan_table(found, facts))


def _require_one_choice(arguments: argparse.Namespace) -> None:
    """Raises PatternError for a method that is given beside a quality, be it the usual one."""
    if arguments.quality is not None and "method" in getattr(arguments, GIVEN, ()):
        raise PatternError(f"--quality {arguments.quality} chooses the method; leave --method out")


def _require_defaults(arguments: argparse.Namespace) -> None:
    """Raises PatternError for a flag of pruning beside a GGUF, which is not pruned."""
    for name in (*PRUNING, *MACHINE, *ABSENT):
        if getattr(arguments, name) != arguments.default_of(name):
            raise PatternError(
                f"--{name.replace('_', '-')} says how a checkpoint is pruned, and {arguments.source} is a GGUF, whose "
                "experts `shrink` removes; leave it out, or give the checkpoint's folder"
            )


def about(facts: Mapping[str, Any]) -> str:
    """The lines before the work: what is pruned and how, on which device, with which text."""
    line = f"{facts['source']}: {facts['blocks']} blocks, {facts['method']} {facts['pattern']}, on {facts['device']}"
    line += "".join(f"\nwith {also}" for also in facts["also"])
    if calibration := facts["calibration"]:
        shape = f"{calibration['sequences']} sequences of {calibration['length']} tokens"
        line += f"\ncalibration: {shape} from {', '.join(calibration['text'])}"
        line += "".join(f"\nwarning: {warning}" for warning in calibration["warnings"])
    if untouched := facts["untouched"]:
        line += f"\nnot pruned, as the model does not use them: {len(untouched)} tensors, {untouched[0]} and so on"
    for file, why in facts["left_out_files"].items():
        line += f"\nnot copied: {file}, which {why}"
    if facts.get("resumed") and (seen := facts["source_seen"]) < 1:
        line += (
            f"\nthe source is known again by {seen:.1%} of its bytes; --verify-source reads all, from the first run on"
        )
    return line


def block_line(record: Mapping[str, Any], depth: int) -> str:
    """One aligned line for a finished block."""
    linears = record["linears"].values()
    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in linears)
    gone = sum(linear["zeros"] + linear.get("filled", 0) for linear in linears) / max(1, weights)
    also = f"  error {record['recovered']['after']:.2%}" if "recovered" in record else ""
    what = "tiny" if any("filled" in linear for linear in linears) else "zero"
    digits = len(str(depth))
    return (
        f"block {record['index'] + 1:>{digits}}/{depth}  {len(linears):2d} linears  {gone:6.2%} {what}"
        f"  {record['seconds']:8.2f} s  host {size(record['host_bytes']):>9}{also}"
    )


def closing(report: Mapping[str, Any], target: str) -> Any:
    """The table that says what was pruned, its size, what it gives and what it does not give."""
    from rich.markup import escape

    summary, arguments = report["summary"], report["arguments"]
    table = pairs(f"pruned: {target}")
    table.add_row("method", f"{arguments['method']} {arguments['pattern']}, compared per {summary['compared_per']}")
    for also in summary.get("also", ()):
        table.add_row("", also)
    table.add_row("calibration", calibration_text(report["calibration"]))
    table.add_row(
        "pruned",
        f"{summary['linears']} linears, {number(summary['zeros'] + summary['filled'])} of "
        f"{number(summary['weights'])} weights "
        f"({summary['sparsity']:.2%}); {number(summary['parameters'])} parameters in all",
    )
    if made := report.get("imatrix"):
        table.add_row("imatrix", escape(f"{made['file']}, of {made['of']}: ") + calibration_text(made))
        if lacking := made.get("left_out"):
            table.add_row("", f"without {len(lacking)} weights, such as {lacking[0]}, whose inputs are not measured")
    if dense := report["dense_outside"]:
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        names = escape(", ".join(dense[:3]))
        table.add_row(
            "left dense", f"{report['dense_outside_share']:.1%} of the parameters, outside the blocks: {names}{more}"
        )
    if inside := report.get("left_dense"):
        for why in dict.fromkeys(inside.values()):
            found = [name for name, reason in inside.items() if reason == why]
            table.add_row("left dense", f"{len(found)} in the blocks, {escape(found[0])} and so on: {why}")
    table.add_row("size", f"{size(summary['bytes'])} in {len(report['shards'])} shards, as large as the source")
    table.add_row("time", timing_text(summary["seconds"], report["timing"]))
    table.add_row("passes", f"{summary['forward_passes_per_block']:.2f} forward passes per block")
    add_peaks(table, report["peak_memory"])
    table.add_row("gives", summary["gives"])
    table.add_row("does not", summary["gives_not"])
    return table


def timing_text(seconds: float, timing: Mapping[str, Any]) -> str:
    """The time of all blocks, what was expected, and the share of it that was computing."""
    busy = f", computing in {timing['compute_busy']:.0%} of it" if timing["serial"] else ""
    return duration(seconds) + busy + (f" ({expected(timing['expected'])} expected)" if timing.get("expected") else "")


def plan_table(plan: Any, facts: Mapping[str, Any]) -> Any:
    """The table that says what pruning would need."""
    from rich.markup import escape

    table = pairs(f"plan: {facts['source']}, {facts['method']} {facts['pattern']}")
    for also in facts["also"]:
        table.add_row("with", escape(also))
    table.add_row("parameters", f"{number(plan.parameters)}, of which {number(plan.prunable)} can be pruned")
    table.add_row("blocks", f"{plan.blocks}, the largest {size(plan.largest_block)}")
    calibration = (
        f"{plan.sequences} sequences of {plan.length}: {number(plan.tokens)} tokens" if plan.tokens else "none"
    )
    table.add_row("calibration", escape(f"norms of {facts['norms']}") if facts["norms"] else calibration)
    table.add_row("layout", str(plan.layout))
    if plan.layout.held:
        table.add_row("held", f"{plan.layout.held} micro-batches may wait for a linear")
    add_needs(table, plan)
    return table
