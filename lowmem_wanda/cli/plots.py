"""Figures as SVG within a page, drawn by matplotlib, which is imported late.

Where matplotlib is not installed, a line that says so takes a figure's place. Text stays text in the page's font,
backgrounds are transparent and ink takes the page's colour, so that a figure can be read in dark and light and on a
phone.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

INK = "#010203"  # stands for the page's own colour
COLOURS = ("#4c8bf5", "#e8710a", "#1e9e5a", "#c93fb5", "#8f75e8", "#b0850f", "#0899a8", "#e0455e")  # 3:1 on dark, light
MARKERS = "osD^v*X"  # one fewer than there are colours, so that a pair of both repeats late
WIDTH = 5.2  # inches; a phone is about 5 inches of 72 px wide, so that a point is a pixel there
LINE = 0.17  # inches that a line of a legend takes
NONE = "<p>No plots: pip install matplotlib</p>"
STYLE = {
    "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 10.0, "axes.titlesize": 9.0, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.0, "grid.color": INK, "grid.alpha": 0.15,
    "text.parse_math": False, "axes.unicode_minus": False, "axes.axisbelow": True,
}  # fmt: skip

Draw = Callable[[Any], None]  # puts axes into a figure
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {name: (x values, y values)}


def heat(name: str, title: str, rows: Sequence[str], values: Sequence[Sequence[float]], share: bool = False) -> str:
    """A heat map of `values` [row][block]; NaN stays empty.

    Values that are a `share` are shown in percent. Where all are alike, a line says so in place of a map.
    """
    known = [value for line in values for value in line if math.isfinite(value)]
    if not known:
        return ""
    if share and max(known) - min(known) < 0.001:
        return f"<p>{escape(title)}: {sum(known) / len(known):.2%} of every linear in every block.</p>"
    factor = 100 if share else 1

    def draw(figure: Any) -> None:
        from matplotlib import colormaps, colors

        # viridis without its ends, which are too near to the backgrounds; a bar of 50 colours would become a bitmap
        shades = colors.ListedColormap([colormaps["viridis"](0.12 + 0.85 * step / 47) for step in range(48)])
        axes = figure.add_subplot()
        mesh = axes.pcolormesh([[factor * float(value) for value in line] for line in values], cmap=shades)
        axes.set_yticks([index + 0.5 for index in range(len(rows))], [short(row, 26) for row in rows])
        _block_axis(axes, max(map(len, values)), first=0.5)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, format="{x:.4g}%" if share else "{x:.4g}")
        bar.outline.set_visible(False)

    return figure_of(name, title, 0.7 + 0.26 * len(rows), draw)


def bands(name: str, title: str, panels: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """A panel for each name, three side by side, with a band of (block, low, middle, high).

    The scale is logarithmic, so that points whose `low` is 0 are left out.
    """
    panels = {label: [point for point in points if point[1] > 0] for label, points in panels.items()}
    panels = {label: points for label, points in panels.items() if points}
    if not panels:
        return ""
    high = math.ceil(len(panels) / 3)

    def draw(figure: Any) -> None:
        grid = figure.subplots(high, min(3, len(panels)), sharex=True, sharey=True, squeeze=False).flatten()
        depth = max(int(point[0]) for points in panels.values() for point in points)
        for axes, (label, points) in zip(grid, panels.items(), strict=False):
            blocks, lows, middles, highs = zip(*points, strict=True)
            axes.fill_between(blocks, lows, highs, color=COLOURS[0], alpha=0.35, linewidth=0)
            axes.plot(blocks, middles, color=COLOURS[0], linewidth=1.2, marker="o" if len(points) == 1 else None)
            axes.set_title(short(label, 22))
            axes.set_yscale("log")
            axes.set_xlim(0.5, depth + 0.5)
            axes.grid(axis="y")
            _plain_log(axes.yaxis, (1.0,), most=3)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(panels) - 3) : len(panels)]:  # the lowest of each column
            _block_axis(axes, depth, most=3)
            axes.set_xlabel(None)
            axes.tick_params(labelbottom=True)
        figure.supxlabel("block", fontsize=10)

    return figure_of(name, title, 0.5 + 0.95 * high, draw)


def lines(name: str, title: str, series: Series, x: str, y: str, level: tuple[str, float] | None = None) -> str:
    """A line for each name, and a dashed one at a `level`. An `x` of "block" makes an axis of whole numbers from 1."""
    labels = [*series, level[0]] if level else list(series) if len(series) > 1 else []

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for (label, (places, values)), colour, marker in zip(series.items(), cycle(COLOURS), cycle(MARKERS)):
            marks = {"marker": marker, "markersize": 4, "markevery": max(1, len(places) // 16)} if x == "block" else {}
            axes.plot(places, values, label=short(label), color=colour, linewidth=1.3, **marks)
        if level is not None:
            axes.axhline(level[1], color=INK, linestyle="--", linewidth=0.9, label=short(level[0]))
        axes.set(xlabel=x, ylabel=y)
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
        if x == "block":
            _block_axis(axes, int(max(max(places) for places, _ in series.values())))
        axes.grid()
        legend(figure, labels)

    return figure_of(name, title, 2.5 + legend_height(labels), draw)


def stacks(name: str, title: str, parts: Mapping[str, Sequence[float]], y: str) -> str:
    """A bar for each block, stacked of its parts."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        depth = max(map(len, parts.values()))
        below = [0.0] * depth
        for (label, values), colour in zip(parts.items(), cycle(COLOURS)):
            axes.bar(range(1, depth + 1), values, bottom=below, label=short(label), color=colour, width=0.85)
            below = [one + other for one, other in zip(below, values, strict=True)]
        _block_axis(axes, depth)
        axes.set_ylabel(y)
        axes.grid(axis="y")
        legend(figure, list(parts))

    return figure_of(name, title, 2.3 + legend_height(list(parts)), draw)


