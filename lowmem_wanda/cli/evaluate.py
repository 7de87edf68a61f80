"""The command `eval`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_wanda.cli.options import add_command, add_machine, add_windows, machine, names, positive, taken
from lowmem_wanda.cli.terminal import (
    Bar,
    add_distances,
    damage_line,
    distance_cells,
    evaluations,
    figure,
    not_locked,
    perplexity_cells,
    show,
)

TASKS = "boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"


def add(commands: Any) -> None:
    text = "measure perplexity, distance to the dense model, zero-shot accuracy"
    command = add_command(commands, "eval", text, run)
    add = command.add_argument
    add("sources", nargs="+", metavar="dir", help="folder of a Hugging Face safetensors checkpoint, pruned or not")
    add("--against", metavar="ckpt_dir", help="the dense model: adds KL divergence, agreement, each block's error")
    add("--stride", type=positive, metavar="N", help="tokens from one window to the next: overlapping windows "
        "evaluate each token once, with more tokens before it (default: the length)")  # fmt: skip
    add("--convention", default="windows", choices=("windows", "llama.cpp"), help="windows: all tokens of a window but "
        "its first are evaluated, as in the paper's code; llama.cpp: the second half of each window is, as in its "
        "perplexity tool (default: windows)")  # fmt: skip
    add("--tasks", type=names, default=(), metavar="NAME,...", help=f"zero-shot tasks of lm-evaluation-harness "
        f"(downloaded unless local); the paper's are {TASKS}")  # fmt: skip
    add("--include-path", metavar="DIR", help="folder where the harness finds local task files")
    add("--limit", type=positive, metavar="N", help="number of documents of each task (default: all)")
    add("--report", metavar="DIR",
        help="folder for report.json and report.html (default: NAME-eval, with the name of the last dir)")  # fmt: skip
    add_windows(command)
    add_machine(command)


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import evaluate
    from lowmem_wanda.cli.page import PAGE, save_page

    folder = Path(arguments.report or f"{Path(arguments.sources[-1]).resolve().name}-eval")
    reports: list[Mapping[str, Any]] = []

    def save(report: Mapping[str, Any]) -> None:
        reports.append(report)
        save_page(folder, report)

    with Bar("evaluating") as bar:

        def begin(facts: Mapping[str, Any]) -> None:
            windows = f"{facts['windows']} windows of {facts['length']} tokens from {', '.join(facts['text'])}"
            bar.line(f"{facts['source']}: {facts['blocks']} blocks, on {facts['device']}")
            bar.line(f"{facts['evaluated']} tokens evaluated in {windows}")
            bar.begin(facts["blocks"])

        def follow(record: Mapping[str, Any]) -> None:
            if "sweep" in record:
                bar.show(record, title=f"tasks, sweep {record['sweep'] + 1} of {record['sweeps']}: block")
            else:
                bar.show(record, damage_line(record, bar.total))

        evaluate(
            arguments.sources,
            report=folder,
            **taken(arguments, "text", "against", "length", "windows", "stride", "convention"),
            **taken(arguments, "tasks", "include_path", "limit"),
            **machine(arguments),
            on_start=begin,
            on_block=follow,
            on_model=lambda model: print(json.dumps(model), flush=True) if arguments.json else None,
            on_report=save,
        )
    if not arguments.json:
        show(*evaluation_tables(reports[-1]), f"report: {folder / PAGE}")
    return 0


def evaluation_tables(report: Mapping[str, Any]) -> list[Any]:
    """A table of perplexities and distances, if a text was evaluated, and one of tasks, if any were run."""
    texts = any("perplexity" in model for model in report["models"])
    tasks = any("tasks" in model for model in report["models"])
    refused = max((model.get("peak_memory", {}).get("host_not_locked", 0) for model in report["models"]), default=0)
    return [
        *([text_table(report)] if texts else []),
        *([task_table(report["models"])] if tasks else []),
        *([f"page-locked: {not_locked(refused)}"] if refused else []),
    ]


def text_table(report: Mapping[str, Any]) -> Any:
    """A row for each model: its perplexity and, beside a dense model, the distance to it."""
    from rich.markup import escape

    table, dense = evaluations(report, "model"), report["against"]
    if dense:
        add_distances(table)
        table.add_row(escape(dense["path"]), *perplexity_cells(dense), "dense")
    for model in report["models"]:
        table.add_row(escape(model["path"]), *perplexity_cells(model), *(distance_cells(model) if dense else []))
    return table


def task_table(models: Sequence[Mapping[str, Any]]) -> Any:
    """A row for each task of each model, so that any number of tasks fits a terminal."""
    from rich.markup import escape

    table = evaluations({}, "model")
    table.add_column("task", overflow="fold")
    table.add_column("accuracy", justify="right", no_wrap=True)
    for model in models:
        for place, (task, metrics) in enumerate(model.get("tasks", {}).items()):
            table.add_row("" if place else escape(model["path"]), escape(task), accuracy(metrics))
    return table


def accuracy(metrics: Mapping[str, float] | None) -> str:
    """A task's accuracy with its standard error; the accuracy normalized by length where the task has it."""
    if not metrics:
        return ""
    return figure(metrics, next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics))), ".3f")
