"""The command `compare`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_wanda import CHECKPOINT_SCORES, METHODS
from lowmem_wanda.cli.options import (
    add_command,
    add_machine,
    add_selection,
    add_source,
    add_windows,
    machine,
    names,
    numbers,
    taken,
)
from lowmem_wanda.cli.terminal import (
    Bar,
    add_distances,
    distance_cells,
    evaluations,
    perplexity_cells,
    short_duration,
    shown,
    size,
)
from lowmem_wanda.errors import PatternError

FAST = ("wanda", "magnitude")
SCORES = ("reap", "weighted", "squares")
PATTERNS = ("50%", "4:8", "2:4")
COMPARING = ("text", "methods", "patterns", "groups", "statistics", "sequences", "seeds", "calibration", "length",
             "windows", "include", "exclude", "keep")  # fmt: skip


def add(commands: Any) -> None:
    text = "prune by several methods and patterns, and evaluate each"
    command = add_command(commands, "compare", text, run)
    add_source(command)
    add = command.add_argument
    add("target", metavar="out_dir", help="new folder for report.json and report.html, or one to continue")
    add("--methods", type=names, default=FAST, metavar="NAME,...", help=f"methods, of {', '.join(METHODS)}; +swaps, "
        f"+lsq and +recover come after them, as in wanda+lsq (default: {','.join(FAST)})")  # fmt: skip
    add("--patterns", type=names, default=PATTERNS, metavar="PATTERN,...", help="patterns (default: 50%%,4:8,2:4)")
    add("--groups", type=names, default=(None,), metavar="GROUP,...",
        help="what is compared for a share: row,matrix (default: each method's own)")  # fmt: skip
    add("--statistics", type=names, default=("block",), metavar="ORDER,...",
        help="what matrices are measured on: block,dense,sequential (default: block)")  # fmt: skip
    add("--calibration", nargs="+", default=(), metavar="FILE",
        help="calibration, as --text of prune (default: a built-in text)")  # fmt: skip
    add("--sequences", type=numbers, default=(128,), metavar="N,...",
        help="numbers of calibration sequences, such as 1,8,64 (default: 128)")  # fmt: skip
    add("--seeds", type=numbers, default=(0,), metavar="N,...",
        help="seeds of the calibration samples, such as 0,1,2 (default: 0)")  # fmt: skip
    add(
        "--drop-experts", type=names, metavar="SHARE,...", help="compare removals of experts instead, such as 25%%,50%%"
    )
    add("--scores", type=names, default=SCORES, metavar="SCORE,...", help="with --drop-experts: scores, of "
        f"{', '.join(CHECKPOINT_SCORES)} (default: {','.join(SCORES)})")  # fmt: skip
    add("--refit", action="store_true", help="with --drop-experts: each with a refit, too")
    add("--keep", action="store_true", help="keep the pruned checkpoints, in folders of out_dir")
    add_selection(command)
    add_windows(command)
    add_machine(command)
    command.set_defaults(default_of=command.get_default)


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import compare, compare_shrink
    from lowmem_wanda.cli.page import PAGE, save_page

    removes = arguments.drop_experts is not None
    settings = _removals(arguments) if removes else taken(arguments, *COMPARING)
    with Bar("comparing") as bar:
        report = (compare_shrink if removes else compare)(
            arguments.source,
            arguments.target,
            **settings,
            **machine(arguments),
            on_block=lambda record: bar.show(record, title=f"{record['variant']}: block"),
            on_report=lambda report: save_page(arguments.target, report),
        )
    return shown(arguments, report, comparison_table(report), f"report: {Path(arguments.target) / PAGE}")


def _removals(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of a comparison of removals. Raises PatternError for those that say how weights are pruned."""
    for name in ("methods", "patterns", "groups", "include", "exclude"):
        if getattr(arguments, name) != arguments.default_of(name):
            raise PatternError(
                f"--{name} says how weights are pruned, and --drop-experts removes experts; leave one out"
            )
    for name in ("sequences", "seeds", "statistics"):
        if len(getattr(arguments, name)) > 1:
            raise PatternError(f"--{name}: with --drop-experts give one alone")
    order = "dense" if arguments.statistics == arguments.default_of("statistics") else arguments.statistics[0]
    one = {"sequences": arguments.sequences[0], "seed": arguments.seeds[0], "statistics": order}
    return one | taken(arguments, "text", "drop_experts", "scores", "refit", "calibration", "length", "windows", "keep")


def comparison_table(report: Mapping[str, Any]) -> Any:
    """A table with a row for each pruning: what it costs in quality, time and memory."""
    from rich.markup import escape

    shrunk = any("size" in row for row in report["rows"])
    table = evaluations(report, "without" if shrunk else "pruned")
    add_distances(table)
    on_gpu = any(row["device_bytes"] for row in report["rows"])
    costs = (("size",) if shrunk else ()) + ("time", "host", "GPU")[: 3 if on_gpu else 2]
    for title in costs:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("dense", *perplexity_cells(report["dense"]))
    for row in report["rows"]:
        share = [f"{row['size']:.1%}"] if shrunk else []
        peaks = [size(row[key]) if row[key] else "-" for key in ("host_bytes", "device_bytes")]  # of what is computed
        cost = [*share, short_duration(row["seconds"]), *peaks]
        table.add_row(escape(row["name"]), *perplexity_cells(row), *distance_cells(row), *cost[: len(costs)])
    for spread in report["spread"]:
        mean = f"{spread['perplexity_mean']:.2f} sd {spread['perplexity_sd']:.2f}"
        table.add_row(escape(f"{spread['name']}, {spread['rows']} seeds"), mean)
    return table
