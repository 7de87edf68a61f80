"""The command `recover`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_wanda.cli.options import add_command, positive, taken, whole
from lowmem_wanda.cli.terminal import Bar, number, pairs, shown

RECOVERING = ("text", "full", "rank", "steps", "learning_rate", "batch", "sequences", "length", "seed", "device",
              "trust_remote_code")  # fmt: skip


def add(commands: Any) -> None:
    command = add_command(commands, "recover", "fine-tune a pruned checkpoint with its zeros held", run)
    add = command.add_argument
    add("source", metavar="pruned_dir", help="folder that prune wrote; the whole model is loaded")
    add("target", metavar="out_dir", help="new folder")
    add("--text", nargs="+", required=True, metavar="FILE", help="what is trained on: plain text, .jsonl, token ids in "
        ".npy or .safetensors, or c4 or wikitext2, which are downloaded")  # fmt: skip
    add(
        "--full", action="store_true", help="train all weights of the blocks (default: LoRA adapters, which are merged)"
    )
    add("--rank", type=positive, default=16, metavar="N", help="rank of the adapters (default: 16)")
    add("--steps", type=positive, default=200, metavar="N", help="steps (default: 200)")
    add("--learning-rate", type=above_zero, metavar="RATE", help="highest rate (default: 2e-4, with --full 2e-5)")
    add("--batch", type=positive, default=8, metavar="N", help="sequences in a step (default: 8)")
    add("--sequences", type=positive, default=1024, metavar="N",
        help="sequences, the last tenth of which is held out (default: 1024)")  # fmt: skip
    add("--length", type=positive, default=512, metavar="N",
        help="tokens of each sequence, capped by the model (default: 512)")  # fmt: skip
    add("--seed", type=whole, default=0, metavar="N", help="seed of the sample and of the training (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--trust-remote-code", action="store_true", help="run, and copy, Python code that the checkpoint brings")


def above_zero(text: str) -> float:
    """A number above 0 and up to a million, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0, and at most 1e6")
    return value


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import recover
    from lowmem_wanda.cli.page import save_page

    with Bar("training") as bar:

        def begin(facts: Mapping[str, Any]) -> None:
            bar.line(about(facts))
            bar.begin(facts["steps"])

        report = recover(
            arguments.source,
            arguments.target,
            **taken(arguments, *RECOVERING),
            on_start=begin,
            on_step=bar.show,
            on_report=lambda report: save_page(report["folder"], report),
        )
    return shown(arguments, report, closing(report, arguments.target))


def about(facts: Mapping[str, Any]) -> str:
    """The lines before the work: what is trained and how, on which device, with which text."""
    how = f"LoRA of rank {facts['rank']}" if facts["rank"] else "all weights of the blocks"
    line = f"{facts['source']}: {how}, {facts['steps']} steps of {facts['batch']} sequences, on {facts['device']}"
    line += f"\ntext: {facts['sequences']} sequences of {facts['length']} tokens from {', '.join(facts['text'])}"
    line += f", and {facts['held_out']} that are held out"
    return line + "".join(f"\nwarning: {warning}" for warning in facts["warnings"])


def closing(report: Mapping[str, Any], target: str) -> Any:
    """The table that says what training did."""
    tuned, summary = report["fine_tuning"], report["summary"]
    table = pairs(f"recovered: {Path(target)}")
    how = f"LoRA of rank {tuned['rank']}, merged" if tuned["rank"] else "all weights of the blocks"
    table.add_row("trained", f"{how}, {tuned['steps']} steps at a rate of {tuned['learning_rate']:g}")
    table.add_row(
        "perplexity",
        f"{tuned['before']:.2f} before, {tuned['after']:.2f} after, on {tuned['held_out']} sequences held out",
    )
    if tuned["after"] > tuned["before"]:
        table.add_row("warning", "training made it worse: give a lower --learning-rate, fewer --steps, or more text")
    zeros, weights = number(summary["zeros"]), number(summary["weights"])
    table.add_row("pruned", f"{zeros} of {weights} weights ({summary['sparsity']:.2%})")
    table.add_row("gives", summary["gives"])
    table.add_row("does not", summary["gives_not"])
    return table
