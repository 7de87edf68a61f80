"""Parts of report.html: its style, tables, paragraphs, and the document around them. It needs no other file."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Record = Mapping[str, Any]
Section = tuple[str, str, str]  # identifier, heading, HTML
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
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--line); font-size: .85rem }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round } svg [id*=Quad] { shape-rendering: crispEdges }
"""


class Best(str):
    """The text of a cell that is shown in bold."""


def document(title: str, body: str) -> str:
    """A whole page, without scripts, that loads nothing."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>"
    )


def sections(title: str, parts: Iterable[Section]) -> str:
    """A whole page of those sections that are not empty."""
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>' for name, heading, html in parts if html
    )
    return document(title, body)


def pairs(values: Record) -> str:
    """A table of names and values, without those whose value is empty, such as flags that were not given."""
    cells = [(escape(key), escape(shown(value))) for key, value in values.items()]
    lines = "".join(f"<tr><th>{key}</th><td>{text}</td></tr>" for key, text in cells if text)
    return f'<div class="wide"><table class="pairs">{lines}</table></div>'


def table(titles: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table of figures, without empty columns; "" where there are no lines."""
    kept = [column for column in range(len(titles)) if any(line[column] != "" for line in lines)]
    head = "".join(f"<th>{escape(titles[column])}</th>" for column in kept)

    def cell(value: Any) -> str:
        text = escape(str(value))
        return f"<td><b>{text}</b></td>" if isinstance(value, Best) else f"<td>{text}</td>"

    body = "".join(f"<tr>{''.join(cell(line[column]) for column in kept)}</tr>" for line in lines)
    return f'<div class="wide"><table class="figures"><tr>{head}</tr>{body}</table></div>' if lines else ""


def paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def beside(parts: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(f"<div>{part}</div>" for part in parts)}</div>' if parts else ""


def time_unit(seconds: float) -> tuple[int, str]:
    return (1, "s") if seconds < 180 else (60, "min") if seconds < 10800 else (3600, "h")


def shown(value: Any) -> str:
    """A value of JSON on one line."""
    pairs = [f"{key} {one}" for key, one in value.items()] if isinstance(value, dict) else value
    values = pairs if isinstance(pairs, (list, tuple)) else [pairs]
    return ", ".join(str(one) for one in values if one is not None)
