"""report.html: a report as one page that needs nothing else, neither a network nor a script."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from lowmem_wanda import plots

Section = tuple[str, str, str]  # identifier, heading, HTML
Record = Mapping[str, Any]
Kinds = Mapping[str, Mapping[int, Any]]  # {kind of linear: {block: its record}}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #59636e; --line: #d5dae0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14171b; --soft: #9aa5b1; --line: #333a42 } }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { max-width: 42rem; margin: .5rem 0 } .soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { overflow-wrap: break-word; max-width: 11rem } .pairs th { min-width: 6rem } .pairs td { min-width: 9rem }
.figures { font-size: .92rem } .figures td { white-space: nowrap } .figures th { vertical-align: bottom }
.figures :not(:first-child) { text-align: right } .figures td:first-child { white-space: normal; min-width: 8.5rem }
.plots { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 1rem 0 .4rem; max-width: 36rem; min-width: 0 } figcaption { color: var(--soft) }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round } svg [id*=Quad] { shape-rendering: crispEdges }
"""
LIMITS = (
    "A perplexity is of this text, length and convention of cutting it: compare it with none of others.",
    "Standard errors take tokens as independent, which those of a text are not: small differences say little.",
    "Figures are of the model computed in the dtype below, not of a quantized copy of it.",
    "Pruning makes no file and no model in memory smaller, and none faster that does not use the zeros.",
)
LOST = "Share of a linear's squared scores that was pruned away: for Wanda, of what its output loses."
ERRORS = "Distance of each block's output from the dense model's, relative to that."
DISTANCE = {
    "x dense": ("perplexity_ratio", ".3f"), "KL mean": ("kl_mean", ".4f"), "KL median": ("kl_median", ".4f"),
    "KL 99%": ("kl_p99", ".3f"), "KL max": ("kl_max", ".2f"), "same top-1": ("top1_agreement", ".1%"),
}  # fmt: skip


class Best(str):
    """A cell that stands out."""


def page(report: Record) -> str:
    """The page of a report of `prune`, `eval` or `compare`."""
    kinds = {"prune": ("Pruned", _pruned), "eval": ("Evaluated", _evaluated), "compare": ("Compared", _compared)}
    done, sections = kinds[report["kind"]]
    title = f"{done}: {report.get('source') or ', '.join(_short(report['models']).values())}"
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>'
        for name, heading, html in [*sections(report), *_settings(report)]
        if html
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>"
    )


def _pruned(report: Record) -> Iterator[Section]:
    summary, blocks, calibration = report["summary"], report["blocks"], report["calibration"]
    shape = f"{calibration['sequences']} sequences of {calibration['length']} tokens from "
    yield "summary", "Summary", _pairs({
        "method": f"{report['arguments']['--method']} {report['arguments']['--pattern']}",
        "calibration": shape + ", ".join(calibration["text"]) if calibration["text"] else "none needed",
        "zeros": f"{summary['zeros']:,} of {summary['weights']:,} weights in {summary['linears']} linears "
                 f"({summary['sparsity']:.2%})",
        "parameters": f"{summary['parameters']:,}",
        "files": f"{_size(summary['bytes'])} in {len(report['shards'])} shards, as large as the source's",
        "time": f"{_span(summary['seconds'])}, {summary['forward_passes_per_block']:.2f} forward passes a block",
        "memory": _peak(report["peak_memory"]),
    })  # fmt: skip
    yield "limits", "What this gives, and what not", _paragraphs([summary["gives"], summary["gives_not"]])
    kinds = _by_kind(blocks)
    zeros = _grid(kinds, blocks, lambda one: one["sparsity"])
    yield "sparsity", "Zeros", plots.heat("sparsity", "share of zeros", *zeros, share=True)
    yield "score", "Scores", _scores(kinds, blocks)
    yield "time", "Time", _time(report, summary["seconds"])
    yield "memory", "Memory", _memory(report)


def _scores(kinds: Kinds, blocks: Sequence[Record]) -> str:
    """How scores lay, and how much of them was pruned; of linears whose scores were kept."""

    def lost(one: Record) -> float:
        return float(one["score"]["lost"]) if one.get("score") else math.nan

    def median(one: Record) -> float:
        value = one["score"]["quantiles"]["50"] if one.get("score") else 0
        return math.log10(value) if value > 0 else math.nan

    def band(line: Mapping[int, Any]) -> list[tuple[float, float, float, float]]:
        scored = {index + 1: one["score"]["quantiles"] for index, one in line.items() if one.get("score")}
        return [(block, values["10"], values["50"], values["90"]) for block, values in scored.items()]

    figures = (
        plots.heat("lost", "pruned share of squared scores", *_grid(kinds, blocks, lost), share=True),
        plots.heat("median", "median score, as power of ten", *_grid(kinds, blocks, median)),
        plots.bands("bands", "median score, and where 80 % of scores lie", {key: band(kinds[key]) for key in kinds}),
    )
    return f'<p>{escape(LOST)}</p><div class="plots">{"".join(figures)}</div>' if any(figures) else ""


