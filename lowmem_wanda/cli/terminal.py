"""What commands share to write to the terminal: units, bars, tables. rich is imported when something is shown."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

RULES = {"keeps": "zeros stay", "offset": "an offset moves zeros", "codebook": "no zero in codebook"}  # of GGUF types


def size(count: float) -> str:
    """Bytes in decimal units, as disks and checkpoints are sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(count: float) -> str:
    """A count as people say it: 7.0 B, 226.6 K."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def duration(seconds: float) -> str:
    """Seconds as people say them: 12.3 s, 4 min 05 s, 2 h 30 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def short_duration(seconds: float) -> str:
    """Seconds for a narrow column: 12.3 s, 67 min, 2.5 h."""
    return (
        f"{seconds:.1f} s"
        if seconds < 180
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def figure(figures: Mapping[str, Any], name: str, form: str) -> str:
    """A figure ± its standard error, or the figure alone; "" where there is none."""
    values = [figures.get(key) for key in (name, f"{name}_stderr")]
    return " ± ".join(f"{value:{form}}" for value in values if isinstance(value, (int, float)))


def bounded(text: str, most: int = 1000) -> str:
    """A text of at most `most` characters, without its middle where it is longer: the end is the next move."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 + 5 :]}"


def printable(text: str) -> str:
    """A text without control characters, for one line. Names in a file may hold anything."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def shown(arguments: argparse.Namespace, result: Any, *parts: Any) -> int:
    """Prints a result as one JSON object with --json, else as lines and tables; gives the exit code."""
    if arguments.json:
        print(json.dumps(result))
    else:
        show(*parts)
    return 0


def verdict(arguments: argparse.Namespace, findings: Any, *parts: Any) -> int:
    """Prints the findings of a proof, and its problems to stderr; gives the exit code, 1 if there are any."""
    shown(arguments, asdict(findings), *parts)
    for problem in findings.problems:
        print(f"error: {printable(bounded(problem))}", file=sys.stderr)
    return 1 if findings.problems else 0


def show(*parts: Any) -> None:
    """Prints lines and tables."""
    from rich.console import Console

    for part in parts:
        if isinstance(part, str):
            print(printable(part))
        else:
            Console().print(part)


class Bar:
    """A context with a progress bar on stderr, which appears with `begin`, and lines above it."""

    def __init__(self, title: str) -> None:
        self.title, self.total = title, 0
        self._bar: Any = None

    def __enter__(self) -> "Bar":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("ETA"), Remaining())  # fmt: skip
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def begin(self, total: int | None, expected: str = "") -> None:
        """Shows the bar for `total` blocks (None: not known), and the time that is `expected` in all."""
        self.total = total or 0
        self.title += f", {expected}" if expected else ""
        if self._bar is None:
            self._bar = self._progress.add_task(self.title, total=total)
            self._progress.start()
        self._progress.update(self._bar, total=total, completed=0, description=self.title)

    def show(self, record: Mapping[str, Any], line: str | None = None, title: str | None = None) -> None:
        """Moves the bar on to the block of a record, and prints `line` above it."""
        if self._bar is None:
            self.begin(None)
        if line is not None:
            self.line(line)
        self._progress.update(self._bar, completed=record["index"] + 1, description=title or self.title)


