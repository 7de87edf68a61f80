"""Time and memory of `shrink` beside `cp` and `sync`: `python benchmarks/shrink.py`.

Makes a random GGUF in the shape of Qwen3-30B-A3B with fewer layers (2 GB: 128 experts of 768, Q4_K and Q6_K, 151,936
tokens), copies it by `cp` and `sync`, and shrinks it by a plan, by an importance matrix, by counts, and by weights
alone, in turns. Reads each process's RssAnon from /proc. Writes results/shrink.json and prints a Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from measure import ROOT, Usage, commit, follow, machine

EXPERTS, USED = 128, 8
SCALES = {Q.Q4_K: slice(0, 4), Q.Q6_K: slice(208, 210)}  # bytes of a block that are float16 numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--drop", default="25%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/shrink.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as name:
        folder = Path(name)
        model, matrix = make(folder, arguments), make_imatrix(folder, arguments)
        kept = sorted(np.random.default_rng(1).permutation(EXPERTS)[: EXPERTS * 3 // 4].tolist())
        (folder / "plan.json").write_text(json.dumps({str(layer): kept for layer in range(arguments.layers)}))
        drop = ["--drop-experts", arguments.drop]
        shrink = [sys.executable, str(ROOT / "cli.py"), "shrink", str(model), str(folder / "small.gguf")]
        cases = {
            "cp and sync": ["sh", "-c", f"cp {model} {folder}/small.gguf && sync {folder}/small.gguf"],
            "shrink --plan": [*shrink, "--plan", str(folder / "plan.json")],
            "shrink --score frequency": [*shrink, *drop, "--from", str(matrix), "--score", "frequency"],
            "shrink --from": [*shrink, *drop, "--from", str(matrix)],
            "shrink --score aimer": [*shrink, *drop, "--score", "aimer"],
        }
        rows = measure(folder, cases, arguments.rounds)
        size = model.stat().st_size
    base = rows["cp and sync"]["seconds"]
    print("| | seconds | times cp and sync | CPU seconds | anonymous MB | written GB |")
    print("|---|---|---|---|---|---|")
    for case, row in rows.items():
        row["times_cp"] = round(row["seconds"] / base, 2)
        cells = (case, row["seconds"], row["times_cp"], row["cpu_seconds"], row["anonymous_mb"], row["written_gb"])
        print("| " + " | ".join(map(str, cells)) + " |")
    result = {"machine": machine(), "commit": commit(), "command": " ".join(sys.argv), "bytes": size, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(folder: Path, cases: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """The median of the seconds of each case over the rounds, and its peak of memory."""
    usages: dict[str, list[Usage]] = {case: [] for case in cases}
    written = {}
    for _ in range(rounds):
        for case, command in cases.items():
            usages[case].append(follow(command, 0.002, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            written[case] = (folder / "small.gguf").stat().st_size
            for file in folder.glob("small.gguf*"):
                file.unlink()
            subprocess.run(["sync"], check=True)
    return {
        case: {
            "seconds": round(statistics.median(one.seconds for one in found), 2),
            "cpu_seconds": round(statistics.median(one.cpu_seconds for one in found), 2),
            "anonymous_mb": round(max(one.anonymous for one in found) / 1e6, 1),
            "written_gb": round(written[case] / 1e9, 2),
        }
        for case, found in usages.items()
    }


def make(folder: Path, arguments: argparse.Namespace) -> Path:
    """A random GGUF with a vocabulary and merges of true number."""
    width, inner, vocabulary = arguments.width, arguments.inner, arguments.vocabulary
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3moe")
    for key, value in {
        "block_count": arguments.layers, "context_length": 4096, "embedding_length": width, "feed_forward_length": 6144,
        "attention.head_count": 32, "attention.head_count_kv": 4, "expert_count": EXPERTS, "expert_used_count": USED,
        "expert_feed_forward_length": inner,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{place}" for place in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges([f"tok{place} en{place}" for place in range(vocabulary)])
    shapes = {"token_embd.weight": ((vocabulary, width), Q.Q4_K), "output.weight": ((vocabulary, width), Q.Q6_K)}
    for layer in range(arguments.layers):
        start = f"blk.{layer}."
        shapes[f"{start}attn_q.weight"] = ((2 * width, width), Q.Q4_K)
        shapes[f"{start}attn_output.weight"] = ((width, 2 * width), Q.Q4_K)
        shapes[f"{start}ffn_gate_inp.weight"] = ((EXPERTS, width), Q.F32)
        shapes[f"{start}ffn_gate_exps.weight"] = ((EXPERTS, inner, width), Q.Q4_K)
        shapes[f"{start}ffn_up_exps.weight"] = ((EXPERTS, inner, width), Q.Q4_K)
        shapes[f"{start}ffn_down_exps.weight"] = ((EXPERTS, width, inner), Q.Q6_K if layer % 2 else Q.Q4_K)
    for name, (shape, kind) in shapes.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows = (*shape[:-1], shape[-1] // block * nbytes)
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for shape, kind in shapes.values():
        writer.write_tensor_data(random_bytes(generator, shape, kind))
    writer.close()
    return folder / "model.gguf"


def random_bytes(generator: np.random.Generator, shape: tuple[int, ...], kind: Q) -> np.ndarray:
    """The bytes of a random tensor, uint8, whose scales are ordinary numbers."""
    if kind == Q.F32:
        return generator.standard_normal(shape, np.float32)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (int(np.prod(shape)) // block, nbytes), np.uint8)
    scales = generator.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    place = SCALES[kind]
    blocks[:, place] = scales[:, : place.stop - place.start]
    return blocks


def make_imatrix(folder: Path, arguments: argparse.Namespace) -> Path:
    """A random importance matrix of the model's experts."""

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """Writes nothing, as llama-imatrix."""

    writer, generator = Writer(folder / "imatrix.gguf", ""), np.random.default_rng(2)
    writer.add_type("imatrix")
    for layer in range(arguments.layers):
        counts = generator.integers(100, 50000, (EXPERTS, 1)).astype(np.float32)
        for name, inputs in (("gate", arguments.width), ("up", arguments.width), ("down", arguments.inner)):
            sums = generator.random((EXPERTS, inputs), np.float32) * counts
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight.counts", counts)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return folder / "imatrix.gguf"


if __name__ == "__main__":
    main()
