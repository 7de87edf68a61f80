"""Tables and lines of evaluations, and curves in a terminal. Nothing here prints."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lowmem_wanda.cli.terminal import duration, size
from lowmem_wanda.errors import LowmemError


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


def _windows(report: dict[str, Any]) -> str | None:
    """Which text, in which windows."""
    if "text" not in report:
        return None
    windows = f"{report['windows']} windows of {report['length']} tokens ({report['convention']})"
    return escape(f"{', '.join(report['text'])}: {windows}")


def _perplexity_column(table: Table, report: dict[str, Any]) -> None:
    table.add_column(f"perplexity\nat {report['length']}", justify="right", no_wrap=True)


def _distance_columns(table: Table) -> None:
    for title in ("x dense", "KL", "KL 99%", "top-1"):
        table.add_column(title, justify="right", min_width=5)


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
