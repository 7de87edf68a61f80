"""report.html: a report as one page that needs nothing else, neither a network nor a script."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lowmem_wanda import plots

Section = tuple[str, str, str]  # identifier, heading, HTML
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #59636e; --line: #d5dae0; --tint: #f3f5f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14171b; --soft: #9aa5b1; --line: #333a42; --tint: #1d2228 } }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, dd { max-width: 42rem } .soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { white-space: nowrap; overflow-wrap: normal }
.figures td, .figures th { text-align: right; white-space: nowrap; overflow-wrap: normal }
.figures td:first-child, .figures th:first-child { text-align: left; white-space: normal; min-width: 7rem }
svg { display: block; width: 100%; max-width: 40rem; height: auto; margin: .8rem 0 }
"""
LIMITS = (
    "A perplexity is of this text, cut to this length in this way: compare it with none of another text, length or "
    "convention.",
    "Errors are standard errors that take tokens as independent, which those of a text are not: differences within "
    "a few of them say little.",
    "Figures are of the model computed in the dtype below, not of a quantized copy of it.",
    "Pruning makes no file and no model in memory smaller, and none faster that does not use the zeros.",
)
TITLES = {"prune": "Pruned", "eval": "Evaluated", "compare": "Compared"}


def page(report: Mapping[str, Any]) -> str:
    """The page of a report of `prune`, `eval` or `compare`."""
    sections = {"prune": _pruned, "eval": _evaluated, "compare": _compared}[report["kind"]](report)
    last = report.get("models", [{}])[-1]
    title = f"{TITLES[report['kind']]}: {report.get('source') or last.get('path', '')}"
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>'
        for name, heading, html in [*sections, *_settings(report)]
        if html
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>"
    )


def _pruned(report: Mapping[str, Any]) -> Iterator[Section]:
    summary, blocks, memory = report["summary"], report["blocks"], report["peak_memory"]
    calibration = report["calibration"]
    text = (
        f"{calibration['sequences']} sequences of {calibration['length']} tokens from {', '.join(calibration['text'])}"
    )
    yield "summary", "Summary", _pairs({
        "method": f"{report['arguments']['--method']} {report['arguments']['--pattern']}",
        "calibration": text if calibration["text"] else "none needed",
        "zeros": f"{summary['zeros']:,} of {summary['weights']:,} weights in {summary['linears']} linears "
                 f"({summary['sparsity']:.2%})",
        "time": f"{report['timing']['wall']:.1f} s, {summary['forward_passes_per_block']:.2f} forward passes a block",
        "memory": _peak(memory),
    })  # fmt: skip
    yield (
        "limits",
        "What this gives, and what not",
        f"<p>{escape(summary['gives'])}</p><p>{escape(summary['gives_not'])}</p>",
    )
    kinds = _by_kind(blocks)
    yield (
        "sparsity",
        "Zeros",
        plots.heat("sparsity", "share of zeros", *_grid(kinds, blocks, lambda one: one["sparsity"]), ""),
    )
    yield "score", "Scores", "".join(_score_plots(kinds, blocks))
    yield "time", "Time", _time(blocks)
    yield "memory", "Memory", _memory({"host": report.get("memory", [])}, memory)


def _score_plots(kinds: Mapping[str, Mapping[int, Any]], blocks: Sequence[Any]) -> Iterator[str]:
    """Of what was pruned, and how scores are spread: the lower they lie, the less a linear's inputs and weights are."""
    if not all("score" in one for line in kinds.values() for one in line.values()):
        return
    yield "<p>Share of a linear's squared scores that was pruned away: for Wanda, of what its output loses.</p>"
    yield plots.heat(
        "lost", "pruned share of squared scores", *_grid(kinds, blocks, lambda one: one["score"]["lost"]), ""
    )

    def median(one: Any) -> float:
        value = one["score"]["quantiles"]["50"]
        return math.log10(value) if value > 0 else math.nan

    yield plots.heat("median", "median score", *_grid(kinds, blocks, median), "log10")

    def spread(one: Any) -> float:
        low, high = one["score"]["quantiles"]["10"], one["score"]["quantiles"]["90"]
        return math.log10(high / low) if low > 0 else math.nan

    yield plots.heat("spread", "spread of scores, 90 % above 10 %", *_grid(kinds, blocks, spread), "log10")


