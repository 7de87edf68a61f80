"""Experts removed from checkpoints: `python benchmarks/removal.py quality ../shared`, or `cost`.

`quality` shrinks mixed-moe-2.6m by all scores, in both orders, with and without a refit, and measures perplexity and KL
divergence from the whole model by transformers, for each of three kinds of text. `cost` shrinks a random Qwen3-MoE of
64 experts beside the way of the paper's code: the whole model in memory, every expert computed on every token (`WHOLE`,
a plain version of it). Writes results/removal_*.json and prints Markdown tables.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import random_experts
from measure import ROOT, VOCABULARY, commit, follow, machine, random_tokens, size_of

KINDS = ("stories", "shakespeare", "wiki")
SCORES = ("reap", "weighted", "squares", "ean", "man", "msan", "frequency", "aimer", "random")
WHOLE = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
source, tokens, target = sys.argv[1:]
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager").eval()
ids = torch.from_numpy(np.load(tokens))
for layer in model.model.layers:
    def observe(module, args, layer=layer):
        hidden, index, weights = args
        gates = torch.zeros(len(hidden), module.num_experts).scatter_(1, index, weights)
        ones = torch.ones(len(hidden), 1)
        for expert in range(module.num_experts):  # every expert on every token
            out = module.forward(hidden, torch.full((len(hidden), 1), expert), ones)
            mine = gates[:, expert] > 0
            layer.sums[:, expert] += torch.stack([mine.sum(), (out.norm(dim=1) * gates[:, expert])[mine].sum()])
    layer.sums = torch.zeros(2, model.config.num_experts, dtype=torch.float64)
    layer.mlp.experts.register_forward_pre_hook(observe)
for part in ids.split(2):
    model(input_ids=part, use_cache=False)
keep = model.config.num_experts * 3 // 4
for layer in model.model.layers:
    kept = (layer.sums[1] / layer.sums[0].clamp(min=1)).topk(keep).indices.sort().values
    experts = layer.mlp.experts
    for owner, name in ((layer.mlp.gate, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")):
        setattr(owner, name, torch.nn.Parameter(getattr(owner, name)[kept].clone(), False))
model.config.num_experts = keep
model.to(torch.bfloat16).save_pretrained(target)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    quality_of = parts.add_parser("quality")
    quality_of.add_argument("shared", type=Path, help="the folder with models and corpora")
    cost_of = parts.add_parser("cost")
    for name, value in (("blocks", 8), ("width", 1024), ("hidden", 256), ("experts", 64), ("used", 4),
                        ("sequences", 8), ("length", 256)):  # fmt: skip
        cost_of.add_argument(f"--{name}", type=int, default=value)
    for part in (quality_of, cost_of):
        part.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = quality(arguments.shared) if arguments.part == "quality" else cost(arguments)
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    out = arguments.out or ROOT / f"benchmarks/results/removal_{arguments.part}.json"
    result = {"machine": machine(), "commit": commit(), "command": " ".join(sys.argv), "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


def quality(shared: Path) -> list[dict[str, Any]]:
    """A row for each way: perplexity, and KL divergence of all texts and of each kind."""
    from lowmem_wanda import shrink

    source, rows = shared / "models/mixed-moe-2.6m", []
    tokens = torch.from_numpy(np.load(shared / "corpora/moe-eval.npy"))
    whole = logarithms(source, tokens)
    mix = shared / "corpora/moe-calib-mix.npy"
    ways = [(score, order, refit, mix) for score in SCORES for order, refit in (
        (("dense", False), ("dense", True), ("block", False), ("block", True)) if score in SCORES[:3] else
        (("dense", False),))]  # fmt: skip
    ways += [("reap", "dense", False, shared / f"corpora/moe-calib-{kind}.npy") for kind in KINDS]
    for share in ("25%", "50%"):
        for score, order, refit, text in ways:
            measured = {"text": [text], "sequences": 66, "length": 128} if score not in ("aimer", "random") else {}
            with tempfile.TemporaryDirectory() as folder:
                way = {"drop_experts": share, "score": score, "statistics": order, "refit": refit}
                report = shrink(source, Path(folder) / "small", device="cpu", **way, **measured)
                small = logarithms(Path(folder) / "small", tokens)
            lost = (whole.exp() * (whole - small)).sum(-1).mean(-1)
            loss = -small[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
            kinds = {kind: f"{float(part.mean()):.3f}" for kind, part in zip(KINDS, lost.chunk(3), strict=True)}
            rows.append({
                "without": share, "score": score, "order": order, "refit": "yes" if refit else "",
                "calibrated on": text.stem.removeprefix("moe-calib-") if measured else "-",
                "perplexity": f"{float(loss.exp()):.2f}", "KL": f"{float(lost.mean()):.4f}", **kinds,
                "size": f"{report['bytes']['after'] / report['bytes']['before']:.1%}",
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


@torch.no_grad()
def logarithms(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probabilities (sequences, length, vocabulary) of the checkpoint in a folder, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    model.config.output_router_logits = False
    return torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in tokens.split(30)])


def cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time, memory and bytes of `shrink`, of `shrink --from`, and of the paper's way, each in a process of its own."""
    rows = []
    shape = {name: getattr(arguments, name) for name in ("width", "hidden", "blocks", "experts", "used")}
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks/results") as name:
        folder = Path(name)
        source = random_experts(folder / "source", vocab=VOCABULARY, **shape)
        tokens = random_tokens(folder / "tokens.npy", arguments.sequences, arguments.length)
        ours = [sys.executable, ROOT / "cli.py", "shrink", source]
        drop, scores = ["--drop-experts", "25%"], folder / "scores.json"
        measured = ["--text", tokens, "--sequences", str(arguments.sequences), "--record", scores]
        script = folder / "whole.py"
        script.write_text(WHOLE)
        for way, command in (
            ("shrink", [*ours, folder / "1", *drop, *measured]),
            ("shrink --from scores.json", [*ours, folder / "2", *drop, "--from", scores]),
            ("every expert on every token, whole model", [sys.executable, script, source, tokens, folder / "3"]),
        ):
            evict(source)
            usage = follow(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rows.append({
                "way": way, "seconds": f"{usage.seconds:.1f}", "CPU seconds": f"{usage.cpu_seconds:.1f}",
                "anonymous MB": f"{usage.anonymous / 1e6:.0f}", "read": f"{usage.disk_read / size_of(source):.2f}",
                "written": f"{usage.disk_written / size_of(source):.2f}",
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def evict(folder: Path) -> None:
    """Has the system forget the files of a checkpoint, so that they are read from the disk again."""
    subprocess.run(["sync"], check=True)
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
