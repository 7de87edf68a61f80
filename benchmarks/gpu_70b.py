"""Blocks of the largest models on one GPU: `python benchmarks/gpu_70b.py` (needs an NVIDIA GPU and 45 GB of disk).

Makes random checkpoints of two to four blocks of the true shape and prunes each 2:4 with 128 sequences of 2048 tokens
under several caps of GPU memory, every run in a process of its own. Prints for each the peak of GPU memory, the seconds
per block by part, the rate of its products beside that of one large product measured in the same run, and the time that
all blocks of the model would take. `--shape smoke --device cpu` tries it out anywhere.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoints import random_experts, random_llama
from measure import ROOT, commit, machine, random_tokens

from lowmem_wanda.sparsity.masks import prune_lowest
from lowmem_wanda.sparsity.methods.scores import wanda
from lowmem_wanda.sparsity.patterns import parse
from lowmem_wanda.sparsity.statistics import SquaredNorm

SHAPES: dict[str, dict[str, int]] = {
    "70b": {"width": 8192, "hidden": 28672, "heads": 64, "kv_heads": 8, "vocab": 32000, "of": 80},
    "405b": {"width": 16384, "hidden": 53248, "heads": 128, "kv_heads": 8, "vocab": 128256, "of": 126},
    "30b-a3b": {"width": 2048, "hidden": 768, "experts": 128, "used": 8, "vocab": 151936, "of": 48},
    "smoke": {"width": 256, "hidden": 704, "heads": 4, "kv_heads": 1, "vocab": 4096, "of": 80},
}
CAPS = {"70b": ("24GB", "12GB", "8GB"), "405b": ("24GB",), "30b-a3b": ("24GB", "6GB"), "smoke": ("24GB",)}
PARTS = ("read", "upload", "target", "measure", "prune", "recover", "onward", "download", "write")
COMPUTING = ("target", "measure", "prune", "recover", "onward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["70b", "405b"], choices=SHAPES)
    parser.add_argument("--cap", nargs="+", help="values of --max-vram (default: 24GB, for 70b 12GB and 8GB too)")
    parser.add_argument("--blocks", type=int, help="blocks of each checkpoint (default: 4 of 70b, 2 of others)")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--statistics", default="block", choices=("block", "dense", "sequential"))
    parser.add_argument("--ways", nargs="*", default=[""], metavar="FLAGS", help="flags of prune, each tried in turn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_70b.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {
        "machine": machine(), "device": name_of(device), "torch": torch.__version__, "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "runs": [],
    }  # fmt: skip
    print(f"{result['machine']}; {result['device']}; torch {result['torch']}; commit {result['commit']}")
    for shape in arguments.shape:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result["runs"] += measure(Path(folder), shape, arguments, device)
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(folder: Path, shape: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Prunes a checkpoint of one shape under each of its caps; gives the rows of the result."""
    sizes = {key: value for key, value in SHAPES[shape].items() if key != "of"}
    blocks = arguments.blocks or {"70b": 4}.get(shape, 2)
    source = (random_experts if "experts" in sizes else random_llama)(folder / "source", blocks=blocks, **sizes)
    tokens = random_tokens(folder / "tokens.npy", arguments.sequences, arguments.length)
    rates = {"product": product_rate(device, sizes), **mask_rates(device, sizes)}
    print(f"\n{shape}: " + ", ".join(f"{key} {value:.4g}" for key, value in rates.items()))
    runs = []
    for cap, way in [(cap, way) for cap in arguments.cap or CAPS[shape] for way in arguments.ways]:
        flags = ["--json", "--text", str(tokens), "--sequences", str(arguments.sequences), "--length",
                 str(arguments.length), "--statistics", arguments.statistics, "--device", arguments.device,
                 "--max-vram", cap, *way.split()]  # fmt: skip
        planned = answer(["plan", str(source), *flags])
        start = time.perf_counter()
        report = answer(["prune", str(source), str(folder / "out"), *flags])
        row: dict[str, Any] = {"shape": shape, "cap": cap, "way": f"--statistics {arguments.statistics} {way}".strip()}
        if report is None or planned is None:
            row["refused"] = True
        else:
            row |= {"seconds": time.perf_counter() - start, "seconds_predicted": planned["seconds"], "rates": rates}
            row |= figures(report, shape, rates["product"])
            if "experts" in sizes:  # not all of their weights work for a token
                row = {key: value for key, value in row.items() if not key.startswith("products")}
        runs.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "rates"}, indent=2))
        subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
    return runs