def _evaluated(report: Mapping[str, Any]) -> Iterator[Section]:
    models, dense = report["models"], report["against"]
    scored = [model for model in models if "perplexity" in model]
    yield "quality", "Quality", _quality([*([dense] if dense else []), *scored], "path", report) if scored else ""
    yield "block-error", "Error of each block's output", _errors({model["path"]: model for model in scored})
    yield "tasks", "Zero-shot tasks", _tasks(models)
    for place, model in enumerate(scored):
        heading = "" if len(scored) == 1 else f" of {model['path']}"
        mark = "" if place == 0 else f"-{place}"
        yield f"time{mark}", f"Time{heading}", _time(model["blocks"], mark)
        yield f"memory{mark}", f"Memory{heading}", _memory({"host": model["memory"]}, model["peak_memory"], mark)
    yield "limits", "What this says, and what not", _paragraphs(LIMITS)


def _compared(report: Mapping[str, Any]) -> Iterator[Section]:
    rows = report["rows"]
    if rows:
        dense = {**report["dense"], "name": "dense"}
        chart = {row["name"]: (row["perplexity"], row["perplexity_stderr"]) for row in [dense, *rows]}
        yield (
            "comparison",
            "Comparison",
            (
                _quality([dense, *rows], "name", report)
                + plots.ranges("comparison", f"perplexity at {report['length']}", chart, "perplexity")
            ),
        )
    spread = [
        (one["name"], one["rows"], f"{one['perplexity_mean']:.3f}", f"{one['perplexity_sd']:.3f}")
        for one in report["spread"]
    ]
    yield (
        "spread",
        "Spread over seeds",
        _table(("", "seeds", "mean perplexity", "standard deviation"), spread) if spread else "",
    )
    yield "block-error", "Error of each block's output", _errors({row["name"]: row for row in rows})
    yield "limits", "What this says, and what not", _paragraphs(LIMITS)


def _quality(models: Sequence[Mapping[str, Any]], name: str, report: Mapping[str, Any]) -> str:
    """Perplexity and distance of each model; the best of each pattern stands out in a comparison."""
    best: dict[str, float] = {}
    for row in models:
        if "pattern" in row:
            best[row["pattern"]] = min(best.get(row["pattern"], math.inf), row["perplexity"])
    lines = []
    for model in models:
        value = f"{model['perplexity']:.3f} ± {model['perplexity_stderr']:.3f}"
        strong = "pattern" in model and model["perplexity"] == best[model["pattern"]]
        cells = [model[name], f"*{value}" if strong else value]
        if "kl_mean" in model:
            cells += [
                f"{model['perplexity_ratio']:.3f} ± {model['perplexity_ratio_stderr']:.3f}", f"{model['kl_mean']:.4f}",
                f"{model['kl_p99']:.3f}", f"{model['top1_agreement']:.1%}",
            ]  # fmt: skip
            if "host_bytes" in model:
                cells += [f"{model['seconds']:.1f} s", _size(max(model["host_bytes"], model["device_bytes"]))]
        lines.append(cells)
    titles = ["", f"perplexity at {report['length']}", "x dense", "KL mean", "KL 99 %", "same top-1", "time", "memory"]
    windows = f"{report['windows']} windows of {report['length']} tokens ({report['convention']})"
    where = escape(f"{', '.join(report['text'])}: {windows}")
    return f'<p class="soft">{where}</p>' + _table(titles[: max(map(len, lines))], lines)


