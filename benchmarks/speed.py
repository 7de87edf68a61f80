"""Time, memory, reads and writes of `prune` beside others: `python benchmarks/speed.py --peer OTHER/bin/python`.

Every program prunes one random Llama checkpoint 2:4 with Wanda, on the same tokens and threads, in a process, a working
directory and a TMPDIR of its own, one after the other in rounds. Beside ours these are the paper's way with the whole
model in memory (peers/whole_model.py) and llm-compressor (peers/llm_compressor.py, run by the interpreter of another
environment, because it does not go with our transformers). "read" and "written" are `disk_read` and `disk_written` (see
Usage). The source is dropped from the page cache before each run, so it counts once. What a program reads again is
cached by then, unless memory is short, and does not count. Ours waits until its files are on the disk (fsync), the
others do not. Writes results/speed.json and prints a Markdown table.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import ROOT, Usage, commit, drop_cache, follow, llama, machine, random_tokens, size_of

from lowmem_wanda.checkpoint.directory import Checkpoint

BASE = "block"
UPDATING = ("SparseGPT", "ALPS")  # programs whose kept weights are not the source's
PEERS = ROOT / "benchmarks/peers"
VERSIONS = """
import json, platform
from importlib.metadata import distributions
wanted = ("torch", "transformers", "safetensors", "llmcompressor", "compressed-tensors")
found = {entry.metadata["Name"]: entry.version for entry in distributions()}
print(json.dumps({"python": platform.python_version()} | {name: found[name] for name in wanted if name in found}))
"""
IMPORTS = {
    "ours": "import transformers.models.llama.modeling_llama, lowmem_wanda.pruning.prune",
    "llm-compressor": "import datasets, llmcompressor.modifiers.pruning, transformers.models.llama.modeling_llama",
}

# the same program in two arithmetics, then two programs in the same arithmetic
COMPARED = (
    ("block-bf16", BASE),
    ("llmc-memory-bf16", "llmc-memory-f32"),
    ("llmc-memory-f32", BASE),
    ("llmc-disk-f32", BASE),
    ("llmc-memory-bf16", "block-bf16"),
    ("llmc-disk-bf16", "block-bf16"),
    ("llmc-disk-bf16", "sequential-bf16"),
    ("llmc-sparsegpt-disk-f32", "sparsegpt"),
    ("llmc-sparsegpt-disk-f32", "sequential-sparsegpt"),
)

Command = Callable[[Path, Path, Path], list[str | Path]]  # source, tokens, target -> the command line


@dataclass(frozen=True)
class Program:
    """A row of the table: its name for --only, its title, and how it is run."""

    name: str
    title: str
    command: Command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has llm-compressor 0.14")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"run these beside {BASE}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/speed.json")
    arguments = parser.parse_args()
    if arguments.peer:  # no resolve(): it would leave the virtual environment
        arguments.peer = os.path.abspath(shutil.which(arguments.peer) or arguments.peer)
    chosen = programs(arguments)
    load = os.getloadavg()[0]  # of other programs, which share caches and cores and so raise our CPU seconds, too
    pythons = {"ours": sys.executable} | ({"llm-compressor": arguments.peer} if arguments.peer else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = size_of(llama(folder / "source", arguments.width, arguments.blocks))
        random_tokens(folder / "source.npy", arguments.sequences, arguments.length)
        llama(folder / "tiny", 128, 2)
        random_tokens(folder / "tiny.npy", 2, 32)
        imports = {who: imported(folder, who, python, size, arguments.threads) for who, python in pythons.items()}
        rows = measured(folder, chosen, arguments.rounds, arguments.threads)
    result = {
        "machine": machine(), "commit": commit(), "command": command_line(), "threads": arguments.threads,
        "load_before": round(load, 2),
        "versions": {who: versions(python) for who, python in pythons.items()},
        "checkpoint_mb": round(size / 1e6), "imports": imports, "rows": rows,
    }  # fmt: skip
    print(table(result))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def programs(arguments: argparse.Namespace) -> list[Program]:
    """The programs that can be run and were not left out, ours first."""

    def ours(*flags: str) -> Command:
        given = ["--json", "--sequences", str(arguments.sequences), *flags]
        return lambda source, tokens, target: [
            sys.executable, ROOT / "cli.py", "prune", source, target, "--text", tokens, *given
        ]  # fmt: skip

    def peer(python: str, script: str, *flags: str) -> Command:
        return lambda source, tokens, target: [python, PEERS / script, source, tokens, target, *flags]

    found = [
        Program(BASE, "ours, `block`, float32", ours()),
        Program("sequential", "ours, `sequential`, float32", ours("--statistics", "sequential")),
        Program("block-bf16", "ours, `block`, bfloat16", ours("--dtype", "bfloat16")),
        Program(
            "sequential-bf16",
            "ours, `sequential`, bfloat16",
            ours("--statistics", "sequential", "--dtype", "bfloat16"),
        ),
        Program("sparsegpt", "ours, SparseGPT, float32", ours("--method", "sparsegpt")),
        Program(
            "sequential-sparsegpt",
            "ours, SparseGPT, `sequential`, float32",
            ours("--method", "sparsegpt", "--statistics", "sequential"),
        ),
        Program("alps", "ours, ALPS, float32", ours("--method", "alps")),
        Program("whole-model", "whole model, float32", peer(sys.executable, "whole_model.py")),
    ]
    for place, flags in (("memory", []), ("disk", ["--disk"])) if arguments.peer else ():
        for short, dtype in (("bf16", "bfloat16"), ("f32", "float32")):
            command = peer(arguments.peer, "llm_compressor.py", "--dtype", dtype, *flags)
            found.append(Program(f"llmc-{place}-{short}", f"llm-compressor, {place}, {dtype}", command))
            command = peer(arguments.peer, "llm_compressor.py", "--dtype", dtype, "--sparsegpt", *flags)
            title = f"llm-compressor, SparseGPT, {place}, {dtype}"
            found.append(Program(f"llmc-sparsegpt-{place}-{short}", title, command))
    if unknown := set(arguments.only or ()) - {program.name for program in found}:
        raise SystemExit(f"no such program: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in found)}")
    return [program for program in found if not arguments.only or program.name in (BASE, *arguments.only)]


def imported(folder: Path, who: str, python: str, size: int, threads: int) -> dict[str, float]:
    """The figures of an interpreter that imports what its program needs, for the second time."""
    for _ in range(2):
        usage, _ = run(folder, [python, "-c", IMPORTS[who]], threads)
    return figures(usage, size)


def measured(folder: Path, chosen: list[Program], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each program: medians, what its output and its leftovers are, what each round took.

    Right before each run the program prunes a tiny checkpoint, so that it finds all its code cached.
    """
    size, target, base = size_of(folder / "source"), folder / "out", folder / "base"
    runs: dict[str, list[dict[str, float]]] = {}
    seen: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for program in chosen:
            run(folder, program.command(folder / "tiny", folder / "tiny.npy", target), threads)
            shutil.rmtree(target)
            drop_cache(folder / "source")
            usage, left = run(folder, program.command(folder / "source", folder / "source.npy", target), threads)
            runs.setdefault(program.name, []).append(figures(usage, size))
            if program.name not in seen:
                if program.name == BASE:
                    shutil.copytree(target, base, copy_function=os.link)
                seen[program.name] = {"left": left, **examined(target, folder / "source", base)}
            shutil.rmtree(target)
            print(f"{number + 1}/{rounds} {program.name}: {usage.seconds:.1f} s", file=sys.stderr)
    return [
        {"name": program.name, "title": program.title}
        | {key: round(median(each[key] for each in runs[program.name]), 3) for key in runs[program.name][0]}
        | seen[program.name]
        | {"rounds": runs[program.name]}
        for program in chosen
    ]