def bars(name: str, title: str, values: Mapping[str, float], x: str, y: str) -> str:
    """A bar for each name."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.bar(range(len(values)), list(values.values()), color=COLOURS[0], width=0.85)
        step = max(1, math.ceil(len(values) / 12))
        axes.set_xticks(range(0, len(values), step), [short(label, 12) for label in list(values)[::step]])
        axes.set(xlabel=x, ylabel=y)
        axes.grid(axis="y")

    return figure_of(name, title, 2.3, draw)


def ranks(name: str, title: str, scores: Mapping[str, Sequence[float | None]], kept: int) -> str:
    """A line of scores in descending order for each name, relative to the highest, and a line after the `kept` first.

    Scores below zero are shifted, so that the lowest is 0. Earlier names are darker.
    """

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        axes = figure.add_subplot()
        for place, values in enumerate(scores.values()):
            known = sorted((value for value in values if value is not None), reverse=True)
            low = min(0.0, known[-1])
            top = (known[0] - low) or 1.0
            shade = colormaps["viridis"](0.12 + 0.85 * place / max(1, len(scores) - 1))
            axes.plot(range(1, len(known) + 1), [(value - low) / top for value in known], color=shade, linewidth=0.9)
        axes.axvline(kept + 0.5, color=INK, linestyle="--", linewidth=0.9)
        axes.set(xlabel="rank of the expert", ylabel="score, relative")
        axes.grid()

    return figure_of(name, title, 2.6, draw)


def ranges(name: str, title: str, values: Mapping[str, tuple[float, float]], x: str, level: tuple[str, float]) -> str:
    """A point with its error for each name, and a line at a `level`; logarithmic where values are far apart."""
    names = [textwrap.fill(short(label, 75), 26) for label in values]
    height = 0.08 + 0.17 * max(label.count("\n") + 1 for label in names)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for place, (centre, error) in enumerate(values.values()):
            axes.errorbar(centre, place, xerr=error, fmt="o", color=COLOURS[0], markersize=5, capsize=3)
        axes.axvline(level[1], color=INK, linestyle="--", linewidth=0.9, label=short(level[0]))
        centres = [level[1], *(centre for centre, _ in values.values())]
        if max(centres) > 3 * min(centres) > 0:
            axes.set_xscale("log")
            _plain_log(axes.xaxis, (1.0, 2.0, 3.0, 5.0, 7.0) if max(centres) < 100 * min(centres) else (1.0,))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(x)
        axes.grid(axis="x")
        legend(figure, [level[0]])

    return figure_of(name, title, 0.7 + height * len(names), draw)


def figure_of(name: str, title: str, height: float, draw: Draw) -> str:
    """A <figure> whose identifiers begin with `name`, or a line that says what to install.

    The identifiers are the same for the same data.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return NONE
    written = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from")  # the browser has the glyphs that this font lacks
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<[^>]+>", lambda tag: _inlined(tag[0], name), text)  # in text, < and > are &lt; and &gt;
    text = re.sub(r">\s+<", "><", text)
    view = re.search(r'viewBox="[^"]*"', text)
    opened = f'<svg role="img" aria-label="{escape(title)}" {view[0] if view else ""}>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{opened}{text[text.index('>') + 1 :].strip()}</figure>"