def answer(command: list[str]) -> dict[str, Any] | None:
    """What a command of ours gives as JSON; None where it refuses."""
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *command], stdout=subprocess.PIPE)
    return None if done.returncode else json.loads(done.stdout)


def figures(report: dict[str, Any], shape: str, product: float) -> dict[str, Any]:
    """The figures of a block in the middle of the walk, and the time that all blocks of the model would take."""
    blocks = report["blocks"][:-1] or report["blocks"]  # the last block moves no states on
    parts = {part: median(block["parts"].get(part, 0.0) for block in blocks) for part in PARTS}
    weights = sum(rows * columns for rows, columns in (linear["shape"] for linear in blocks[0]["linears"].values()))
    flops = 2 * weights * report["calibration"]["tokens"] * blocks[0]["passes"]
    rate = flops / (parts["measure"] + parts["onward"])
    computing = sum(parts[part] for part in COMPUTING)
    # once all three threads are at work, a block takes as long as the slowest of them
    per_block = max(computing, parts["read"] + parts["upload"], parts["download"] + parts["write"])
    return {
        "vram_gb": report["peak_memory"]["device_measured"] / 1e9,
        "vram_predicted_gb": report["peak_memory"]["device_predicted"] / 1e9,
        "host_gb": report["peak_memory"]["host_measured"] / 1e9,
        "host_predicted_gb": report["peak_memory"]["host_predicted"] / 1e9,
        "layout": report["layout"],
        "walk_seconds": report["timing"]["wall"],
        "parts_per_block": parts,
        "seconds_per_block": per_block,
        "passes": blocks[0]["passes"],
        "products_tflops": rate / 1e12,
        "products_of_measured_rate": rate / 1e12 / product,
        "computing_of_block": computing / per_block,
        "compute_busy": report["timing"]["compute_busy"],
        "all_blocks_minutes": per_block * SHAPES[shape]["of"] / 60,
    }


def product_rate(device: torch.device, sizes: dict[str, int]) -> float:
    """TFLOP/s of 2048 tokens through the largest matrix, the best of several, in the computing dtype."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    inputs = torch.randn(2048, sizes["width"], device=device, dtype=dtype)
    weight = torch.randn(sizes["hidden"], sizes["width"], device=device, dtype=dtype)
    seconds = best(lambda: torch.nn.functional.linear(inputs, weight), device)
    return 2 * 2048 * weight.numel() / seconds / 1e12


def mask_rates(device: torch.device, sizes: dict[str, int]) -> dict[str, float]:
    """GB/s, read and written, of masking the largest matrix, of its scores alone, and of a plain copy of it."""
    weight = torch.randn(sizes["hidden"], sizes["width"], device=device).to(torch.bfloat16)
    moved = 2 * weight.numel() * weight.element_size() / 1e9
    target, inputs = torch.empty_like(weight), SquaredNorm(sizes["width"], device)
    inputs.add(torch.randn(256, sizes["width"], device=device))
    norms = inputs.norms()
    rates = {"copy GB/s": moved / best(lambda: target.copy_(weight), device)}
    rates["score GB/s"] = moved / best(lambda: weight.float().abs_().mul_(norms), device)
    for text in ("2:4", "4:8", "50%"):
        pattern = parse(text)
        rates[f"{text} GB/s"] = moved / best(lambda: prune_lowest(weight, wanda(weight, inputs), pattern), device)  # noqa: B023
    return rates


def best(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """The seconds of the fastest of several runs, after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    main()
