"""report.html: a report as one page that needs neither a network nor a script."""

import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

from lowmem_wanda.checkpoint.writer import write_bytes
from lowmem_wanda.cli import plots
from lowmem_wanda.cli.markup import (
    Best,
    Record,
    Section,
    beside,
    pairs,
    paragraphs,
    sections,
    table,
    time_unit,
)
from lowmem_wanda.cli.terminal import RULES, duration, figure, size

PAGE = "report.html"
Kinds = Mapping[str, Mapping[int, Any]]  # {kind of matrix: {block: its record}}
LIMITS = (
    "A perplexity holds for this text, length and convention only; do not compare it with others.",
    "Standard errors assume that tokens are independent. They are not, so small differences mean little.",
    "Figures are of the model computed in the dtype below, not of a quantized copy of it.",
    "Files and memory stay as large. Only programs that use the zeros become faster.",
)
LOST = "Share of a linear's squared scores that was pruned away: for Wanda, of what its output loses."
LEFT = (
    "Each type that the gguf package can quantize to, on some rows of every linear: bits per weight; the share of "
    "pruned weights that are still zero; leak, how large the others become beside kept weights; "
    "and the error of kept weights."
)
ERRORS = "Distance of each block's output from the dense model's, relative to that."
DISTANCE = {
    "x dense": ("perplexity_ratio", ".3f"), "KL mean": ("kl_mean", ".4f"), "KL median": ("kl_median", ".4f"),
    "KL 99%": ("kl_p99", ".3f"), "KL max": ("kl_max", ".2f"), "same top-1": ("top1_agreement", ".1%"),
}  # fmt: skip


def page(report: Record) -> str:
    """The page of a report of `prune`, `eval` or `compare`."""
    kinds = {"prune": ("Pruned", _pruned), "eval": ("Evaluated", _evaluated), "compare": ("Compared", _compared)}
    done, parts = kinds[report["kind"]]
    title = f"{done}: {report.get('source') or ', '.join(_short(report['models']).values())}"
    return sections(title, [*parts(report), *_settings(report)])


