"""The page of a report of `shrink`."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from lowmem_wanda.checkpoint.writer import write_bytes
from lowmem_wanda.cli import plots
from lowmem_wanda.cli.markup import Record, Section, pairs, paragraphs, sections, table
from lowmem_wanda.cli.routes import routes
from lowmem_wanda.cli.shrink_text import imatrix_text, kept_text, measuring, protected_text, refit_text, zeros_text
from lowmem_wanda.cli.terminal import duration, ranges, size

LOST = "Share of a layer's routed tokens that went to experts which are gone, in the text that they were measured on."
ROUTES = (
    "Share of a layer's tokens that its router gave to each expert, from the busiest expert to the least busy one, in "
    "up to nine layers. The score decides, not this alone."
)
FITTED = (
    "Share of the squares of a layer's output that is lost, on an eighth of the calibration that nothing is fitted to."
)
RANKS = (
    "Scores of each layer's experts by rank, relative to its highest; those right of the dashed line are gone, unless "
    "groups of experts, or --protect, decide otherwise."
)


def save_page(path: Path, report: Record) -> None:
    """Writes the page."""
    text = sections(f"Shrunk: {Path(report['target']).name}", _sections(report))
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def _sections(report: Record) -> Iterator[Section]:
    experts, tokens, amounts = report["experts"], report["tokens"], report["bytes"]
    yield "summary", "Summary", pairs({
        "model": f"{report['source']} ({report['architecture']})",
        "experts": f"{kept_text(experts)} of {experts['layers']} layers; {experts['used']} at work for a token, as "
                   "before",
        "chosen by": report["how"],
        "size": f"{size(amounts['before'])} before, {size(amounts['after'])} now "
                f"({amounts['after'] / amounts['before']:.1%})",
        "tokens": tokens and f"{tokens['lost_mean']:.2%} of routed tokens went to dropped experts; at most "
                             f"{tokens['lost_most']:.2%}, in layer {tokens['lost_most_in']}",
        "refit": report.get("refit") and refit_text(report["refit"]),
        "zeros": zeros_text(report) if "pattern" in report else None,
        "protected": protected_text(report),
        "imatrix": imatrix_text(report["imatrix"]) if report.get("imatrix") else None,
        "routing": report["routing_text"],
        "time": duration(report["seconds"]),
    })  # fmt: skip
    yield "warnings", "Warnings", paragraphs(report["warnings"])
    commands = "\n".join(report["commands"])
    how = paragraphs([measuring(report)])
    yield (
        "costs",
        "What it costs, and how to know",
        paragraphs(report["costs"]) + how + f"<pre>{escape(commands)}</pre>",
    )
    yield "tokens", "Tokens", _tokens(report["layers"])
    yield "scores", "Scores", _scores(report["layers"], experts["kept"])
    yield "refit", "Refit", _refit(report["layers"])
    yield "layers", "Layers", _layers(report["layers"])
    kind = "SHA-256" if "sha256" in report["files"][0] else "BLAKE3"
    files = [(file["name"], size(file["nbytes"]), file.get("sha256") or file["blake3"]) for file in report["files"]]
    yield "files", "Files", table(("file", "size", kind), files)
    yield "proof", "Proof", f"<pre>{escape(report['proof'])}</pre>"
    yield "arguments", "Arguments", pairs(report["arguments"])
    yield "versions", "Versions", pairs(report["versions"])


def _tokens(layers: Sequence[Record]) -> str:
    """A bar for each layer that was measured, and how its tokens were routed."""
    lost = {str(layer["layer"]): 100 * layer["tokens_lost"] for layer in layers if layer["tokens_lost"] is not None}
    if not lost:
        return ""
    seen = {str(layer["layer"]): (layer["counts"], set(layer["kept"])) for layer in layers if layer["counts"]}
    figure = plots.bars("lost", "tokens of dropped experts", lost, "layer", "%")
    return paragraphs([LOST]) + figure + paragraphs([ROUTES]) + routes("routes", "tokens of each expert", seen)


def _scores(layers: Sequence[Record], kept: int) -> str:
    """A line for each layer that was scored."""
    scored = {str(layer["layer"]): layer["scores"] for layer in layers if layer["scores"]}
    return paragraphs([RANKS]) + plots.ranks("ranks", "scores by rank", scored, kept) if scored else ""


def _refit(layers: Sequence[Record]) -> str:
    """What each layer that was fitted loses, before and after."""
    fitted = [layer for layer in layers if "refit" in layer]
    if not fitted:
        return ""
    places = [layer["layer"] for layer in fitted]
    held = [[100 * layer["refit"]["held_out"][place] for layer in fitted] for place in (0, 1)]
    series = {key: (places, values) for key, values in zip(("before", "after"), held, strict=True)}
    return paragraphs([FITTED]) + plots.lines("fitted", "outputs lost before and after the refit", series, "layer", "%")


def _layers(layers: Sequence[Record]) -> str:
    """A row for each layer: what chose, the tokens that it loses, the experts that it keeps."""
    rows = {}
    for layer in layers:
        lost = "" if layer["tokens_lost"] is None else f"{layer['tokens_lost']:.2%} of its tokens lost; "
        seen = f"{_seen(layer['counts'])}; " if layer["counts"] else ""
        rows[f"layer {layer['layer']}"] = f"{layer['by']}; {lost}{seen}keeps {ranges(layer['kept'])}"
    return pairs(rows)


def _seen(counts: Sequence[int]) -> str:
    """How many tokens the experts of a layer saw."""
    ordered, unseen = sorted(counts), sum(not count for count in counts)
    text = f"{ordered[0]} to {ordered[-1]} tokens an expert, {ordered[len(ordered) // 2]} in the median"
    return text + (f", {unseen} unseen" if unseen else "")
