"""What llama.cpp's quantization makes of pruned models, type by type:

    python benchmarks/quants.py MODEL --bin LLAMA_BIN --convert convert_hf_to_gguf.py --text TEXT --calibration TEXT

Prunes MODEL 50 % and 2:4, with zeros and with --zeros signed-tiny, and quantizes each to every type, all matrices
alike, with its own importance matrix and for some types without. Prints the shares of the pruned weights that are zero
and that are positive afterwards, the error of kept weights, and perplexities by llama-perplexity. MODEL's widths should
be multiples of 256 (`train_stories.py`).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import ROOT, commit, machine

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.pruned import pruned_matrices, read_report
from lowmem_wanda.llamacpp import survive as survival
from lowmem_wanda.llamacpp.gguf_file import read_gguf
from lowmem_wanda.llamacpp.names import gguf_names

KINDS = (
    "F32", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_S",
    "IQ3_S", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S",
)  # fmt: skip
PLAIN = ("Q4_K_S", "Q3_K_S", "IQ3_S")  # also without an importance matrix
CHUNKS = 120  # windows of 512 tokens
PRUNED = {"50%": ["--pattern", "50%"], "2:4": ["--pattern", "2:4"]}
PRUNED |= {f"{name} tiny": [*flags, "--zeros", "signed-tiny"] for name, flags in PRUNED.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--convert", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quants.json")
    arguments = parser.parse_args()
    rows: dict[str, dict] = {}
    tools = version(arguments.bin)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dense", *PRUNED):
            made = Path(folder) / re.sub(r"\W", "-", name)
            path = prepare(made, name, arguments)
            for kind in [*KINDS, *(f"{kind} plain" for kind in PLAIN)]:
                rows.setdefault(kind, {})[name] = one(made, path, kind, name, arguments)
            print(f"{name} done", file=sys.stderr, flush=True)
    result = {"machine": machine(), "commit": commit(), "llama.cpp": tools, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def prepare(made: Path, name: str, arguments: argparse.Namespace) -> Path:
    """Makes a checkpoint, with its importance matrix and its GGUF beside it; gives the checkpoint's folder."""
    text = ["--text", arguments.calibration, "--sequences", "64", "--length", "512"]
    if name == "dense":
        path = arguments.model
        run(sys.executable, ROOT / "cli.py", "imatrix", path, f"{made}.imatrix.gguf", *text)
    else:
        path = made
        run(sys.executable, ROOT / "cli.py", "prune", arguments.model, made, *PRUNED[name], *text,
            "--imatrix", f"{made}.imatrix.gguf")  # fmt: skip
    run(sys.executable, arguments.convert, path, "--outfile", f"{made}.gguf", "--outtype", "f32")
    return path


def one(made: Path, path: Path, kind: str, name: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    """The figures of one quantization."""
    kind, plain = kind.removesuffix(" plain"), kind.endswith(" plain")
    matrix = [] if plain else ["--imatrix", f"{made}.imatrix.gguf"]
    out = made.with_name("quantized.gguf")
    run(arguments.bin / "llama-quantize", "--pure", "--token-embedding-type", "f16", "--output-tensor-type", "f16",
        *matrix, f"{made}.gguf", out, kind)  # fmt: skip
    value, error = perplexity(arguments, out)
    figures: dict[str, float | str] = {"perplexity": value, "error": error}
    if name != "dense":
        (whole,) = survival.survive(path, out, None if plain else f"{made}.imatrix.gguf")["types"]
        figures |= {"type": whole["type"], "zero": whole["zero"], "kept error": whole["error"], "leak": whole["leak"]}
        figures["positive"] = positive(path, out)
    return figures


def perplexity(arguments: argparse.Namespace, model: Path) -> tuple[float, float]:
    """The perplexity by llama-perplexity and its standard error.

    The tool is run up to 9 times, because it sometimes ends before its last line is out.
    """
    for _ in range(9):
        said = run(
            arguments.bin / "llama-perplexity", "-m", model, "-f", arguments.text, "-c", "512", "--chunks", CHUNKS
        )
        if found := re.findall(r"PPL = (\S+) \+/- (\S+)", said):
            return float(found[-1][0]), float(found[-1][1])
    raise SystemExit(f"no perplexity in {said[-1000:]!r}")


def positive(path: Path, model: Path) -> float:
    """The share of the pruned weights that are positive in a GGUF."""
    matrices = pruned_matrices(Checkpoint(path), read_report(path))
    names = gguf_names(list(matrices), "this")
    tensors, above, all_ = read_gguf(model).tensors, 0, 0
    for name, matrix in matrices.items():
        rows, read, tensor = matrix.shape[0], matrix.reader(), tensors[names[name]]
        order = survival._order(matrix, read, tensor, model)
        gone = matrix.gone(read(0, rows))
        above += int((survival._dequantized(tensor, np.arange(rows) if order is None else order)[gone] > 0).sum())
        all_ += int(gone.sum())
    return above / all_


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def version(tools: Path) -> str:
    return re.findall(r"version: (.*)", run(tools / "llama-imatrix", "--version"))[0]


def table(result: dict) -> str:
    names = ("dense", *PRUNED)
    lines = [f"{result['machine']}, commit {result['commit']}, llama.cpp {result['llama.cpp']}", "",
             "| type | still zero | positive | kept error | " + " | ".join(names) + " |", "|---" * 9 + "|"]  # fmt: skip
    for kind, row in result["rows"].items():
        half = row["50%"]
        shares = f"{half['zero']:.1%} | {half['positive']:.1%} | {half['kept error']:.1%}"
        lines.append(
            f"| {kind} ({half['type']}) | {shares} | " + " | ".join(f"{row[n]['perplexity']:.2f}" for n in names) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