def _tasks(models: Sequence[Mapping[str, Any]]) -> str:
    """Every metric of every task with its standard error."""
    lines = [
        (model["path"], task, metric, f"{value:.4f}", f"{metrics[error]:.4f}" if _is_number(metrics.get(error)) else "")
        for model in models
        for task, metrics in model.get("tasks", {}).items()
        for metric, value in metrics.items()
        if _is_number(value) and not metric.endswith("_stderr")
        for error in [f"{metric}_stderr"]
    ]
    return _table(("", "task", "metric", "value", "±"), lines) if lines else ""


def _errors(models: Mapping[str, Mapping[str, Any]]) -> str:
    series = {
        name: (
            [block["index"] + 1 for block in model["blocks"]],
            [block["relative_error"] for block in model["blocks"]],
        )
        for name, model in models.items()
        if model["blocks"] and "relative_error" in model["blocks"][0]
    }
    about = "<p>Distance of each block's output from the dense model's, relative to that.</p>"
    return about + plots.lines("error", "relative error", series, "block", "relative error") if series else ""


def _time(blocks: Sequence[Mapping[str, Any]], mark: str = "") -> str:
    parts = list(dict.fromkeys(part for block in blocks for part in block["parts"]))
    split = {part: [float(block["parts"].get(part, 0)) for block in blocks] for part in parts}
    return plots.stacks(f"time{mark}", "seconds of each block, by part", split, "seconds") if parts else ""


def _memory(series: Mapping[str, Sequence[Sequence[float]]], peak: Mapping[str, float], mark: str = "") -> str:
    shown = {
        name: ([at for at, _ in points], [held / 1e6 for _, held in points])
        for name, points in series.items()
        if points
    }
    text = f"<p>{escape(_peak(peak))}</p>"
    if not shown:
        return text
    level = ("predicted", peak["host_predicted"] / 1e6)
    return text + plots.lines(f"memory{mark}", "memory of this process, no file's", shown, "seconds", "MB", level)


def _settings(report: Mapping[str, Any]) -> Iterator[Section]:
    yield (
        "arguments",
        "Arguments",
        _pairs({key: _shown(value) for key, value in report["arguments"].items() if _shown(value)}),
    )
    yield "versions", "Versions", _pairs(report["versions"])


def _by_kind(blocks: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """{kind of linear: {block: its record}}; a kind is the tensor's name from the block's number on."""
    kinds: dict[str, dict[int, Any]] = {}
    for block in blocks:
        for name, linear in block["linears"].items():
            kind = re.split(rf"\.{block['index']}\.", name, maxsplit=1)[-1].removesuffix(".weight")
            kinds.setdefault(kind, {})[block["index"]] = linear
    return kinds


def _grid(
    kinds: Mapping[str, Mapping[int, Any]], blocks: Sequence[Any], value: Any
) -> tuple[list[str], list[list[float]]]:
    """Names of the rows of a heat map, and their values block by block."""
    rows = [
        [value(line[block["index"]]) if block["index"] in line else math.nan for block in blocks]
        for line in kinds.values()
    ]
    return list(kinds), rows


def _peak(memory: Mapping[str, float]) -> str:
    text = f"host {_size(memory['host_measured'])} at most ({_size(memory['host_predicted'])} predicted)"
    if memory["device_measured"]:
        text += f", GPU {_size(memory['device_measured'])} ({_size(memory['device_predicted'])} predicted)"
    return text


def _pairs(values: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in values.items()
    )
    return f'<div class="wide"><table>{lines}</table></div>'


def _table(titles: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table of figures; a cell that begins with * stands out."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)

    def cell(value: Any) -> str:
        text = escape(str(value))
        return f"<td><b>{text[1:]}</b></td>" if text.startswith("*") else f"<td>{text}</td>"

    body = "".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in lines)
    return f'<div class="wide"><table class="figures"><tr>{head}</tr>{body}</table></div>'


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _shown(value: Any) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(str(one) for one in values if one is not None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