def pairs(title: str) -> Any:
    """An empty table of names and values."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def evaluations(report: Mapping[str, Any], first: str) -> Any:
    """An empty table of models, with a column for their names, and one for perplexity if there is a text."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = None
    if "text" in report:
        windows = f"{report['windows']} windows of {report['length']} tokens ({report['convention']})"
        title = escape(f"{', '.join(report['text'])}: {windows}")
    table = Table(box=box.SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    if "length" in report:
        table.add_column(f"perplexity\nat {report['length']}", justify="right", no_wrap=True)
    return table


def add_distances(table: Any) -> None:
    """Adds the columns of the distance to a dense model."""
    for title in ("x dense", "KL", "KL 99%", "top-1"):
        table.add_column(title, justify="right", no_wrap=True)


def perplexity_cells(figures: Mapping[str, Any]) -> list[str]:
    """The cell of a model's perplexity; no cell where it was not measured."""
    if "perplexity" not in figures:
        return []
    return [figure(figures, "perplexity", ".3f" if figures["perplexity"] < 10 else ".2f")]


def distance_cells(figures: Mapping[str, Any]) -> list[str]:
    """The cells of a model's distance to the dense one."""
    return [
        f"{figures['perplexity_ratio']:.2f}",
        f"{figures['kl_mean']:.3f}",
        f"{figures['kl_p99']:.3f}",
        f"{figures['top1_agreement']:.1%}",
    ]


def damage_line(record: Mapping[str, Any], depth: int) -> str:
    """One aligned line for a block that was evaluated or measured."""
    digits = len(str(depth))
    error = f"  off by {record['relative_error']:7.2%}" if "relative_error" in record else ""
    return (
        f"block {record['index'] + 1:>{digits}}/{depth}{error}  {record['seconds']:8.2f} s"
        f"  host {size(record['host_bytes']):>9}"
    )


def calibration_text(calibration: Mapping[str, Any]) -> str:
    """What matrices were measured on, in words."""
    from rich.markup import escape

    if norms := calibration.get("norms"):
        return escape(f"norms of {norms}")
    if not calibration["text"]:
        return "none needed"
    shape = f"{calibration['sequences']} sequences of {calibration['length']} tokens"
    files = calibration.get("files") or ()
    named = [f"{file['name']} ({file['share']:.0%})" for file in files if "share" in file]
    several = 1 < len(calibration["text"]) == len(named)
    return escape(f"{shape} from {', '.join(named if several else calibration['text'])}")


def add_needs(table: Any, plan: Any) -> None:
    """Adds rows of what a plan predicts: operations, time, memory, disk."""
    table.add_row("computing", f"{plan.flops / 1e12:.3g} TFLOP")
    table.add_row("time", time_text(plan))
    table.add_row("host memory", f"{size(plan.host_peak)} predicted at most")
    if plan.device_peak:
        table.add_row("device memory", f"{size(plan.device_peak)} predicted at most")
    table.add_row("disk", f"{size(plan.disk)}: {size(plan.read)} are read, {size(plan.written)} written")


def add_peaks(table: Any, memory: Mapping[str, Any]) -> None:
    """Adds rows of the peaks beside their predictions; a row of the GPU only where one was used."""
    for where in ("host", "device") if memory["device_measured"] else ("host",):
        peak, predicted = memory[f"{where}_measured"], memory[f"{where}_predicted"]
        table.add_row(f"{where} memory", f"{size(peak)} at most ({size(predicted)} predicted)")
    if refused := memory.get("host_not_locked"):
        table.add_row("page-locked", not_locked(refused))


def not_locked(nbytes: int) -> str:
    """What it means that the system did not page-lock host memory beside a GPU."""
    return f"the system refused it for {size(nbytes)}, so copies to the GPU take longer: raise its limit (ulimit -l)"


def ranges(ids: Sequence[int]) -> str:
    """Ids in few characters: 0-2, 5, 7-9."""
    runs = [list(run) for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def expected(seconds: float | None) -> str:
    """An estimate of a time in words; "" where there is none."""
    return f"about {duration(max(1, seconds))}" if seconds else ""


def time_text(plan: Any) -> str:
    """How long a pruning will take, and by which rates."""
    if plan.seconds is None:
        return "give that machine's rates: --disk 3GB/s" + (" and --flops 80T" if plan.flops else "")
    rates, known = plan.rates, []
    if "flops" in rates:
        known.append(f"products {rates['flops'] / 1e12:.3g} TFLOP/s")
    if "weights" in rates:
        known.append(f"masks {number(rates['weights'])} weights/s")
    disk = {"reading": "read", "writing": "written"}
    known += [f"{name} {size(rates[key])}/s" for name, key in disk.items() if key in rates]
    return f"{expected(plan.seconds)} after the start ({', '.join(known)})"