def run(folder: Path, command: list[str | Path], threads: int) -> tuple[Usage, list[dict[str, Any]]]:
    """What a command took, and the files that it left in its working, temporary and cache directories."""
    places = {"cwd": folder / "cwd", "TMPDIR": folder / "tmp", "HF_HOME": folder / "hf"}
    for place in places.values():
        place.mkdir()
    environment = os.environ | {key: str(place) for key, place in places.items() if key != "cwd"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    log = folder / "log"
    with log.open("wb") as file:
        try:
            usage = follow(command, cwd=places["cwd"], env=environment, stdout=file, stderr=file)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{error}\n{log.read_text(errors='replace')[-2000:]}")
    left = [found for key, place in places.items() for found in leftovers(key, place)]
    for place in places.values():
        shutil.rmtree(place)
    return usage, left


def leftovers(key: str, place: Path) -> list[dict[str, Any]]:
    """The entries of a directory that hold files: name, number of files, MB. Links count, not their targets."""
    found = []
    for entry in sorted(place.iterdir()):
        files = [file for file in [entry, *entry.rglob("*")] if file.is_symlink() or file.is_file()]
        size = sum(file.lstat().st_size for file in files)
        if files:
            found.append({"name": f"{key}/{entry.name}", "files": len(files), "mb": round(size / 1e6, 2)})
    return found


def figures(usage: Usage, size: int) -> dict[str, float]:
    """The figures of a run, in seconds, MB and multiples of the checkpoint's size."""
    return {
        "seconds": round(usage.seconds, 2),
        "cpu_seconds": round(usage.cpu_seconds, 2),
        "anonymous_mb": round(usage.anonymous / 1e6, 1),
        "mapped_mb": round(usage.mapped / 1e6, 1),
    } | {
        field.name: round(getattr(usage, field.name) / size, 3)
        for field in fields(usage)
        if field.name.endswith(("read", "written"))
    }


def examined(target: Path, source: Path, base: Path) -> dict[str, Any]:
    """Whether the blocks' matrices hold 2:4 and are the source's except for zeros, and how masks differ from base's.

    `same_blocks` are those before the first that differs. Where methods differ in rounding alone, a bit or two differ
    in some block, and more and more from there on, because the next block is measured on that one's outputs.
    """
    found, dense, ours = (Checkpoint(path).tensors for path in (target, source, base))
    two_of_four = faithful = True
    different, total = Counter(), 0
    matrices = [name for name, tensor in dense.items() if ".layers." in name and len(tensor.shape) == 2]
    for name in matrices:
        values, zero = values_of(found[name]), values_of(found[name]) == 0
        two_of_four &= bool((zero.reshape(-1, 4).sum(axis=1) >= 2).all())
        faithful &= bool((zero | (values == values_of(dense[name]))).all())
        different[int(name.split(".")[2])] += int((zero != (values_of(ours[name]) == 0)).sum())
        total += zero.size
    return {
        "dtype": found[matrices[0]].dtype, "two_of_four": two_of_four, "faithful": faithful,
        "mask_bits_differing": different.total() / total,
        "same_blocks": next((block for block in sorted(different) if different[block]), len(different)),
    }  # fmt: skip


def values_of(tensor: Any) -> np.ndarray:
    """A BF16 or F32 tensor's values as float32, flat."""
    stored = b"".join(tensor.pieces())
    if tensor.dtype == "F32":
        return np.frombuffer(stored, "<f4")
    return (np.frombuffer(stored, "<u2").astype("<u4") << 16).view("<f4")


def versions(python: str) -> dict[str, str]:
    return json.loads(subprocess.run([python, "-c", VERSIONS], capture_output=True, check=True).stdout)


def command_line() -> str:
    """The command line, with the last parts of absolute paths only."""
    return " ".join(["benchmarks/speed.py", *(re.sub(r"(^|=)/.*/", r"\1", argument) for argument in sys.argv[1:])])


def table(result: dict[str, Any]) -> str:
    """A table in Markdown: medians, each with its multiple of ours, and what follows from them."""
    rows = {row["name"]: row for row in result["rows"]}
    lines = [
        f"{result['machine']}; {result['threads']} threads; commit {result['commit']}; checkpoint of "
        f"{result['checkpoint_mb']} MB; medians of {len(rows[BASE]['rounds'])} rounds",
        *(f"{who}: {', '.join(map(' '.join, found.items()))}" for who, found in result["versions"].items()),
        "",
        "| | seconds | CPU seconds | anonymous MB | read | written | left behind | other mask bits | same blocks |",
        "|---|---|---|---|---|---|---|---|---|",
        *(table_line(row, rows[BASE]) for row in rows.values()),
        "",
        *(
            f"imports alone, {who}: {found['seconds']} s, {found['cpu_seconds']} CPU s, {found['anonymous_mb']} MB"
            for who, found in result["imports"].items()
        ),
        *(same_arithmetic(rows, *names) for names in COMPARED if rows.keys() >= set(names)),
    ]
    return "\n".join(lines)


def table_line(row: dict[str, Any], base: dict[str, Any]) -> str:
    left = ", ".join(f"{entry['files']} files, {entry['mb']} MB" for entry in row["left"]) or "nothing"
    written = f"{row['disk_written']:.2f}x" + ("" if row["dtype"] == base["dtype"] else f" (as {row['dtype']})")
    right = row["two_of_four"] and (row["faithful"] or any(word in row["title"] for word in UPDATING))
    broken = "" if right else " **wrong weights**"
    cells = [row["title"] + broken]
    for key, digits in (("seconds", 1), ("cpu_seconds", 1), ("anonymous_mb", 0)):
        cells.append(f"{row[key]:.{digits}f} ({row[key] / base[key]:.2f}x)")
    cells += [f"{row['disk_read']:.2f}x", written, left, f"{row['mask_bits_differing']:.3%}", str(row["same_blocks"])]
    return f"| {' | '.join(cells)} |"


def same_arithmetic(rows: dict[str, dict[str, Any]], one: str, other: str) -> str:
    """CPU time of one program in multiples of the other's."""
    ratio = rows[one]["cpu_seconds"] / rows[other]["cpu_seconds"]
    return f"CPU time, {rows[one]['title']} / {rows[other]['title']}: {ratio:.2f}"


if __name__ == "__main__":
    main()
