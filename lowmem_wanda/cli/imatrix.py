"""The command `imatrix`."""

import argparse
from collections.abc import Mapping
from typing import Any

from lowmem_wanda.cli.options import add_calibration, add_command, add_machine, add_source, machine, taken
from lowmem_wanda.cli.terminal import Bar, add_peaks, calibration_text, damage_line, duration, pairs, shown


def add(commands: Any) -> None:
    text = "write a checkpoint's importance matrix, for llama.cpp's quantization"
    command = add_command(commands, "imatrix", text, run)
    add_source(command)
    command.add_argument("target", metavar="out_file", help="new file: .gguf, or .dat for the older format")
    add_calibration(command)
    add_machine(command)


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import imatrix

    with Bar("measuring") as bar:

        def begin(facts: Mapping[str, Any]) -> None:
            bar.line(f"{facts['source']}: {facts['blocks']} blocks, on {facts['device']}")
            bar.begin(facts["blocks"])

        result = imatrix(
            arguments.source,
            arguments.target,
            **taken(arguments, "text", "sequences", "length", "seed"),
            **machine(arguments),
            on_start=begin,
            on_block=lambda record: bar.show(record, damage_line(record, bar.total)),
        )
    return shown(arguments, result, imatrix_table(result))


def imatrix_table(result: Mapping[str, Any]) -> Any:
    """The table that says what an importance matrix was computed on, and where it is."""
    from rich.markup import escape

    table = pairs(f"importance matrix: {result['file']}")
    table.add_row("entries", f"{result['entries']} weights of {escape(result['source'])}")
    if left := result["left_out"]:
        table.add_row("left out", f"{len(left)} weights, such as {left[0]}: what llama.cpp multiplies them with is not "
            "measured, so types below 3 bits need another matrix")  # fmt: skip
    table.add_row("calibration", calibration_text(result))
    table.add_row("time", duration(result["seconds"]))
    add_peaks(table, result["peak_memory"])
    return table
