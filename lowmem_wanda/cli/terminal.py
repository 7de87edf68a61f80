"""What a person sees: tables and lines as rich renderables. Nothing here prints."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lowmem_wanda.llamacpp.quant_types import RULES

if TYPE_CHECKING:  # `check` shows its findings without loading torch
    from lowmem_wanda.checkpoint.verify import Findings
    from lowmem_wanda.pruning.job import Task
    from lowmem_wanda.pruning.plan import Plan


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
    gone = sum(linear["zeros"] + linear.get("filled", 0) for linear in linears) / max(1, weights)
    what = "tiny" if any("filled" in linear for linear in linears) else "zero"
    digits = len(str(depth))
    return (
        f"block {record['index'] + 1:>{digits}}/{depth}  {len(linears):2d} linears  {gone:6.2%} {what}"
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
        f"{summary['linears']} linears, {number(summary['zeros'] + summary.get('filled', 0))} of "
        f"{number(summary['weights'])} weights "
        f"({summary['sparsity']:.2%}); {number(summary['parameters'])} parameters in all",
    )
    if made := report.get("imatrix"):
        table.add_row("imatrix", escape(f"{made['file']}, of {made['of']}: ") + _calibration(made))
    table.add_row("size", f"{size(summary['bytes'])} in {len(report['shards'])} shards, as large as the source")
    table.add_row("time", _timing(summary["seconds"], report["timing"]))
    table.add_row("passes", f"{summary['forward_passes_per_block']:.2f} forward passes per block")
    _add_peaks(table, memory)
    table.add_row("gives", summary["gives"])
    table.add_row("does not", summary["gives_not"])
    return table


def imatrix_table(result: dict[str, Any]) -> Table:
    """What an importance matrix was computed on, and where it is."""
    table = _pairs(f"importance matrix: {result['file']}")
    table.add_row("entries", f"{result['entries']} weights of {escape(result['source'])}")
    table.add_row("calibration", _calibration(result))
    table.add_row("time", duration(result["seconds"]))
    _add_peaks(table, result["peak_memory"])
    return table


def survival_table(report: dict[str, Any]) -> Table:
    """A row for each type of a GGUF: what is left of the pruned weights, and of the others."""
    made = "model" in report
    table = Table(box=box.SIMPLE, title_justify="left", caption_justify="left")
    table.title = escape(f"{report['path']}: {report['model'] if made else 'predicted on some rows of each linear'}")
    for title in ("type", "bits", *(("linears",) if made else ()), "still zero", "leak", "error"):
        table.add_column(title, justify="left" if title == "type" else "right", no_wrap=True)
    table.add_column("pattern" if made else "")
    for one in report["types"]:
        figures = [f"{one[key]:.2%}" if key in one else "" for key in ("zero", "leak", "error")]
        kept = f"in {one['holding']} of {one['patterned']}" if one.get("patterned") else ""
        rest = [str(one["linears"]), *figures, kept] if made else [*figures, RULES[one["grid"]]]
        table.add_row(one["type"], f"{one['bits']:g}" if "bits" in one else "", *rest)
    weighted = "weighted by the importance matrix" if report["imatrix"] else "unweighted, as there is no --imatrix"
    table.caption = (
        "still zero: of the pruned weights; leak: size of what they became beside that of the kept ones; error: of the "
        f"kept ones, {weighted}"
    ) + ("" if made else "; all as quantized without an importance matrix, which makes offsets smaller")
    return table


def survival_lines(report: dict[str, Any]) -> list[str]:
    """A line for each tensor of the GGUF."""
    width = max((len(tensor["tensor"]) for tensor in report.get("tensors", ())), default=0)
    return [
        f"{one['tensor']:<{width}}  {one['type']:>7}  {one['zero']:8.2%} still zero  leak {one['leak']:7.2%}"
        f"  error {one['error']:7.2%}"
        + (f"  {one['pattern']} {'holds' if one['holds'] else 'broken'}" if one["pattern"] else "")
        for one in report.get("tensors", ())
    ]


def plan_table(plan: "Plan", task: "Task") -> Table:
    table = _pairs(f"plan: {task.checkpoint.path}, {task.method} {task.pattern}")
    table.add_row("parameters", f"{number(plan.parameters)}, of which {number(plan.prunable)} can be pruned")
    table.add_row("blocks", f"{plan.blocks}, the largest {size(plan.largest_block)}")
    calibration = (
        f"{plan.sequences} sequences of {plan.length}: {number(plan.tokens)} tokens" if plan.tokens else "none"
    )
    table.add_row("calibration", escape(f"norms of {task.norms}") if task.norms else calibration)
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


def check_lines(findings: "Findings") -> list[str]:
    """A line for each matrix, and what was proved."""
    width = max((len(matrix.name) for matrix in findings.matrices), default=0)
    lines = [
        f"{matrix.name:<{width}}  {matrix.dtype:>4} {matrix.shape[0]:>6} x {matrix.shape[1]:<6}"
        f"  {matrix.sparsity:7.2%} {'tiny' if matrix.filled else 'zero'}  {matrix.pattern}".rstrip()
        for matrix in findings.matrices
    ]
    if findings.shards_verified:
        lines.append(f"{findings.shards_verified} shards have the checksums of report.json")
    if findings.identical or findings.masked:
        what = "the smallest number" if any(matrix.filled for matrix in findings.matrices) else "zero"
        lines.append(
            f"{findings.identical} tensors are the source's to the byte; {findings.masked} are the source's "
            f"but for {findings.zeroed} weights that are {what}"
        )
    return lines


def _pairs(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _timing(seconds: float, timing: dict[str, Any]) -> str:
    """All blocks' time, and how much of the last run's work was hidden behind the computing."""
    if not timing["serial"]:
        return duration(seconds)
    return (
        f"{duration(seconds)}, computing in {timing['compute_busy']:.0%} of it; all parts one after the other: "
        f"{timing['serial_over_wall']:.2f} times as long"
    )


def _add_peaks(table: Table, memory: dict[str, Any]) -> None:
    """Rows of the peaks beside their predictions; none of a GPU where there is none."""
    for where in ("host", "device") if memory["device_measured"] else ("host",):
        peak, predicted = memory[f"{where}_measured"], memory[f"{where}_predicted"]
        table.add_row(f"{where} memory", f"{size(peak)} at most ({size(predicted)} predicted)")


def _method(arguments: dict[str, Any]) -> str:
    pattern = arguments["--pattern"]
    group = f"group of {pattern.split(':')[1]}" if ":" in pattern else arguments["--group"]
    return f"{arguments['--method']} {pattern}, compared per {group}"


def _calibration(calibration: dict[str, Any]) -> str:
    if norms := calibration.get("norms"):
        return escape(f"norms of {norms}")
    if not calibration["text"]:
        return "none needed"
    shape = f"{calibration['sequences']} sequences of {calibration['length']} tokens"
    return escape(f"{shape} from {', '.join(calibration['text'])}")
