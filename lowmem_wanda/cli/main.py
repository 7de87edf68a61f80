"""The command line: arguments in, results on stdout, progress and errors on stderr, an exit code."""

import argparse
import os
import sys
from importlib import import_module

from lowmem_wanda import __version__
from lowmem_wanda.cli.terminal import printable
from lowmem_wanda.errors import LowmemError

COMMANDS = (  # modules of this room, each with an `add`
    "prune",
    "shrink",
    "imatrix",
    "check",
    "survive",
    "evaluate",
    "compare",
)
FAILED, USAGE, INTERRUPTED = 1, 2, 130
EXAMPLE = """example:
  %(prog)s prune llama-3-8b llama-3-8b-2of4 --pattern 2:4
  %(prog)s check llama-3-8b-2of4 --against llama-3-8b
  %(prog)s shrink qwen3-30b-a3b.gguf small.gguf --drop-experts 25%% --from imatrix.gguf

%(prog)s COMMAND --help says what a command takes."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0, 1 (an error, in one sentence), 2 (usage) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    top = parser()
    if not argv:
        top.print_help(sys.stderr)
        raise SystemExit(USAGE)
    arguments = top.parse_args(argv)
    texts = {*getattr(arguments, "text", ()), *getattr(arguments, "calibration", ())}
    if not {"c4", "wikitext2"} & texts and not getattr(arguments, "tasks", ()):
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded unless it was asked for
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
        # errors of the system, and torch's OutOfMemoryError; any other RuntimeError is a bug of ours
        if arguments.debug or type(error) in (RuntimeError, RecursionError):
            raise
        print(f"error: {printable(' '.join(str(error).split()) or 'memory is full')}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        how = "; run the same command again to continue" if arguments.command in ("prune", "compare") else ""
        print(f"\nstopped{how}", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. Of its results, `command` is the command's name and `run` runs it."""
    top = argparse.ArgumentParser(
        prog="lowmem-wanda",
        description="Prune Hugging Face language models with Wanda, one decoder block in memory at a time.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"lowmem_wanda.cli.{name}").add(commands)
    return top