def save_page(folder: str | Path, report: Record) -> None:
    """Writes report.html into a folder, which is made if it does not exist.

    Meanwhile Python does not look for garbage: that takes 0.2 s where torch and transformers are imported.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    was_on = gc.isenabled()
    gc.disable()
    try:
        text = page(report)
    finally:
        if was_on:
            gc.enable()
    write_bytes(Path(folder) / PAGE, text.encode("utf-8", "backslashreplace"))


def _pruned(report: Record) -> Iterator[Section]:
    summary, blocks, calibration = report["summary"], report["blocks"], report["calibration"]
    made = report.get("imatrix")
    shape = f"{calibration['sequences']} sequences of {calibration['length']} tokens from "
    yield "summary", "Summary", pairs({
        "method": f"{report['arguments']['method']} {report['arguments']['pattern']}",
        "also": "; ".join(summary.get("also", ())) or None,
        "calibration": shape + ", ".join(calibration["text"]) if calibration["text"] else "none needed",
        "norms": calibration.get("norms"),
        "importance matrix": made and f"{made['file']}, of {made['of']}, on {', '.join(made['text'])}",
        "pruned": f"{summary['zeros'] + summary['filled']:,} of {summary['weights']:,} weights in {summary['linears']} "
                  f"linears ({summary['sparsity']:.2%})",
        "zeros": f"{summary['zeros']:,}",
        "parameters": f"{summary['parameters']:,}",
        "files": f"{size(summary['bytes'])} in {len(report['shards'])} shards, as large as the source's",
        "time": f"{duration(summary['seconds'])}, {summary['forward_passes_per_block']:.2f} forward passes a block",
        "memory": _peak(report["peak_memory"]),
        "shards read by": report["layout"].get("reading"),
    })  # fmt: skip
    yield "limits", "What this gives, and what not", paragraphs([summary["gives"], summary["gives_not"]])
    kinds = _by_kind(blocks)
    shares = _grid(kinds, blocks, lambda one: one["sparsity"])
    yield "sparsity", "Pruned weights", plots.heat("sparsity", "pruned share", *shares, share=True)
    yield "score", "Scores", _scores(kinds, blocks)
    yield "quantization", "Next: quantization", _quantization(report.get("quantization"))
    yield "time", "Time", _time(report, summary["seconds"])
    yield "memory", "Memory", _memory(report)


def _scores(kinds: Kinds, blocks: Sequence[Record]) -> str:
    """Figures of scores, how much of them was pruned, and how much of the output was lost, where the report knows."""

    def lost(one: Record) -> float:
        return float(one["score"]["lost"]) if one.get("score") else math.nan

    def error(one: Record) -> float:
        return float(one.get("error", math.nan))

    def band(line: Mapping[int, Any]) -> list[tuple[float, float, float, float]]:
        scored = {index + 1: one["score"]["quantiles"] for index, one in line.items() if one.get("score")}
        return [(block, values["10"], values["50"], values["90"]) for block, values in scored.items()]

    figures = (
        plots.heat("lost", "pruned share of squared scores", *_grid(kinds, blocks, lost), share=True),
        plots.heat("error", "lost share of the squared output", *_grid(kinds, blocks, error), share=True),
        plots.bands("bands", "median score, and where 80 % of scores lie", {key: band(kinds[key]) for key in kinds}),
    )
    return f'<p>{escape(LOST)}</p><div class="plots">{"".join(figures)}</div>' if any(figures) else ""


def _quantization(outlook: Record | None) -> str:
    """Advice on quantization for llama.cpp, and what each type would leave of this model."""
    if not outlook:
        return ""
    titles = ("type", "", "bits", "still zero", "leak", "error")
    lines = []
    for one in outlook["types"]:
        figures = [f"{one[key]:.2%}" if key in one else "" for key in ("zero", "leak", "error")]
        lines.append((one["type"], RULES[one["grid"]], f"{one['bits']:g}", *figures))
    return paragraphs([*outlook["advice"], LEFT]) + table(titles, lines)


def _evaluated(report: Record) -> Iterator[Section]:
    models, dense, short = report["models"], report.get("against"), _short(report["models"])
    with_text = [model for model in models if "perplexity" in model]
    rows = [{**model, "name": short[model["path"]]} for model in with_text]
    rows = [{**dense, "name": f"dense: {PurePath(dense['path']).name}"}, *rows] if dense else rows
    yield "quality", "Quality", _quality(rows, report) if with_text else ""
    yield "block-error", "Error of each block's output", _errors({short[model["path"]]: model for model in with_text})
    yield "tasks", "Zero-shot tasks", _tasks(models, short)
    named = [(model, f"{short[model['path']]}: " if len(with_text) > 1 else "") for model in with_text]
    times = [_time(model, model["seconds"], f"parts-{place}", title) for place, (model, title) in enumerate(named)]
    yield "time", "Time", beside(times)
    held = [_memory(model, f"held-{place}", title) for place, (model, title) in enumerate(named)]
    yield "memory", "Memory", beside(held)
    yield "limits", "What this says, and what not", paragraphs(LIMITS)


def _compared(report: Record) -> Iterator[Section]:
    rows, dense = report["rows"], report.get("dense")
    if rows and dense:
        chart = {row["name"]: (row["perplexity"], row["perplexity_stderr"]) for row in rows}
        level, title = ("dense", dense["perplexity"]), f"perplexity at {report['length']}"
        quality = _quality([{**dense, "name": "dense"}, *rows], report)
        yield "comparison", "Comparison", quality + plots.ranges("chart", title, chart, title, level)
    spread = []
    for one in report.get("spread", ()):
        spread.append((one["name"], one["rows"], f"{one['perplexity_mean']:.3f}", f"{one['perplexity_sd']:.3f}"))
    titles = ("", "seeds", "mean perplexity", "standard deviation")
    yield "spread", "Spread over seeds", table(titles, spread)
    yield "block-error", "Error of each block's output", _errors({row["name"]: row for row in rows})
    yield "limits", "What this says, and what not", paragraphs(LIMITS)


def _quality(models: Sequence[Record], report: Record) -> str:
    """Perplexity and distance of each model. In a comparison the best of each pattern is shown in bold."""
    ranked = sorted((row for row in models if "pattern" in row), key=lambda row: row["perplexity"], reverse=True)
    best = {row["pattern"]: row["perplexity"] for row in ranked}

    def cells(model: Record) -> list[str]:
        value = figure(model, "perplexity", ".3f")
        memory = max(model.get("host_bytes", 0), model.get("device_bytes", 0))
        return [
            model["name"],
            Best(value) if model["perplexity"] == best.get(model.get("pattern", "")) else value,
            *(figure(model, name, form) for name, form in DISTANCE.values()),
            *((duration(model["seconds"]), size(memory)) if memory else ("", "")),
        ]

    titles = ("", f"perplexity at {report['length']}", *DISTANCE, "time to prune", "memory")
    tokens = next((f", {model['tokens']:,} evaluated" for model in models if "tokens" in model), "")
    windows = f"{report['windows']} windows" if "windows" in report else "windows"
    cut = f"{', '.join(report['text'])}: {windows} of {report['length']} tokens ({report['convention']}){tokens}"
    return f'<p class="soft">{escape(cut)}</p>' + table(titles, [cells(model) for model in models])


def _tasks(models: Sequence[Record], short: Mapping[str, str]) -> str:
    """Every metric of every task with its standard error, the models side by side."""
    found = {
        (task, metric): None
        for model in models
        for task, metrics in model.get("tasks", {}).items()
        for metric in metrics
        if figure(metrics, metric, "") and not metric.endswith("_stderr")
    }
    lines = [
        (task, metric, *(figure(model.get("tasks", {}).get(task, {}), metric, ".4f") for model in models))
        for task, metric in found
    ]
    return table(("task", "metric", *(short[model["path"]] for model in models)), lines)


def _errors(models: Mapping[str, Record]) -> str:
    """A figure with a line for each model that was compared with the dense one."""
    series = {}
    for name, model in models.items():
        errors = {block["index"] + 1: block["relative_error"] for block in model["blocks"] if "relative_error" in block}
        if errors:
            series[name] = (list(errors), list(errors.values()))
    figure = plots.lines("error", "relative error by depth", series, "block", "relative error") if series else ""
    return f"<p>{escape(ERRORS)}</p>{figure}" if series else ""


def _time(report: Record, seconds: float, name: str = "parts", title: str = "") -> str:
    """The seconds of each block by part, and the share of time that was computing."""
    blocks, timing, text = report["blocks"], report.get("timing"), f"{title}{duration(seconds)}"
    if timing and timing["serial"]:
        text += f", computing in {timing['compute_busy']:.0%} of the last run"
    parts = list(dict.fromkeys(part for block in blocks for part in block["parts"]))
    split = {part: [float(block["parts"].get(part, 0)) for block in blocks] for part in parts}
    return paragraphs([text]) + (plots.stacks(name, "by block and part", split, "seconds") if parts else "")


def _memory(report: Record, name: str = "held", title: str = "") -> str:
    """The peaks of memory, and the memory that was held over time."""
    peak, points = report["peak_memory"], report.get("memory")
    text = paragraphs([title + _peak(peak)])
    if not points:
        return text
    scale, unit = (1e9, "GB") if peak["host_predicted"] >= 1e9 else (1e6, "MB")
    tick, time = time_unit(points[-1][0])  # seconds
    series = {"host": ([at / tick for at, _ in points], [held / scale for _, held in points])}
    level = ("predicted at most", peak["host_predicted"] / scale)
    return text + plots.lines(name, "memory of this process that no file backs", series, time, unit, level)


def _settings(report: Record) -> Iterator[Section]:
    yield "arguments", "Arguments", pairs(report["arguments"])
    yield "versions", "Versions", pairs(report["versions"])


def _by_kind(blocks: Sequence[Record]) -> dict[str, dict[int, Any]]:
    """{kind of matrix: {block: its record}}; a kind is the tensor's name from the block's number on.

    The experts of a layer are of one kind, whose record has the means of theirs.
    """
    kinds: dict[str, dict[int, list[Record]]] = {}
    for block in blocks:
        for name, linear in block["linears"].items():
            kind = re.split(rf"\.{block['index']}\.", name, maxsplit=1)[-1].removesuffix(".weight")
            if "expert" in linear:
                kind = re.sub(rf"(?<=[.\[]){linear['expert']}(?=[.\]])", "*", kind, count=1)
            kinds.setdefault(kind, {}).setdefault(block["index"], []).append(linear)
    return {kind: {at: _mean(records) for at, records in line.items()} for kind, line in kinds.items()}


def _mean(records: Sequence[Record]) -> Record:
    """The record of one matrix, or the means of what several have."""
    if len(records) == 1:
        return records[0]
    made: dict[str, Any] = {}
    for key in ("sparsity", "error"):
        if known := [record[key] for record in records if key in record]:
            made[key] = sum(known) / len(known)
    if scores := [record["score"] for record in records if record.get("score")]:
        of = [score["quantiles"] for score in scores]
        quantiles = {percent: sum(one[percent] for one in of) / len(of) for percent in of[0]}
        made["score"] = {"quantiles": quantiles, "lost": sum(score["lost"] for score in scores) / len(scores)}
    return made


def _grid(kinds: Kinds, blocks: Sequence[Record], value: Callable[[Any], float]) -> tuple[list[str], list[list[float]]]:
    """Names of the rows of a heat map, and their values block by block, NaN where a block has no such matrix."""
    places = [block["index"] for block in blocks]
    return list(kinds), [[value(line[at]) if at in line else math.nan for at in places] for line in kinds.values()]


def _short(models: Sequence[Record]) -> dict[str, str]:
    """{path: its last part, or the whole path where models share the last part}."""
    ends = {model["path"]: PurePath(model["path"]).name for model in models}
    return {path: end if end and list(ends.values()).count(end) == 1 else path for path, end in ends.items()}


def _peak(memory: Record) -> str:
    text = f"host {size(memory['host_measured'])} at most ({size(memory['host_predicted'])} predicted)"
    if memory["device_measured"]:
        text += f", GPU {size(memory['device_measured'])} ({size(memory['device_predicted'])} predicted)"
    return text
