"""The command line: arguments in, results on stdout, progress and errors on stderr, an exit code."""

import argparse
import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn

from lowmem_wanda import __version__
from lowmem_wanda.cli.load import settle
from lowmem_wanda.cli.terminal import bounded, printable
from lowmem_wanda.errors import LowmemError, limit_of_machine

COMMANDS = (  # modules of this room, each with an `add`
    "prune",
    "recover",
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


def run() -> NoReturn:
    """Runs the command of this process and ends it.

    Python's own end takes half a second or more where torch and transformers are imported, to take them apart. So the
    functions that were registered for the end are called, and the process is gone.
    """
    code = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a reader that has gone, or a stream that was closed
            stream.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0, 1 (an error, in one sentence), 2 (usage), 130 or 143 (ended)."""
    argv = sys.argv[1:] if argv is None else argv
    top = parser()
    if not argv:
        top.print_help(sys.stderr)
        raise SystemExit(USAGE)
    arguments = top.parse_args(argv)
    if not _downloads(arguments):
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded unless it was asked for
    _leave_fewer_holes()
    settle(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any byte
    try:
        with _interrupting():
            if getattr(arguments, "download", False):
                from lowmem_wanda import download

                arguments.source = str(download(arguments.source))
            return int(arguments.run(arguments))
    except LowmemError as error:
        if arguments.debug:
            raise
        print(f"error: {printable(bounded(str(error)))}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, MemoryError, RuntimeError) as error:
        # errors of the system, and torch's OutOfMemoryError; any other RuntimeError is a bug of ours
        told = limit_of_machine(error)
        if arguments.debug or (not told and type(error) in (RuntimeError, RecursionError)):
            raise
        print(f"error: {printable(bounded(told or ' '.join(str(error).split())))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        how = "; run the same command again to continue" if arguments.command in ("prune", "compare") else ""
        print(f"\nstopped{how}", file=sys.stderr)
        return 128 + stop.args[0] if stop.args else INTERRUPTED


def _leave_fewer_holes() -> None:
    """Has torch's allocator on a GPU grow its segments, unless the user has set it up. CUDA must not have started.

    A 70B block pruned in 24 GB ran out of memory while 3.5 GiB lay in holes between tensors (torch 2.11, H100).
    """
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _downloads(arguments: argparse.Namespace) -> bool:
    """Whether the flags ask for something of the network: a data set, tasks, or a model."""
    texts = {*getattr(arguments, "text", ()), *getattr(arguments, "calibration", ())}
    flags = (getattr(arguments, "tasks", ()), getattr(arguments, "download", False))
    return bool({"c4", "wikitext2"} & texts) or any(map(bool, flags))


@contextmanager
def _interrupting() -> Iterator[None]:
    """Has signals that end this process (of `kill`, or a terminal that closes) stop it as Ctrl-C does."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    usable = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if usable and hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
