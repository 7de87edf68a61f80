"""The command line: arguments in, results on stdout, progress and errors on stderr, an exit code."""

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lowmem_wanda import __version__
from lowmem_wanda.errors import LowmemError

if TYPE_CHECKING:
    from lowmem_wanda.task import Task

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0, 1 (an error, in one sentence), 2 (usage) or 130 (Ctrl-C)."""
    arguments = parser().parse_args(argv)
    if not {"c4", "wikitext2"} & set(getattr(arguments, "text", ())):
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched unless it was asked for
    try:
        return int(arguments.run(arguments))
    except LowmemError as error:
        if arguments.debug:
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, MemoryError, RuntimeError) as error:
        # what the system says, and torch's OutOfMemoryError; any other RuntimeError is a bug of ours
        if arguments.debug or type(error) is RuntimeError:
            raise
        print(f"error: {printable(' '.join(str(error).split()) or 'memory is full')}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        how = "; run the same command again to continue" if arguments.command == "prune" else ""
        print(f"\nstopped{how}", file=sys.stderr)
        return INTERRUPTED


def printable(text: str) -> str:
    """One line without control characters: names in a file may hold anything."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lowmem-wanda",
        description="Prune Hugging Face language models with Wanda, one decoder block in memory at a time.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("--debug", action="store_true", help="show a traceback with an error")

    prune = commands.add_parser("prune", parents=[common], help="write a pruned copy of a checkpoint")
    prune.add_argument("source", metavar="ckpt_dir", help="folder of a Hugging Face safetensors checkpoint")
    prune.add_argument("target", metavar="out_dir", help="new folder, or that of an interrupted run to continue")
    add_task_flags(prune)
    prune.set_defaults(run=run_prune)

    plan = commands.add_parser("plan", parents=[common], help="say what pruning would need; reads no weights")
    plan.add_argument("source", metavar="ckpt_dir", help="folder of a Hugging Face safetensors checkpoint")
    add_task_flags(plan)
    plan.set_defaults(run=run_plan)

    check = commands.add_parser("check", parents=[common], help="report the sparsity of a checkpoint and prove it")
    check.add_argument("path", metavar="dir", help="folder of any safetensors checkpoint")
    check.add_argument("--against", metavar="ckpt_dir", help="prove that dir is this source but for zeros")
    check.set_defaults(run=run_check)
    return top


