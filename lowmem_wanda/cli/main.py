"""The command line: arguments in, results on stdout, progress and errors on stderr, an exit code."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_wanda.cli.options import asked, machine, parser, prepared
from lowmem_wanda.errors import LowmemError

if TYPE_CHECKING:
    from lowmem_wanda.data.windows import Windows
    from lowmem_wanda.streaming.model import Work

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0, 1 (an error, in one sentence), 2 (usage) or 130 (Ctrl-C)."""
    arguments = parser().parse_args(argv)
    texts = {*getattr(arguments, "text", ()), *getattr(arguments, "calibration", ())}
    if not {"c4", "wikitext2"} & texts and not getattr(arguments, "tasks", ()):
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched unless it was asked for
    try:
        return RUN[arguments.command](arguments)
    except LowmemError as error:
        if arguments.debug:
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, MemoryError, RuntimeError) as error:
        # what the system says, and torch's OutOfMemoryError; any other RuntimeError is a bug of ours
        if arguments.debug or type(error) is RuntimeError:
            raise
        print(f"error: {printable(' '.join(str(error).split()) or 'memory is full')}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        how = "; run the same command again to continue" if arguments.command in ("prune", "compare") else ""
        print(f"\nstopped{how}", file=sys.stderr)
        return INTERRUPTED


def given(arguments: argparse.Namespace, result: Any, *shown: Any) -> int:
    """Prints a result: with --json as one object, else the lines and tables in which it is `shown`."""
    from rich.console import Console

    if arguments.json:
        print(json.dumps(result))
    for part in () if arguments.json else shown:
        if isinstance(part, str):
            print(printable(part))
        else:
            Console().print(part)
    return DONE


def printable(text: str) -> str:
    """One line without control characters: names in a file may hold anything."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def run_prune(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.checkpoint.output import refuse
    from lowmem_wanda.cli.terminal import about, block_line, closing
    from lowmem_wanda.pruning.prune import prune
    from lowmem_wanda.streaming.resources import map_blocks_from

    map_blocks_from(1 << 20)
    refuse(arguments.target, arguments.source)
    task = prepared(arguments)
    note(about(task))
    with progress("pruning", task.depth) as show:
        report = prune(task, arguments.target, lambda record: show(record, block_line(record, task.depth)))
    return given(arguments, report, closing(report, arguments.target))


def run_imatrix(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.checkpoint.writer import check_new
    from lowmem_wanda.cli.tables import damage_line
    from lowmem_wanda.cli.terminal import imatrix_table
    from lowmem_wanda.data.calibration import calibrate
    from lowmem_wanda.llamacpp.collect import imatrix
    from lowmem_wanda.llamacpp.imatrix import check_target
    from lowmem_wanda.llamacpp.names import package
    from lowmem_wanda.streaming.model import open_work
    from lowmem_wanda.streaming.resources import map_blocks_from

    map_blocks_from(1 << 20)
    package("an importance matrix")
    check_target(arguments.target, "out_file", Path(arguments.source))
    check_new(arguments.target)
    work = open_work(arguments.source, **machine(arguments))
    size = {"sequences": arguments.sequences, "length": work.window(arguments.length), "seed": arguments.seed}
    text = calibrate(arguments.text, work.encoder(arguments.text), vocabulary=work.hollow.vocabulary, **size)
    note(f"{arguments.source}: {work.depth} blocks, on {work.device}")
    with progress("measuring", work.depth) as show:
        result = imatrix(work, text, arguments.target, lambda record: show(record, damage_line(record, work.depth)))
    return given(arguments, result, imatrix_table(result))


def run_plan(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.cli.terminal import plan_table
    from lowmem_wanda.pruning.plan import predict

    task = prepared(arguments)
    plan = predict(task)
    return given(arguments, asdict(plan), plan_table(plan, task))


def run_check(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.checkpoint.verify import check
    from lowmem_wanda.cli.terminal import check_lines

    findings = check(arguments.path, arguments.against)
    given(arguments, asdict(findings), *check_lines(findings))
    for problem in findings.problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return FAILED if findings.problems else DONE


def run_survive(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.cli.terminal import survival_lines, survival_table
    from lowmem_wanda.llamacpp.survive import survive

    report = survive(arguments.path, arguments.model, arguments.imatrix)
    return given(arguments, report, *survival_lines(report), survival_table(report), *report["advice"])


def run_eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lowmem_wanda.cli.tables import curves, evaluation_table
    from lowmem_wanda.pruning.report import evaluation, report_folder, save
    from lowmem_wanda.streaming.resources import map_blocks_from

    map_blocks_from(1 << 20)
    if not arguments.text and not arguments.tasks:
        raise LowmemError("nothing to evaluate on: give --text FILE, --tasks NAME,... or both")
    draw = curves() if arguments.plot else None
    name = Path(arguments.sources[-1]).resolve().name
    folder = report_folder(arguments.report or f"{name}-eval", "eval")
    check_sources(arguments)
    models, text = [], None
    for source in arguments.sources:
        text, result = evaluated(source, arguments)
        models.append(result)
        report = evaluation(text, models, asked(arguments))
        save(folder, report)
        if arguments.json:
            print(json.dumps(result), flush=True)
    if not arguments.json:
        Console().print(evaluation_table(report))
        print(f"report: {printable(str(folder / 'report.html'))}")
    if draw:
        print(draw({model["path"]: model.get("blocks", []) for model in models}))
    return DONE


def check_sources(arguments: argparse.Namespace) -> None:
    """Raises a LowmemError, before any work, for what would stop it later."""
    from lowmem_wanda.streaming.model import open_work

    if arguments.tasks:
        zeroshot_module()
    sources = [*arguments.sources, *([arguments.against] if arguments.against else [])]
    models = [open_work(source, **machine(arguments)) for source in sources if len(sources) > 1]
    lengths = sorted({model.window(arguments.length) for model in models})
    if arguments.text and len(lengths) > 1:
        raise LowmemError(f"not all of these models have {lengths[1]} positions: give --length {lengths[0]}")


def evaluated(source: str, arguments: argparse.Namespace) -> "tuple[Windows | None, dict[str, Any]]":
    """One model's figures on the text and the tasks, and the text as its tokenizer has it."""
    from lowmem_wanda.cli.tables import damage_line
    from lowmem_wanda.evaluation.perplexity import evaluate
    from lowmem_wanda.streaming.model import open_work

    work = open_work(source, **machine(arguments))
    text = windows_of(work, arguments) if arguments.text else None
    tasks = run_tasks(source, arguments) if arguments.tasks else None
    result: dict[str, Any] = {"path": source}
    if text is not None:
        count, length = text.tokens.shape
        same = {**machine(arguments), "dtype": work.dtype_name}
        dense = open_work(arguments.against, **same) if arguments.against else None
        note(f"{source}: {work.depth} blocks, on {work.device}")
        note(f"{text.scored} tokens scored in {count} windows of {length} tokens from {', '.join(text.sources)}")
        with progress("evaluating", work.depth) as show:
            result = evaluate(work, text, dense, lambda record: show(record, damage_line(record, work.depth)))
    return text, result | ({"tasks": tasks} if tasks else {})


def run_tasks(source: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One model's zero-shot metrics."""
    with progress("loading tasks", None) as show:

        def tell(record: dict[str, Any]) -> None:
            show(record, None, f"tasks, sweep {record['sweep'] + 1} of {record['sweeps']}: block")

        settings = {"include_path": arguments.include_path, "limit": arguments.limit, "notify": tell}
        found: dict[str, dict[str, float]] = zeroshot_module().zeroshot(
            source, arguments.tasks, **settings, **machine(arguments)
        )
    return found


def zeroshot_module() -> Any:
    """The module `zeroshot`. Raises LowmemError without lm-evaluation-harness."""
    try:
        return import_module("lowmem_wanda.evaluation.zeroshot")
    except ImportError:
        raise LowmemError("--tasks runs lm-evaluation-harness, which is not installed: pip install lm-eval") from None


def run_compare(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.checkpoint.output import refuse_within
    from lowmem_wanda.cli.tables import comparison_table, curves
    from lowmem_wanda.pruning.compare import compare, variants
    from lowmem_wanda.pruning.report import report_folder
    from lowmem_wanda.streaming.model import open_work
    from lowmem_wanda.streaming.resources import map_blocks_from

    map_blocks_from(1 << 20)
    if not arguments.text:
        raise LowmemError("nothing to evaluate on: give --text FILE")
    draw = curves() if arguments.plot else None
    refuse_within(arguments.target, arguments.source)
    chosen = variants(arguments.methods, arguments.patterns, arguments.groups, arguments.statistics,
                      arguments.sequences, arguments.seeds)  # fmt: skip
    work = open_work(arguments.source, **machine(arguments))
    text = windows_of(work, arguments)
    folder = report_folder(arguments.target, "compare")
    with progress("comparing", None) as show:
        report = compare(Path(arguments.source), folder, chosen, text, calibration=arguments.calibration,
            length=arguments.length, machine=machine(arguments), arguments=asked(arguments), keep=arguments.keep,
            selection={"include": arguments.include, "exclude": arguments.exclude},
            notify=lambda name, record: show(record, None, f"{name}: block"))  # fmt: skip
    given(arguments, report, comparison_table(report), f"report: {folder / 'report.html'}")
    if draw:
        print(draw({row["name"]: row["blocks"] for row in report["rows"]}))
    return DONE


def windows_of(work: "Work", arguments: argparse.Namespace) -> "Windows":
    """The windows of --text, by the model's own tokenizer."""
    from lowmem_wanda.evaluation.perplexity import cut

    convention = getattr(arguments, "convention", "windows")
    stride = getattr(arguments, "stride", None)
    return cut(work, arguments.text, arguments.length, stride, convention, arguments.windows)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr; what it gives takes a block's record, a line to print above the bar, and another title."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bar = shown.add_task(what, total=total)

        def show(record: dict[str, Any], line: str | None, title: str = what) -> None:
            if line is not None:
                shown.console.print(line, highlight=False, markup=False)
            shown.update(bar, completed=record["index"] + 1, description=title)

        yield show


def note(line: str) -> None:
    """A line on stderr."""
    from rich.console import Console

    Console(stderr=True).print(line, highlight=False, markup=False)


RUN = {
    "prune": run_prune, "plan": run_plan, "check": run_check, "eval": run_eval, "compare": run_compare,
    "imatrix": run_imatrix, "survive": run_survive,
}  # fmt: skip