def _evaluated(report: Record) -> Iterator[Section]:
    models, dense, short = report["models"], report.get("against"), _short(report["models"])
    scored = [model for model in models if "perplexity" in model]
    rows = [{**model, "name": short[model["path"]]} for model in scored]
    rows = [{**dense, "name": f"dense: {PurePath(dense['path']).name}"}, *rows] if dense else rows
    yield "quality", "Quality", _quality(rows, report) if scored else ""
    yield "block-error", "Error of each block's output", _errors({short[model["path"]]: model for model in scored})
    yield "tasks", "Zero-shot tasks", _tasks(models, short)
    named = [(model, f"{short[model['path']]}: " if len(scored) > 1 else "") for model in scored]
    times = [_time(model, model["seconds"], f"parts-{place}", title) for place, (model, title) in enumerate(named)]
    yield "time", "Time", _beside(times)
    held = [_memory(model, f"held-{place}", title) for place, (model, title) in enumerate(named)]
    yield "memory", "Memory", _beside(held)
    yield "limits", "What this says, and what not", _paragraphs(LIMITS)


def _compared(report: Record) -> Iterator[Section]:
    rows, dense = report["rows"], report.get("dense")
    if rows and dense:
        chart = {row["name"]: (row["perplexity"], row["perplexity_stderr"]) for row in rows}
        level, title = ("dense", dense["perplexity"]), f"perplexity at {report['length']}"
        table = _quality([{**dense, "name": "dense"}, *rows], report)
        yield "comparison", "Comparison", table + plots.ranges("chart", title, chart, title, level)
    spread = []
    for one in report.get("spread", ()):
        spread.append((one["name"], one["rows"], f"{one['perplexity_mean']:.3f}", f"{one['perplexity_sd']:.3f}"))
    titles = ("", "seeds", "mean perplexity", "standard deviation")
    yield "spread", "Spread over seeds", _table(titles, spread)
    yield "block-error", "Error of each block's output", _errors({row["name"]: row for row in rows})
    yield "limits", "What this says, and what not", _paragraphs(LIMITS)


def _quality(models: Sequence[Record], report: Record) -> str:
    """Perplexity and distance of each model; the best of each pattern stands out in a comparison."""
    ranked = sorted((row for row in models if "pattern" in row), key=lambda row: row["perplexity"], reverse=True)
    best = {row["pattern"]: row["perplexity"] for row in ranked}

    def cells(model: Record) -> list[str]:
        value = _measured(model, "perplexity", ".3f")
        memory = max(model.get("host_bytes", 0), model.get("device_bytes", 0))
        return [
            model["name"],
            Best(value) if model["perplexity"] == best.get(model.get("pattern", "")) else value,
            *(_measured(model, name, form) for name, form in DISTANCE.values()),
            *((_span(model["seconds"]), _size(memory)) if memory else ("", "")),
        ]

    titles = ("", f"perplexity at {report['length']}", *DISTANCE, "time to prune", "memory")
    tokens = next((f", {model['tokens']:,} scored" for model in models if "tokens" in model), "")
    windows = f"{report['windows']} windows" if "windows" in report else "windows"
    cut = f"{', '.join(report['text'])}: {windows} of {report['length']} tokens ({report['convention']}){tokens}"
    return f'<p class="soft">{escape(cut)}</p>' + _table(titles, [cells(model) for model in models])


def _tasks(models: Sequence[Record], short: Mapping[str, str]) -> str:
    """Every metric of every task with its standard error, the models beside each other."""
    found = {
        (task, metric): None
        for model in models
        for task, metrics in model.get("tasks", {}).items()
        for metric in metrics
        if _measured(metrics, metric, "") and not metric.endswith("_stderr")
    }
    lines = [
        (task, metric, *(_measured(model.get("tasks", {}).get(task, {}), metric, ".4f") for model in models))
        for task, metric in found
    ]
    return _table(("task", "metric", *(short[model["path"]] for model in models)), lines)


def _errors(models: Mapping[str, Record]) -> str:
    """A line for each model that was held against the dense one."""
    series = {}
    for name, model in models.items():
        errors = {block["index"] + 1: block["relative_error"] for block in model["blocks"] if "relative_error" in block}
        if errors:
            series[name] = (list(errors), list(errors.values()))
    figure = plots.lines("error", "relative error by depth", series, "block", "relative error") if series else ""
    return f"<p>{escape(ERRORS)}</p>{figure}" if series else ""


