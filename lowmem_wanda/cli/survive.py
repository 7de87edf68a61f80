"""The command `survive`."""

import argparse
from collections.abc import Mapping
from typing import Any

from lowmem_wanda.cli.options import add_command
from lowmem_wanda.cli.terminal import RULES, shown


def add(commands: Any) -> None:
    text = "say what quantization for llama.cpp leaves of a pruned checkpoint"
    command = add_command(commands, "survive", text, run)
    add = command.add_argument
    add("path", metavar="out_dir", help="folder of a pruned checkpoint")
    add("model", nargs="?", metavar="model.gguf", help="GGUF that was made of it (default: none, for a prediction)")
    add("--imatrix", metavar="FILE", help="importance matrix that weighs the errors of kept weights (.gguf, .dat)")


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import survive

    report = survive(arguments.path, arguments.model, arguments.imatrix)
    left = report["left_out"]
    said = [f"{len(left)} matrices are not looked at, such as {left[0]}: llama.cpp splits them in two"] if left else []
    return shown(arguments, report, *lines(report), types_table(report), *said, *report["advice"])


def types_table(report: Mapping[str, Any]) -> Any:
    """A table with a row for each type of a GGUF: what is left of the pruned weights, and of the others."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = "model" in report
    table = Table(box=box.SIMPLE, title_justify="left", caption_justify="left")
    table.title = escape(f"{report['path']}: {report['model'] if made else 'predicted on some rows of each linear'}")
    for title in ("type", "bits", *(("linears",) if made else ()), "still zero", "leak", "error"):
        table.add_column(title, justify="left" if title == "type" else "right", no_wrap=True)
    table.add_column("pattern" if made else "")
    for one in report["types"]:
        figures = [f"{one[key]:.2%}" if _told(one, key) else "" for key in ("zero", "leak", "error")]
        kept = f"in {one['holding']} of {one['patterned']}" if one.get("patterned") else ""
        rest = [str(one["linears"]), *figures, kept] if made else [*figures, RULES[one["grid"]]]
        table.add_row(one["type"], f"{one['bits']:g}" if "bits" in one else "", *rest)
    weighted = "weighted by the importance matrix" if report["imatrix"] else "unweighted, as there is no --imatrix"
    table.caption = (
        "still zero: of the pruned weights; leak: size of what they became beside that of the kept ones; error: of the "
        f"kept ones, {weighted}"
    ) + ("" if made else "; all as quantized without an importance matrix, which makes offsets smaller")
    return table


def lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each tensor of the GGUF."""
    width = max((len(tensor["tensor"]) for tensor in report.get("tensors", ())), default=0)
    return [
        f"{one['tensor']:<{width}}  {one['type']:>7}"
        + (f"  {one['zero']:8.2%} still zero  leak {one['leak']:7.2%}" if one["pruned"] else "")
        + f"  error {one['error']:7.2%}"
        + (f"  {one['pattern']} {'holds' if one['holds'] else 'broken'}" if one["pattern"] else "")
        for one in report.get("tensors", ())
    ]


def _told(one: Mapping[str, Any], key: str) -> bool:
    """Whether a figure of a type says something: of pruned weights, where there are any."""
    return key in one and (key == "error" or bool(one.get("pruned", 1)))