def add_task_flags(command: argparse.ArgumentParser) -> None:
    """What `prune` and `plan` take alike; the choices stand here so that --help imports nothing."""
    add = command.add_argument
    add("--pattern", default="2:4", help="N:M, N kept of each M inputs (2:4, 4:8), or a sparsity (0.5, 60%%); 2:4")
    add("--method", default="wanda", choices=("wanda", "magnitude"), help="how weights are scored; wanda")
    add("--group", choices=("row", "matrix"), help="what is compared for a sparsity; row for wanda, else matrix")
    add("--text", nargs="+", default=(), metavar="FILE", help="calibration: plain text, .jsonl, token ids in .npy or "
        ".safetensors, or c4 or wikitext2 (downloaded); a built-in text")  # fmt: skip
    add("--sequences", type=positive, default=128, metavar="N", help="calibration sequences; 128")
    add("--length", type=positive, default=2048, metavar="N", help="tokens of each, capped by the model; 2048")
    add("--seed", type=int, default=0, help="of the calibration sample; 0")
    add("--batch", type=positive, metavar="N", help="sequences computed at a time; as many as make "
        "256 tokens, on a GPU 2048, or fewer where memory is short")  # fmt: skip
    add("--statistics", default="block", choices=("block", "dense", "sequential"),
        help="what linears are measured on: the dense block, pruned inputs (block, as the paper's code); dense inputs "
        "(dense); the linears before them pruned, too (sequential, the fewest computations); block")  # fmt: skip
    add("--include", nargs="+", default=(), metavar="GLOB", help="prune only tensors with such names")
    add("--exclude", nargs="+", default=(), metavar="GLOB", help="leave tensors with such names dense")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; auto")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="to compute in, not to store; auto: float32 on a CPU, else as stored")  # fmt: skip
    add("--max-ram", type=byte_size, metavar="SIZE", help="host memory that this may take in all, as 8GB; what is free")
    add("--max-vram", type=byte_size, metavar="SIZE", help="GPU memory that tensors may take, as 8GB; what is free")
    add("--slots", type=int, choices=(1, 2, 3), help="blocks in host memory: 3 to read, compute and write at the same "
        "time, 1 to do it in turn; 3 where they fit")  # fmt: skip
    add("--read", default="pread", choices=("pread", "mmap"), help="how shards are read; pread")
    add("--trust-remote-code", action="store_true", help="run, and copy, Python code that the checkpoint brings")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def byte_size(text: str) -> int:
    """Bytes of "8GB", "500MB", "7.5GiB"; a bare number is GB. For argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?)b?|b)?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 8GB or 500MB")
    number, prefix, binary = match[1], match[2], match[3]
    if text.lower().endswith("b") and not prefix:
        return int(float(number))
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(prefix or "g") + 1))


def run_prune(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from lowmem_wanda.job import refuse
    from lowmem_wanda.memory import map_blocks_from
    from lowmem_wanda.prune import prune
    from lowmem_wanda.screen import block_line, closing

    map_blocks_from(1 << 20)
    refuse(arguments.target, arguments.source)
    stderr = Console(stderr=True)
    task = prepared(arguments)
    stderr.print(about(task), highlight=False, markup=False)
    depth = task.depth
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=stderr, transient=True) as progress:
        bar = progress.add_task("pruning", total=depth)

        def show(record: dict[str, Any]) -> None:
            progress.console.print(block_line(record, depth), highlight=False, markup=False)
            progress.update(bar, completed=record["index"] + 1)

        report = prune(task, arguments.target, show)
    if arguments.json:
        print(json.dumps(report))
    else:
        Console().print(closing(report, arguments.target))
    return DONE


def run_plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lowmem_wanda.plan import predict
    from lowmem_wanda.screen import plan_table

    task = prepared(arguments)
    plan = predict(task)
    if arguments.json:
        print(json.dumps(asdict(plan)))
    else:
        Console().print(plan_table(plan, task.method, str(task.pattern), arguments.source))
    return DONE


def run_check(arguments: argparse.Namespace) -> int:
    from lowmem_wanda.check import check
    from lowmem_wanda.screen import check_lines

    findings = check(arguments.path, arguments.against)
    if arguments.json:
        print(json.dumps(asdict(findings)))
    else:
        print("\n".join(printable(line) for line in check_lines(findings)))
    for problem in findings.problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return FAILED if findings.problems else DONE


def prepared(arguments: argparse.Namespace) -> "Task":
    """The task of the flags that `add_task_flags` made."""
    from lowmem_wanda.task import prepare
    from lowmem_wanda.work import Limits

    names = ("method", "pattern", "group", "text", "sequences", "length", "seed", "device", "dtype", "batch",
             "statistics", "include", "exclude", "trust_remote_code")  # fmt: skip
    limits = Limits(arguments.max_ram, arguments.max_vram, arguments.slots, arguments.read)
    return prepare(arguments.source, limits=limits, **{name: getattr(arguments, name) for name in names})


def about(task: "Task") -> str:
    """The line before the work: what is pruned how, on what, with which text."""
    line = f"{task.checkpoint.path}: {task.depth} blocks, {task.method} {task.pattern}, on {task.device}"
    if calibration := task.calibration:
        sequences, length = calibration.tokens.shape
        line += f"\ncalibration: {sequences} sequences of {length} tokens from {', '.join(calibration.sources)}"
    if untouched := task.hollow.untouched:
        line += f"\nnot pruned, as the model does not use them: {len(untouched)} tensors, {untouched[0]} and so on"
    return line
