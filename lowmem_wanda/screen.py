"""What a person sees: tables and lines as rich renderables. Nothing here prints."""

from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lowmem_wanda.errors import LowmemError

if TYPE_CHECKING:  # `check` shows its findings without loading torch
    from lowmem_wanda.check import Findings
    from lowmem_wanda.plan import Plan
    from lowmem_wanda.task import Task


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
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def about(task: "Task") -> str:
    """The line before the work: what is pruned how, on what, with which text."""
    line = f"{task.checkpoint.path}: {task.depth} blocks, {task.method} {task.pattern}, on {task.device}"
    if calibration := task.calibration:
        sequences, length = calibration.tokens.shape
        line += f"\ncalibration: {sequences} sequences of {length} tokens from {', '.join(calibration.sources)}"
    if untouched := task.hollow.untouched:
        line += f"\nnot pruned, as the model does not use them: {len(untouched)} tensors, {untouched[0]} and so on"
    return line


def block_line(record: dict[str, Any], depth: int) -> str:
    """One aligned line for a finished block."""
    linears = record["linears"].values()
    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in linears)
    sparsity = sum(linear["zeros"] for linear in linears) / max(1, weights)
    digits = len(str(depth))
    return (
        f"block {record['index'] + 1:>{digits}}/{depth}  {len(linears):2d} linears  {sparsity:6.2%} zero"
        f"  {record['seconds']:8.2f} s  host {size(record['host_bytes']):>9}"
    )


def closing(report: dict[str, Any], target: str) -> Table:
    """What was pruned, its size, what it gives and what it does not."""
    summary, arguments, memory = report["summary"], report["arguments"], report["peak_memory"]
    table = _pairs(f"pruned: {target}")
    table.add_row("method", _method(arguments))
    table.add_row("calibration", _calibration(report["calibration"]))
    table.add_row(
        "pruned",
        f"{summary['linears']} linears, {number(summary['zeros'])} of {number(summary['weights'])} weights "
        f"({summary['sparsity']:.2%}); {number(summary['parameters'])} parameters in all",
    )
    table.add_row("size", f"{size(summary['bytes'])} in {len(report['shards'])} shards, as large as the source")
    table.add_row("time", _timing(summary["seconds"], report["timing"]))
    table.add_row("passes", f"{summary['forward_passes_per_block']:.2f} forward passes per block")
    table.add_row("host memory", _held(memory, "host"))
    if memory["device_measured"]:
        table.add_row("device memory", _held(memory, "device"))
    table.add_row("gives", summary["gives"])
    table.add_row("does not", summary["gives_not"])
    return table


def imatrix_table(result: dict[str, Any]) -> Table:
    """What an importance matrix was computed on, and where it is."""
    table = _pairs(f"importance matrix: {result['file']}")
    table.add_row("entries", f"{result['entries']} weights of {escape(result['source'])}")
    table.add_row("calibration", _calibration(result))
    table.add_row("time", duration(result["seconds"]))
    table.add_row("host memory", _held(result["peak_memory"], "host"))
    if result["peak_memory"]["device_measured"]:
        table.add_row("device memory", _held(result["peak_memory"], "device"))
    return table


def plan_table(plan: "Plan", method: str, pattern: str, source: str) -> Table:
    table = _pairs(f"plan: {source}, {method} {pattern}")
    table.add_row("parameters", f"{number(plan.parameters)}, of which {number(plan.prunable)} can be pruned")
    table.add_row("blocks", f"{plan.blocks}, the largest {size(plan.largest_block)}")
    calibration = (
        f"{plan.sequences} sequences of {plan.length}: {number(plan.tokens)} tokens" if plan.tokens else "none"
    )
    table.add_row("calibration", calibration)
    layout = plan.layout
    table.add_row("layout", str(layout))
    if layout.held:
        table.add_row("held", f"{layout.held} micro-batches may wait for a linear")
    table.add_row("computing", f"{plan.flops / 1e12:.3g} TFLOP")
    table.add_row("host memory", f"{size(plan.host_peak)} predicted at most")
    if plan.device_peak:
        table.add_row("device memory", f"{size(plan.device_peak)} predicted at most")
    table.add_row("disk", size(plan.disk))
    return table


def damage_line(record: dict[str, Any], depth: int) -> str:
    """One aligned line for a block that was evaluated."""
    digits = len(str(depth))
    error = f"  off by {record['relative_error']:7.2%}" if "relative_error" in record else ""
    return (
        f"block {record['index'] + 1:>{digits}}/{depth}{error}  {record['seconds']:8.2f} s"
        f"  host {size(record['host_bytes']):>9}"
    )


def evaluation_table(report: dict[str, Any]) -> Table:
    """A row for each model: its perplexity, the distance to the dense one, its tasks."""
    table = Table(box=box.SIMPLE, title=_windows(report), title_justify="left", padding=(0, 1, 0, 0))
    models, dense = report["models"], report["against"]
    table.add_column("model", overflow="fold", min_width=16)
    if "length" in report:
        _perplexity_column(table, report)
    if dense:
        _distance_columns(table)
        table.add_row(escape(dense["path"]), *_perplexity(dense), "dense")
    tasks = list(dict.fromkeys(task for model in models for task in model.get("tasks", {})))
    for task in tasks:
        table.add_column(escape(task), justify="right")
    for model in models:
        cells = [*_perplexity(model), *(_distance(model) if dense else [])]
        table.add_row(escape(model["path"]), *cells, *(_accuracy(model["tasks"].get(task)) for task in tasks))
    return table


