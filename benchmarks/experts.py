"""What removing experts costs, score by score:

    python benchmarks/experts.py MODEL.gguf IMATRIX.gguf CHECKPOINT TOKENS.npy

Shrinks MODEL.gguf by every score, cuts the CHECKPOINT that it was made of alike in transformers, and measures
perplexity and KL divergence from the whole model on TOKENS (sequences, length). Writes results/experts.json and prints
a Markdown table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measure import ROOT, commit, machine

from lowmem_wanda import shrink_gguf as shrink

SHARES = ("25%", "50%")
SCORES = {"ean": {}, "frequency": {}, "aimer": {}, "random": {"seed": 0}, "random, seed 1": {"seed": 1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/experts.json")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    tokens = torch.from_numpy(np.load(arguments.tokens))
    dense = logarithms(load(arguments.checkpoint), tokens)
    rows = [{"score": "none", "share": "0%", "bytes": arguments.model.stat().st_size, **figures(dense, dense, tokens)}]
    for share in SHARES:
        for name, settings in SCORES.items():
            score = name.split(",")[0]
            with tempfile.TemporaryDirectory() as folder:
                report = shrink(arguments.model, Path(folder) / "small.gguf", share, scores_from=arguments.imatrix,
                                score=score, **settings)  # fmt: skip
            model = load(arguments.checkpoint)
            cut(model, {layer["layer"]: layer["kept"] for layer in report["layers"]})
            found = figures(logarithms(model, tokens), dense, tokens)
            lost = report["tokens"]["lost_mean"]
            rows.append({"score": name, "share": share, "bytes": report["bytes"]["after"], "lost": lost, **found})
    print("| without | score | MB | perplexity | KL | routed tokens lost |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = (row["share"], row["score"], f"{row['bytes'] / 1e6:.2f}", f"{row['perplexity']:.2f}",
                 f"{row['kl']:.4f}", f"{row.get('lost', 0):.1%}")  # fmt: skip
        print("| " + " | ".join(cells) + " |")
    result = {"machine": machine(), "commit": commit(), "command": " ".join(sys.argv), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def load(path: Path) -> Any:
    """The model in float32, whose experts are computed one by one."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def cut(model: Any, kept: dict[int, list[int]]) -> None:
    """Takes experts from a Qwen3-MoE in memory."""
    for block, ids in kept.items():
        layer = model.model.layers[block].mlp
        for module, name in ((layer.gate, "weight"), (layer.experts, "gate_up_proj"), (layer.experts, "down_proj")):
            setattr(module, name, torch.nn.Parameter(getattr(module, name)[ids].clone(), requires_grad=False))
        for module in (layer, layer.gate, layer.experts):
            if hasattr(module, "num_experts"):
                module.num_experts = len(ids)


def logarithms(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (sequences, length, vocabulary)."""
    return torch.cat([model(part).logits.log_softmax(-1) for part in tokens.split(30)])


def figures(found: torch.Tensor, dense: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Perplexity, and mean KL divergence over all places."""
    loss = -found[:, :-1].gather(-1, tokens[:, 1:, None])
    return {"perplexity": float(loss.mean().exp()), "kl": float((dense.exp() * (dense - found)).sum(-1).mean())}


if __name__ == "__main__":
    main()
