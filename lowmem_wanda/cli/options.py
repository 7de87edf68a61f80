"""Flags that commands share. Their choices come from the library's face, so --help imports nothing heavy."""

import argparse
import re
from typing import Any

from lowmem_wanda import DTYPES, READS, byte_size
from lowmem_wanda.errors import BudgetError

MACHINE = ("batch", "device", "dtype", "max_ram", "max_vram", "slots", "read", "trust_remote_code",
           "dequantize")  # fmt: skip


def add_command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """The parser of a command that `run` runs, with the flags that all commands have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.set_defaults(run=run)
    return parser


def add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="ckpt_dir",
        help="folder of a Hugging Face safetensors checkpoint, or org/name of one in the local Hugging Face cache",
    )
    command.add_argument("--download", action="store_true", help="get org/name from the Hugging Face Hub first")


def add_calibration(command: argparse.ArgumentParser, seeds: str = "seed of the calibration sample") -> None:
    """Adds the flags that say what matrices are measured on."""
    add = command.add_argument
    add("--text", nargs="+", default=(), metavar="FILE", help="calibration: plain text, .jsonl, token ids in .npy or "
        ".safetensors, or c4 or wikitext2, which are downloaded; with shares as in code.jsonl:3 chats.jsonl:1 "
        "(default: a built-in text)")  # fmt: skip
    add("--sequences", type=positive, default=128, metavar="N", help="number of calibration sequences (default: 128)")
    add("--length", type=positive, default=2048, metavar="N",
        help="tokens of each sequence, capped by the model (default: 2048)")  # fmt: skip
    add("--seed", type=whole, default=0, metavar="N", help=f"{seeds} (default: 0)")


def add_selection(command: argparse.ArgumentParser) -> None:
    """Adds the flags that say which tensors are pruned."""
    add = command.add_argument
    add("--include", nargs="+", default=(), metavar="GLOB", help="prune only tensors whose names match (default: all)")
    add("--exclude", nargs="+", default=(), metavar="GLOB",
        help="leave tensors dense whose names match (default: none)")  # fmt: skip


def add_windows(command: argparse.ArgumentParser) -> None:
    """Adds the flags that say what models are evaluated on."""
    add = command.add_argument
    add("--text", nargs="+", default=(), metavar="FILE", help="plain text, .jsonl, token ids in .npy or .safetensors, "
        "or wikitext2 or c4, whose test and validation sets are downloaded")  # fmt: skip
    add("--length", type=positive, default=2048, metavar="N",
        help="tokens of a window, capped by the model (default: 2048)")  # fmt: skip
    add("--windows", type=positive, metavar="N", help="evaluate the first N windows (default: all)")


def add_machine(command: argparse.ArgumentParser) -> None:
    """Adds the flags that say where models are computed, and in how much memory."""
    add = command.add_argument
    add("--batch", type=positive, metavar="N", help="sequences computed at a time (default: as many as make 512 "
        "tokens, on a GPU 2048, or fewer if memory is short)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=DTYPES, help="dtype to compute in, not to store; auto is float32 on a CPU, "
        "else as stored (default: auto)")  # fmt: skip
    add("--max-ram", type=size, metavar="SIZE",
        help="host memory that the process may take in all, such as 8GB (default: what is free)")  # fmt: skip
    add("--max-vram", type=size, metavar="SIZE",
        help="GPU memory that tensors may take, such as 8GB (default: what is free)")  # fmt: skip
    add("--slots", type=int, choices=(1, 2, 3), help="blocks in host memory: 3 to read, compute and write at the same "
        "time, 1 to do so one after the other (default: 3 where they fit)")  # fmt: skip
    add("--read", default="auto", choices=READS, help="how shards are read; auto maps them on local disks and reads "
        "them elsewhere (default: auto)")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run, and copy, Python code that the checkpoint brings")
    add("--dequantize", action="store_true",
        help="read fp8 with block scales, and MXFP4, as bfloat16, which is what is written then")  # fmt: skip


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_machine` as the library's functions take them."""
    return {name: getattr(arguments, name) for name in MACHINE}


def taken(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The flags of these names, as keywords."""
    return {name: getattr(arguments, name) for name in names}


GIVEN = "given"  # where it is stored which flags were


class Given(argparse.Action):
    """Stores a flag's value, and that it was given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Stores it."""
        setattr(namespace, self.dest, values)
        setattr(namespace, GIVEN, {*getattr(namespace, GIVEN, ()), self.dest})


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number above 0, of at most 18 digits")
    return int(text)


def whole(text: str) -> int:
    """A whole number, for argparse."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at most 18 digits")
    return int(text)


def rate(text: str) -> int:
    """The amount in a second of a rate such as "3GB/s", "80T" or "80 TFLOPS", for argparse; it has a prefix."""
    amount = re.sub(r"(flops?)?(/s)?$", "", text.strip(), flags=re.I).strip()
    if not re.fullmatch(r"[0-9.]+ ?[kmgtp]i?b?", amount, flags=re.I) or not (found := size(amount)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a rate above 0 such as 80T or 3GB/s")
    return found


def size(text: str) -> int:
    """The bytes of a size such as "8GB", for argparse."""
    try:
        return byte_size(text)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def names(text: str) -> tuple[str, ...]:
    """The words of "a,b,c", for argparse."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} names nothing")
    return words


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of "0,1,2", for argparse."""
    try:
        return tuple(dict.fromkeys(whole(word) for word in names(text)))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of whole numbers such as 1,8,64") from None
