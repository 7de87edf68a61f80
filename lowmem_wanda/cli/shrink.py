"""The command `shrink`."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_wanda import CHECKPOINT_SCORES, EXPERT_SCORES
from lowmem_wanda.cli.options import MACHINE, add_calibration, add_command, add_machine, machine, positive, taken
from lowmem_wanda.cli.options import size as byte_count
from lowmem_wanda.cli.shrink_text import about, about_checkpoint, block_line, closing, lines, plan_table, table
from lowmem_wanda.cli.terminal import Bar, shown
from lowmem_wanda.errors import PatternError

MEGA = 10**6  # bytes
BOTH = ("drop_experts", "keep_experts", "scores_from", "score", "seed", "plan", "write_plan")
OF_GGUF = ("imatrix_out", "split_size")
OF_CHECKPOINT = ("record", "mtp", "statistics", "refit", "protect", "imatrix", "pattern", "text", "sequences", "length",
                 "verify_source")  # fmt: skip


def add(commands: Any) -> None:
    text = "write a smaller copy of a mixture of experts, without some of its experts"
    command = add_command(commands, "shrink", text, run)
    add = command.add_argument
    add("source", metavar="ckpt_dir", help="folder of a safetensors checkpoint, or a GGUF (of a split one, the first "
        "file)")  # fmt: skip
    add("target", metavar="out_dir", help="new folder, or that of an interrupted run; of a GGUF, a new file")
    add_numbers(command)
    add("--score", choices=dict.fromkeys((*CHECKPOINT_SCORES, *EXPERT_SCORES)), help="how experts are scored. Of what "
        "they put out: reap (mean of gate times norm), weighted (its sum), squares (sum of its squares), ean (sum of "
        "norms), man, msan (means of norms, of their squares), frequency (tokens). Of weights alone, without data: "
        "aimer. Or random (default: reap, of a GGUF ean, which is estimated from --from)")  # fmt: skip
    add("--from", dest="scores_from", metavar="FILE", help="scores that --record wrote, or the importance matrix of "
        "this very model (.gguf), instead of a forward pass; of a GGUF, the latter")  # fmt: skip
    add("--record", metavar="FILE", help="write what was measured of all experts, to shrink again in seconds (.json)")
    add("--plan", metavar="FILE", help='JSON of the experts to keep, {"layer": [ids]}, instead of a score')
    add("--write-plan", metavar="FILE", help="write the choice as such a plan, too")
    add("--mtp", choices=("keep", "drop"), default="keep", help="layers that predict further tokens: keep them, with "
        "as many experts, or drop them (default: keep)")  # fmt: skip
    add("--statistics", choices=("dense", "block"), default="dense", help="what layers are measured on: the whole "
        "model (dense), or what the smaller blocks before them put out (block) (default: dense)")  # fmt: skip
    add("--refit", action="store_true", help="fit the kept experts' down projections to what the whole layer put out; "
        "then these weights are not the source's")  # fmt: skip
    add("--protect", choices=("none", "super"), default="none", help="super: keep experts that put out outlying "
        "values, whatever their score is; all layers are measured before the first is cut (default: none)")  # fmt: skip
    add("--imatrix", metavar="FILE", help="write the importance matrix of the smaller model too, for llama.cpp (.gguf, "
        ".dat); it is computed once more for that")  # fmt: skip
    add("--pattern", metavar="PATTERN", help="prune what is left by Wanda in the same walk: N:M, or a share; needs "
        "--statistics block (default: no zeros)")  # fmt: skip
    add_calibration(command, seeds="seed of the calibration sample, and of --score random")
    add("--verify-source", action="store_true", help="know the source again by all of its bytes when the job goes on")
    add_machine(command)
    add("--imatrix-out", metavar="FILE", help="of a GGUF, write the importance matrix of --from cut alike, to quantize "
        "again (.gguf)")  # fmt: skip
    add("--split-size", type=byte_count, metavar="SIZE", help="of a GGUF, write several files of at most this size, "
        "such as 20GB (default: one file)")  # fmt: skip
    command.set_defaults(default_of=command.get_default)


def add_numbers(command: argparse.ArgumentParser) -> None:
    """Adds the flags that say how many experts are removed."""
    number = command.add_mutually_exclusive_group()
    number.add_argument("--drop-experts", metavar="SHARE", help="experts to remove from each layer: a share (25%%, "
        "0.25), rounded down to whole experts, or a number")  # fmt: skip
    number.add_argument("--keep-experts", type=positive, metavar="N", help="experts to keep in each layer instead")


def run(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import is_gguf

    if is_gguf(arguments.source):
        _require_defaults(arguments, (*OF_CHECKPOINT, *MACHINE), "a GGUF")
        return _run_gguf(arguments)
    _require_defaults(arguments, OF_GGUF, "a checkpoint")
    return _run_checkpoint(arguments)


def _require_defaults(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    """Raises PatternError for a flag that `what` is given has no use for."""
    for name in names:
        if getattr(arguments, name) != arguments.default_of(name):
            raise PatternError(
                f"--{name.replace('_', '-')} has no use here: {arguments.source} is {what}; leave it out"
            )


def _run_checkpoint(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import shrink
    from lowmem_wanda.cli.page import PAGE
    from lowmem_wanda.cli.shrink_page import save_page

    page = Path(arguments.target) / PAGE
    settings = {**taken(arguments, *BOTH, *OF_CHECKPOINT), **machine(arguments)}
    with Bar("shrinking") as bar:

        def begin(facts: Mapping[str, Any]) -> None:
            bar.line(about_checkpoint(facts))
            bar.begin(facts["blocks"])

        report = shrink(
            arguments.source,
            arguments.target,
            **settings,
            on_start=begin,
            on_block=lambda record: bar.show(record, block_line(record, bar.total)),
            on_report=lambda report: save_page(page, report),
        )
    return shown(arguments, report, table(report), *closing(report, page))


def _run_gguf(arguments: argparse.Namespace) -> int:
    from lowmem_wanda import shrink_gguf
    from lowmem_wanda.cli.shrink_page import save_page

    if arguments.score not in (None, *EXPERT_SCORES):
        raise PatternError(
            f"--score {arguments.score} is of what experts put out, which a GGUF is not computed for; give one of "
            f"{', '.join(EXPERT_SCORES)}"
        )
    settings = taken(arguments, *BOTH, *OF_GGUF)
    if settings["seed"] == arguments.default_of("seed"):
        settings["seed"] = None
    with Bar("writing MB") as bar:
        report = shrink_gguf(
            arguments.source,
            arguments.target,
            **settings,
            on_start=lambda facts: bar.line(about(facts)),
            on_progress=_Progress(bar),
        )
    page = Path(f"{arguments.target}.report.html")
    save_page(page, report)
    return shown(arguments, report, *lines(report), table(report), *closing(report, page))


class _Progress:
    """Moves a bar by megabytes that were written."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.at = bar, -1

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self.at < 0:
            self.bar.begin(-(-record["total"] // MEGA))
        if (done := record["done"] // MEGA) != self.at:
            self.at = done
            self.bar.show({"index": done - 1})


def show_plan(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """What `plan` shows of a removal of experts."""
    from lowmem_wanda import plan_shrink

    wanted = ("drop_experts", "keep_experts", "refit", "text", "sequences", "length", "seed")
    order = "dense" if arguments.statistics == arguments.default_of("statistics") else arguments.statistics
    plan = plan_shrink(arguments.source, statistics=order, **taken(arguments, *wanted), **settings)
    return shown(arguments, asdict(plan), plan_table(arguments.source, plan))
