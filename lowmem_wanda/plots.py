"""Figures as SVG that stands in a page, by matplotlib, which is brought late; empty where it is not installed.

Text stays text, backgrounds are transparent and ink takes the page's colour, so that a figure reads in dark and light.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

INK = "#010203"  # stands for the page's own colour
COLOURS = ("#4c8bf5", "#e8710a", "#1e9e5a", "#c93fb5", "#8f75e8", "#b0850f", "#0aa5b5", "#e0455e")
WIDTH = 5.2  # inches
NONE = "<p>No plots: pip install matplotlib</p>"
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.0, "axes.titlesize": 10.0, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "axes.titlelocation": "left",
}  # fmt: skip

Draw = Callable[[Any, Any], None]  # (figure, axes)


def heat(name: str, title: str, rows: Sequence[str], values: Sequence[Sequence[float]], bar: str) -> str:
    """A heat map of `values` [row][block]; NaN stays empty. `bar` is the title of its colour bar."""

    def draw(figure: Any, axes: Any) -> None:
        mesh = axes.pcolormesh([[*map(float, line)] for line in values], cmap="viridis")
        axes.set_yticks([index + 0.5 for index in range(len(rows))], rows)
        depth = max(map(len, values))
        places = _places(depth)
        axes.set_xticks([place + 0.5 for place in places], [str(place + 1) for place in places])
        axes.invert_yaxis()
        axes.set_xlabel("block")
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.colorbar(mesh, ax=axes, label=bar, pad=0.02)

    return _svg(name, title, 1.1 + 0.26 * len(rows), draw)


def lines(
    name: str, title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
    level: tuple[str, float] | None = None,
) -> str:  # fmt: skip
    """Lines of (x values, y values) by name, and a dashed one at a `level`."""

    def draw(figure: Any, axes: Any) -> None:
        for (label, (places, values)), colour in zip(series.items(), cycle(COLOURS)):
            axes.plot(places, values, label=label, color=colour, marker="o" if len(places) < 40 else None, markersize=3)
        if level is not None:
            axes.axhline(level[1], color=INK, linestyle="--", linewidth=0.8, label=level[0])
        axes.set(xlabel=x, ylabel=y)
        axes.set_ylim(bottom=0)
        if x == "block":
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, color=INK)
        if len(series) > 1 or level is not None:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)

    return _svg(name, title, 3.0 + 0.1 * len(series), draw)


def stacks(name: str, title: str, parts: Mapping[str, Sequence[float]], y: str) -> str:
    """A bar for each block, in parts."""

    def draw(figure: Any, axes: Any) -> None:
        depth = max(map(len, parts.values()))
        below = [0.0] * depth
        for (label, values), colour in zip(parts.items(), cycle(COLOURS)):
            axes.bar(range(1, depth + 1), values, bottom=below, label=label, color=colour, width=0.85)
            below = [one + other for one, other in zip(below, values, strict=True)]
        axes.set_xticks([place + 1 for place in _places(depth)])
        axes.set(xlabel="block", ylabel=y)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)

    return _svg(name, title, 2.9, draw)


def ranges(name: str, title: str, values: Mapping[str, tuple[float, float]], x: str) -> str:
    """A point with its error for each name, on a logarithmic axis where they are far from each other."""

    def draw(figure: Any, axes: Any) -> None:
        for place, ((centre, error), colour) in enumerate(zip(values.values(), cycle(COLOURS))):
            axes.errorbar(centre, place, xerr=error, fmt="o", color=colour, capsize=3)
        centres = [centre for centre, _ in values.values()]
        if max(centres) > 5 * min(centres):
            axes.set_xscale("log")
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.grid(alpha=0.25, color=INK, axis="x", which="both")

    return _svg(name, title, 0.9 + 0.26 * len(values), draw)


def _svg(name: str, title: str, height: float, draw: Draw) -> str:
    """An <svg> whose identifiers begin with `name`, or a line that says what to install."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return NONE
    written = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, figure.add_subplot(title=title))
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", text)
    label = title.replace("&", "and").replace('"', "'").replace("<", "(")
    return re.sub(r'^<svg ([^>]*?)width="[^"]*" ', rf'<svg role="img" aria-label="{label}" \1', _unsized(text), count=1)


def _unsized(text: str) -> str:
    """Without the height of the figure: the page gives its width."""
    return re.sub(r'^(<svg [^>]*?)height="[^"]*" ', r"\1", text, count=1)


def _places(depth: int) -> list[int]:
    """About eight blocks to name under an axis, from the first."""
    return list(range(0, depth, max(1, math.ceil(depth / 8))))
