"""The command line's flags; the choices stand here so that --help imports nothing."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_wanda import __version__

if TYPE_CHECKING:
    from lowmem_wanda.pruning.job import Task

METHODS, STATISTICS = ("wanda", "magnitude"), ("block", "dense", "sequential")
TASKS = "boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"


def parser() -> argparse.ArgumentParser:
    """All commands; `command` says which it is."""
    top = argparse.ArgumentParser(
        prog="lowmem-wanda",
        description="Prune Hugging Face language models with Wanda, one decoder block in memory at a time.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("--debug", action="store_true", help="show a traceback with an error")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=text)

    prune = command("prune", "write a pruned copy of a checkpoint")
    add_source(prune)
    prune.add_argument("target", metavar="out_dir", help="new folder, or that of an interrupted run to continue")
    plan = command("plan", "say what pruning would need; reads no weights")
    add_source(plan)
    for pruning in (prune, plan):
        add_pruning(pruning)
        add_machine(pruning)
    imatrix = command("imatrix", "write a checkpoint's importance matrix, for llama.cpp's quantization")
    add_imatrix(imatrix)
    check = command("check", "report the sparsity of a checkpoint and prove it")
    check.add_argument("path", metavar="dir", help="folder of any safetensors checkpoint")
    check.add_argument("--against", metavar="ckpt_dir", help="prove that dir is this source but for zeros")
    survive = command("survive", "say what quantization for llama.cpp leaves of a pruned checkpoint")
    add_survival(survive)
    evaluate = command("eval", "measure perplexity, distance to the dense model, zero-shot accuracy")
    add_evaluation(evaluate)
    compare = command("compare", "prune by several methods and patterns, and evaluate each")
    add_comparison(compare)
    for evaluating in (evaluate, compare):
        add_windows(evaluating)
        add_machine(evaluating)
        evaluating.add_argument("--plot", action="store_true", help="draw each block's error in the terminal")
    return top


def add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="ckpt_dir", help="folder of a Hugging Face safetensors checkpoint")


def add_imatrix(command: argparse.ArgumentParser) -> None:
    add_source(command)
    command.add_argument("target", metavar="out_file", help="new file: .gguf, or .dat for the older format")
    add_calibration(command)
    add_machine(command)


def add_survival(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("path", metavar="out_dir", help="folder of a pruned checkpoint")
    add("model", nargs="?", metavar="model.gguf", help="a GGUF that was made of it; without one, a prediction")
    add("--imatrix", metavar="FILE", help="weighs the errors of kept weights (.gguf, .dat)")


def add_pruning(command: argparse.ArgumentParser) -> None:
    """What is pruned, and on what."""
    add = command.add_argument
    add("--pattern", default="2:4", help="N:M, N kept of each M inputs (2:4, 4:8), or a sparsity (0.5, 60%%); 2:4")
    add("--method", default="wanda", choices=METHODS, help="how weights are scored; wanda")
    add("--group", choices=("row", "matrix"), help="what is compared for a sparsity; row for wanda, else matrix")
    add("--norms", metavar="FILE", help="an importance matrix of the dense model (.gguf, .dat): its norms, and no "
        "calibration, no forward pass")  # fmt: skip
    add("--imatrix", metavar="FILE", help="write the pruned model's importance matrix too, for llama.cpp (.gguf, .dat)")
    add("--zeros", default="exact", choices=("exact", "signed-tiny"), help="what pruned weights become: +0.0, or the "
        "smallest number of a random sign, for IQ2 types of llama.cpp alone; exact")  # fmt: skip
    add_calibration(command)
    add("--statistics", default="block", choices=STATISTICS,
        help="what linears are measured on: the dense block, pruned inputs (block, as the paper's code); dense inputs "
        "(dense); the linears before them pruned, too (sequential, the fewest computations); block")  # fmt: skip
    add_selection(command)


def add_calibration(command: argparse.ArgumentParser) -> None:
    """What is measured on."""
    add = command.add_argument
    add("--text", nargs="+", default=(), metavar="FILE", help="calibration: plain text, .jsonl, token ids in .npy or "
        ".safetensors, or c4 or wikitext2 (downloaded); a built-in text")  # fmt: skip
    add("--sequences", type=positive, default=128, metavar="N", help="calibration sequences; 128")
    add("--length", type=positive, default=2048, metavar="N", help="tokens of each, capped by the model; 2048")
    add("--seed", type=int, default=0, help="of the calibration sample; 0")


def add_selection(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--include", nargs="+", default=(), metavar="GLOB", help="prune only tensors with such names")
    add("--exclude", nargs="+", default=(), metavar="GLOB", help="leave tensors with such names dense")


def add_machine(command: argparse.ArgumentParser) -> None:
    """Where and within what it is computed."""
    add = command.add_argument
    add("--batch", type=positive, metavar="N", help="sequences computed at a time; as many as make "
        "256 tokens, on a GPU 2048, or fewer where memory is short")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; auto")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="to compute in, not to store; auto: float32 on a CPU, else as stored")  # fmt: skip
    add("--max-ram", type=byte_size, metavar="SIZE", help="host memory that this may take in all, as 8GB; what is free")
    add("--max-vram", type=byte_size, metavar="SIZE", help="GPU memory that tensors may take, as 8GB; what is free")
    add("--slots", type=int, choices=(1, 2, 3), help="blocks in host memory: 3 to read, compute and write at the same "
        "time, 1 to do it in turn; 3 where they fit")  # fmt: skip
    add("--read", default="pread", choices=("pread", "mmap"), help="how shards are read; pread")
    add("--trust-remote-code", action="store_true", help="run, and copy, Python code that the checkpoint brings")


def add_windows(command: argparse.ArgumentParser) -> None:
    """What is evaluated on."""
    add = command.add_argument
    add("--text", nargs="+", default=(), metavar="FILE", help="plain text, .jsonl, token ids in .npy or .safetensors, "
        "or wikitext2 or c4 (downloaded: the test and validation sets)")  # fmt: skip
    add("--length", type=positive, default=2048, metavar="N", help="tokens of a window, capped by the model; 2048")
    add("--windows", type=positive, metavar="N", help="the first N windows; all")


def add_evaluation(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("sources", nargs="+", metavar="dir", help="folder of a Hugging Face safetensors checkpoint, pruned or not")
    add("--against", metavar="ckpt_dir", help="the dense model: adds KL divergence, agreement, each block's error")
    add("--stride", type=positive, metavar="N", help="overlapping windows, each N tokens on: scores tokens once, with "
        "more before them")  # fmt: skip
    add("--convention", default="windows", choices=("windows", "llama.cpp"), help="windows, all tokens scored (the "
        "paper's code); llama.cpp: the second half of each, as its perplexity tool; windows")  # fmt: skip
    add("--tasks", type=names, default=(), metavar="NAME,...", help=f"zero-shot tasks of lm-evaluation-harness "
        f"(downloaded unless local); the paper's are {TASKS}")  # fmt: skip
    add("--include-path", metavar="DIR", help="where the harness finds local task files")
    add("--limit", type=positive, metavar="N", help="documents of each task; all")
    add("--report", metavar="DIR", help="where report.json and report.html go; NAME-eval, of the last dir")


def add_comparison(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add_source(command)
    add("target", metavar="out_dir", help="new folder for report.json and report.html, or one to continue")
    add("--methods", type=names, default=METHODS, metavar="NAME,...", help="wanda,magnitude")
    add("--patterns", type=names, default=("50%", "4:8", "2:4"), metavar="PATTERN,...", help="50%%,4:8,2:4")
    add("--groups", type=names, default=(None,), metavar="GROUP,...", help="of row,matrix; each method's own")
    add("--statistics", type=names, default=("block",), metavar="ORDER,...", help="of block,dense,sequential; block")
    add("--calibration", nargs="+", default=(), metavar="FILE", help="as --text of prune; a built-in text")
    add("--sequences", type=numbers, default=(128,), metavar="N,...", help="calibration sequences, as 1,8,64; 128")
    add("--seeds", type=numbers, default=(0,), metavar="N,...", help="of the calibration samples, as 0,1,2; 0")
    add_selection(command)
    add("--keep", action="store_true", help="keep the pruned checkpoints, in folders of out_dir")


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


def names(text: str) -> tuple[str, ...]:
    """The words of "a,b,c", for argparse."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return words


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,2", for argparse."""
    try:
        return tuple(dict.fromkeys(int(word) for word in names(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,8,64") from None


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags as they were given, for a report."""
    shown = {key: value for key, value in vars(arguments).items() if key not in ("command", "debug", "json")}
    places = ("source", "sources", "target")
    return {key if key in places else f"--{key.replace('_', '-')}": value for key, value in shown.items()}


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_machine`, as `open_work` takes them."""
    from lowmem_wanda.streaming.model import Limits

    limits = Limits(arguments.max_ram, arguments.max_vram, arguments.slots, arguments.read)
    names = ("device", "dtype", "batch", "trust_remote_code")
    return {"limits": limits, **{name: getattr(arguments, name) for name in names}}


def prepared(arguments: argparse.Namespace) -> "Task":
    """The task of the flags of `add_pruning` and `add_machine`."""
    from lowmem_wanda.llamacpp.imatrix import check_target
    from lowmem_wanda.pruning.job import prepare

    if arguments.imatrix:
        target = getattr(arguments, "target", None)
        check_target(arguments.imatrix, "--imatrix", Path(arguments.source), target and Path(target))
    names = ("method", "pattern", "group", "text", "sequences", "length", "seed", "statistics", "include", "exclude",
             "norms", "imatrix", "zeros")  # fmt: skip
    settings = {name: getattr(arguments, name) for name in names}
    return prepare(arguments.source, **settings, **machine(arguments))