def _inlined(tag: str, name: str) -> str:
    """A tag as it stands in a page: identifiers begin with `name`, font and ink are the page's, numbers are short."""
    for pattern, by in (
        (r'( id="| xlink:href="#|url\(#)', rf"\1{name}-"),
        (r" xmlns(:xlink)?=\"[^\"]*\"", ""),
        (r" xlink:href=", " href="),
        (r"\bfont: ([\d.]+px) [^;\"]*", r"font-size: \1"),
        (r"font-family: [^;\"]*;? ?", ""),
        (r"(\d\.\d\d)\d+", r"\1"),
        (r"\s*\n\s*", ""),
        (INK, "currentColor"),
    ):
        tag = re.sub(pattern, by, tag)
    if "fill: " in tag and tag.startswith("<path") and "stroke" not in tag:  # a cell or a bar, of which there are many
        tag = re.sub(r' clip-path="[^"]*"', "", tag)
    return tag


def _block_axis(axes: Any, depth: int, first: float = 1.0, most: int = 8) -> None:
    """Names about `most` blocks under an axis, counted from 1; block 1 stands at `first`."""
    step = next(size for size in (1, 2, 5, 10, 20, 25, 50, 100, 10**9) if depth <= size * most)
    named = range(1, depth + 1, step) if step < 5 else [1, *range(step, depth + 1, step)]
    axes.set_xticks([place - 1 + first for place in named], [str(place) for place in named])
    axes.set_xlabel("block")


def _plain_log(axis: Any, steps: Sequence[float], most: int = 6) -> None:
    """Puts at most `most` marks on a logarithmic axis, at `steps` times powers of ten, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps, numticks=most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def short(text: str, most: int = 56) -> str:
    """A text on one line, only its end where it is long. matplotlib leaves out labels that begin with _."""
    line = " ".join(text.split())
    line = line if len(line) <= most else f"…{line[1 - most :]}"
    return f" {line}" if line.startswith("_") else line


def _columns(labels: Sequence[str]) -> int:
    """The number of columns of a legend, by its longest line: 5.3 points a letter, 50 for the rest of a column."""
    return max(1, min(len(labels), int(72 * WIDTH / (50 + 5.3 * max(len(short(label)) for label in labels)))))


def legend_height(labels: Sequence[str]) -> float:
    return LINE * (1 + math.ceil(len(labels) / _columns(labels))) if labels else 0.0


def legend(figure: Any, labels: Sequence[str]) -> None:
    if labels:
        figure.legend(loc="outside lower center", ncols=_columns(labels))