def _time(report: Record, seconds: float, name: str = "parts", title: str = "") -> str:
    """Seconds of each block, and how much of the work was hidden behind the computing."""
    blocks, timing, text = report["blocks"], report.get("timing"), f"{title}{_span(seconds)}"
    if timing and timing["serial"]:
        text += f", computing in {timing['compute_busy']:.0%} of the last run; all parts one after the other: "
        text += f"{timing['serial_over_wall']:.2f} times as long"
    parts = list(dict.fromkeys(part for block in blocks for part in block["parts"]))
    split = {part: [float(block["parts"].get(part, 0)) for block in blocks] for part in parts}
    return _paragraphs([text]) + (plots.stacks(name, "by block and part", split, "seconds") if parts else "")


def _memory(report: Record, name: str = "held", title: str = "") -> str:
    """Peaks, and what was held over time."""
    peak, points = report["peak_memory"], report.get("memory")
    text = _paragraphs([title + _peak(peak)])
    if not points:
        return text
    scale, unit = (1e9, "GB") if peak["host_predicted"] >= 1e9 else (1e6, "MB")
    tick, time = _unit(points[-1][0])  # seconds
    series = {"host": ([at / tick for at, _ in points], [held / scale for _, held in points])}
    level = ("predicted at most", peak["host_predicted"] / scale)
    return text + plots.lines(name, "memory of this process that no file backs", series, time, unit, level)


def _settings(report: Record) -> Iterator[Section]:
    yield "arguments", "Arguments", _pairs(report["arguments"])
    yield "versions", "Versions", _pairs(report["versions"])


def _by_kind(blocks: Sequence[Record]) -> dict[str, dict[int, Any]]:
    """{kind of linear: {block: its record}}; a kind is the tensor's name from the block's number on."""
    kinds: dict[str, dict[int, Any]] = {}
    for block in blocks:
        for name, linear in block["linears"].items():
            kind = re.split(rf"\.{block['index']}\.", name, maxsplit=1)[-1].removesuffix(".weight")
            kinds.setdefault(kind, {})[block["index"]] = linear
    return kinds


def _grid(kinds: Kinds, blocks: Sequence[Record], value: Callable[[Any], float]) -> tuple[list[str], list[list[float]]]:
    """Names of the rows of a heat map, and their values block by block, NaN where a block has no such linear."""
    places = [block["index"] for block in blocks]
    return list(kinds), [[value(line[at]) if at in line else math.nan for at in places] for line in kinds.values()]


def _short(models: Sequence[Record]) -> dict[str, str]:
    """{path: its last part}, or the path where models share that."""
    ends = {model["path"]: PurePath(model["path"]).name for model in models}
    return {path: end if end and list(ends.values()).count(end) == 1 else path for path, end in ends.items()}


def _peak(memory: Record) -> str:
    text = f"host {_size(memory['host_measured'])} at most ({_size(memory['host_predicted'])} predicted)"
    if memory["device_measured"]:
        text += f", GPU {_size(memory['device_measured'])} ({_size(memory['device_predicted'])} predicted)"
    return text


def _pairs(values: Record) -> str:
    """A table of what is there: a flag that was not given is left out."""
    shown = [(escape(key), escape(_shown(value))) for key, value in values.items()]
    lines = "".join(f"<tr><th>{key}</th><td>{text}</td></tr>" for key, text in shown if text)
    return f'<div class="wide"><table class="pairs">{lines}</table></div>'


def _table(titles: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table of figures, without columns in which nothing stands."""
    kept = [column for column in range(len(titles)) if any(line[column] != "" for line in lines)]
    head = "".join(f"<th>{escape(titles[column])}</th>" for column in kept)

    def cell(value: Any) -> str:
        text = escape(str(value))
        return f"<td><b>{text}</b></td>" if isinstance(value, Best) else f"<td>{text}</td>"

    body = "".join(f"<tr>{''.join(cell(line[column]) for column in kept)}</tr>" for line in lines)
    return f'<div class="wide"><table class="figures"><tr>{head}</tr>{body}</table></div>' if lines else ""


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _beside(parts: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(f"<div>{part}</div>" for part in parts)}</div>' if parts else ""


def _measured(figures: Record, name: str, form: str) -> str:
    """A figure ± its standard error, as far as they are there."""
    values = [figures.get(key) for key in (name, f"{name}_stderr")]
    return " ± ".join(f"{value:{form}}" for value in values if isinstance(value, (int, float)))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.4g} MB"


def _span(seconds: float) -> str:
    size, unit = _unit(seconds)
    return f"{seconds / size:.1f} {unit}"


def _unit(seconds: float) -> tuple[int, str]:
    return (1, "s") if seconds < 180 else (60, "min") if seconds < 10800 else (3600, "h")


def _shown(value: Any) -> str:
    """A value of JSON on one line."""
    pairs = [f"{key} {one}" for key, one in value.items()] if isinstance(value, dict) else value
    values = pairs if isinstance(pairs, (list, tuple)) else [pairs]
    return ", ".join(str(one) for one in values if one is not None)
