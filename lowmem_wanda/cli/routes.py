"""A figure of how many tokens the experts of a layer were given, and which experts are kept."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowmem_wanda.cli.plots import COLOURS, figure_of, legend_height

PANELS = 9  # layers at most that are shown, evenly spaced
NAMES = ("kept", "dropped")


def routes(name: str, title: str, layers: Mapping[str, tuple[Sequence[int], Collection[int]]]) -> str:
    """A panel for each of some layers: the shares of its routed tokens by expert, the busiest first.

    `layers` are {layer: (tokens of each expert, ids that are kept)}.
    """
    chosen = list(layers)
    if len(chosen) > PANELS:
        chosen = [chosen[place * (len(chosen) - 1) // (PANELS - 1)] for place in range(PANELS)]
    high = math.ceil(len(chosen) / 3)

    def draw(figure: Any) -> None:
        grid = figure.subplots(high, min(3, len(chosen)), sharex=True, squeeze=False).flatten()
        for axes, layer in zip(grid, chosen, strict=False):
            counts, kept = layers[layer]
            order = sorted(range(len(counts)), key=lambda expert: -counts[expert])
            shares = [100 * counts[expert] / max(1, sum(counts)) for expert in order]
            for own, colour, label in zip((True, False), COLOURS, NAMES, strict=False):
                heights = [share if (expert in kept) is own else 0 for share, expert in zip(shares, order, strict=True)]
                axes.stairs(heights, range(len(order) + 1), fill=True, color=colour, label=label)
            axes.set_title(f"layer {layer}")
            axes.grid(axis="y")
        for axes in grid[len(chosen) :]:
            axes.set_visible(False)
        figure.supylabel("% of tokens", fontsize=10)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)

    return figure_of(name, title, 0.6 + 1.0 * high + legend_height(NAMES), draw)