def comparison_table(report: dict[str, Any]) -> Table:
    """A row for each pruning: what it costs in quality, time and memory."""
    table = Table(box=box.SIMPLE, title=_windows(report), title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("pruned", min_width=13)
    _perplexity_column(table, report)
    _distance_columns(table)
    on_gpu = any(row["device_bytes"] for row in report["rows"])
    for title in ("time", "host", "GPU")[: 3 if on_gpu else 2]:
        table.add_column(title, justify="right", min_width=7)
    table.add_row("dense", *_perplexity(report["dense"]))
    for row in report["rows"]:
        cost = [duration(row["seconds"]), size(row["host_bytes"]), size(row["device_bytes"])]
        table.add_row(escape(row["name"]), *_perplexity(row), *_distance(row), *cost[: 3 if on_gpu else 2])
    for spread in report["spread"]:
        mean = f"{spread['perplexity_mean']:.2f} sd {spread['perplexity_sd']:.2f}"
        table.add_row(escape(f"{spread['name']}, {spread['rows']} seeds"), mean)
    return table


def curves() -> Callable[[dict[str, list[dict[str, Any]]]], str]:
    """What draws each model's block errors against depth in the terminal. Raises LowmemError without plotext."""
    try:
        import plotext
    except ImportError:
        raise LowmemError('--plot draws through a package that is not installed: pip install "plotext<6"') from None

    def draw(models: dict[str, list[dict[str, Any]]]) -> str:
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plotsize(78, 20)
        plotext.title("relative error of each block's output")
        plotext.xlabel("block")
        drawn = {name: blocks for name, blocks in models.items() if blocks and "relative_error" in blocks[0]}
        if not drawn:
            return "no block errors to draw: they are measured with --against"
        for (name, blocks), marker in zip(drawn.items(), cycle("•+xo#*@%")):
            errors = [block["relative_error"] for block in blocks]
            plotext.plot([block["index"] + 1 for block in blocks], errors, label=name, marker=marker)
        most = max(len(blocks) for blocks in drawn.values())
        plotext.xticks(sorted({1 + round(step * (most - 1) / 6) for step in range(7)}))
        return str(plotext.uncolorize(plotext.build()))

    return draw


def check_lines(findings: "Findings") -> list[str]:
    """A line for each matrix, and what was proved."""
    width = max((len(matrix.name) for matrix in findings.matrices), default=0)
    lines = [
        f"{matrix.name:<{width}}  {matrix.dtype:>4} {matrix.shape[0]:>6} x {matrix.shape[1]:<6}"
        f"  {matrix.sparsity:7.2%} zero  {matrix.pattern}".rstrip()
        for matrix in findings.matrices
    ]
    if findings.shards_verified:
        lines.append(f"{findings.shards_verified} shards have the checksums of report.json")
    if findings.identical or findings.masked:
        lines.append(
            f"{findings.identical} tensors are the source's to the byte; {findings.masked} are the source's "
            f"but for {findings.zeroed} weights that are zero"
        )
    return lines


def _pairs(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _windows(report: dict[str, Any]) -> str | None:
    """Which text, in which windows."""
    if "text" not in report:
        return None
    windows = f"{report['windows']} windows of {report['length']} tokens ({report['convention']})"
    return escape(f"{', '.join(report['text'])}: {windows}")


def _distance_columns(table: Table) -> None:
    for title in ("x dense", "KL", "KL 99%", "top-1"):
        table.add_column(title, justify="right", min_width=5)


def _perplexity_column(table: Table, report: dict[str, Any]) -> None:
    table.add_column(f"perplexity\nat {report['length']}", justify="right", no_wrap=True)


def _perplexity(figures: dict[str, Any]) -> list[str]:
    if "perplexity" not in figures:
        return []
    digits = 3 if figures["perplexity"] < 10 else 2
    return [f"{figures['perplexity']:.{digits}f} ± {figures['perplexity_stderr']:.{digits}f}"]


def _distance(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['perplexity_ratio']:.2f}",
        f"{figures['kl_mean']:.3f}",
        f"{figures['kl_p99']:.3f}",
        f"{figures['top1_agreement']:.1%}",
    ]


def _accuracy(metrics: dict[str, float] | None) -> str:
    """A task's accuracy, by length where it has one, with its standard error."""
    if not metrics:
        return ""
    name = next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics)))
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")


def _timing(seconds: float, timing: dict[str, Any]) -> str:
    """All blocks' time, and how much of the last run's work was hidden behind the computing."""
    if not timing["serial"]:
        return duration(seconds)
    return (
        f"{duration(seconds)}, computing in {timing['compute_busy']:.0%} of it; all parts one after the other: "
        f"{timing['serial_over_wall']:.2f} times as long"
    )


def _held(memory: dict[str, Any], where: str) -> str:
    return f"{size(memory[f'{where}_measured'])} at most ({size(memory[f'{where}_predicted'])} predicted)"


def _method(arguments: dict[str, Any]) -> str:
    pattern = arguments["--pattern"]
    group = f"group of {pattern.split(':')[1]}" if ":" in pattern else arguments["--group"]
    return f"{arguments['--method']} {pattern}, compared per {group}"


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration["text"]:
        return "none needed"
    shape = f"{calibration['sequences']} sequences of {calibration['length']} tokens"
    return escape(f"{shape} from {', '.join(calibration['text'])}")
