"""What is said of a shrunk GGUF: the facts of its report, warnings, what it costs, and how to measure that."""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lowmem_wanda import __version__
from lowmem_wanda.checkpoint.output import FORMAT
from lowmem_wanda.llamacpp.expert_choice import LayerChoice
from lowmem_wanda.llamacpp.expert_layers import ExpertLayers, routing_facts
from lowmem_wanda.llamacpp.expert_scores import ExpertCounts
from lowmem_wanda.llamacpp.gguf_file import GGUF

TEXT = Path(__file__).resolve().parents[1] / "data" / "held-out.txt"
WINDOW = 512  # tokens of a window, as llama-perplexity takes them unless it is told otherwise
FEW = 100  # tokens of an expert; with fewer, its rank is chance (docs/llama-cpp.md)
COSTS = (
    "A quarter of the experts is near free on models with many; a half is a cliff for some: Moonlight-16B (64 experts) "
    "solves 83 % of GSM8K, 66 % without a quarter, 14 % without a half (llm-compressor, by REAP). Languages and "
    "subjects that the importance matrix saw little of, and multiple choice, go first.",
    "What it has to beat is a lower quantization of the whole model at the same size. Measure both.",
)


class GGUFShrinkReport(TypedDict, total=False):
    """What was removed of a GGUF. Bytes are bytes; the layers have their scores and counts by the source's ids."""

    format: int
    kind: str
    source: str
    target: str
    architecture: str
    bytes: dict[str, int]
    files: list[dict[str, Any]]
    experts: dict[str, int]
    routing: dict[str, bool]
    routing_text: str
    how: str
    tokens: dict[str, Any] | None
    layers: list[dict[str, Any]]
    warnings: list[str]
    costs: list[str]
    commands: list[str]
    commands_write: int | None
    proof: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    seconds: float


def shrink_report(
    model: GGUF, experts: ExpertLayers, choices: Mapping[int, LayerChoice], known: Mapping[int, ExpertCounts],
    target: Path, files: Sequence[Mapping[str, Any]], how: str,
) -> GGUFShrinkReport:  # fmt: skip
    """The facts of a GGUF that was written in `files`."""
    keep = len(next(iter(choices.values())).kept)
    small = target.with_name(files[0]["name"])
    layers = [_layer(block, choice, known.get(block)) for block, choice in choices.items()]
    tokens = _tokens(known, layers)
    return {
        "format": FORMAT,
        "kind": "shrink",
        "source": str(model.path),
        "target": str(small),
        "architecture": model.text("general.architecture"),
        "bytes": {"before": model.nbytes, "after": sum(file["nbytes"] for file in files)},
        "files": [dict(file) for file in files],
        "experts": {
            "before": experts.count, "kept": keep, "used": experts.used, "groups": experts.groups,
            "layers": len(experts.layers), "predicting": len(experts.predicting),
        },
        "routing": routing_facts(keep),
        "routing_text": routing_text(keep),
        "how": how,
        "tokens": tokens,
        "layers": layers,
        "warnings": _warnings(experts, choices, tokens, len(known)),
        "costs": list(COSTS),
        "commands": commands(model, small),
        "commands_write": written_by_commands(model),
        "proof": shlex.join(["lowmem-wanda", "check", str(small), "--against", str(model.path)]),
        "versions": {
            "lowmem-wanda": __version__, "python": sys.version.split()[0], "gguf": metadata.version("gguf"),
            "numpy": np.__version__, "platform": platform.platform(),
        },
    }  # fmt: skip


def note(experts: ExpertLayers, keep: int, how: str) -> str:
    """The sentence that a shrunk GGUF says of itself."""
    return (
        f"lowmem-wanda {__version__} kept {keep} of {experts.count} experts in each of {len(experts.layers)} layers, "
        f"chosen by {how}; their bytes are unchanged."
    )


def commands(model: GGUF, small: Path) -> list[str]:
    """The two commands that measure how far the small model is from the whole one, ready to paste."""
    base = ["--kl-divergence-base", str(small.with_name(f"{small.name}.kld"))]
    length = min(WINDOW, model.number(f"{model.text('general.architecture')}.context_length", WINDOW))
    both = ["llama-perplexity", "-c", str(length)]
    dense = [*both, "-m", str(model.path), "-f", str(TEXT), *base]
    return [shlex.join(dense), shlex.join([*both, "-m", str(small), *base, "--kl-divergence"])]


def written_by_commands(model: GGUF) -> int | None:
    """About how many bytes the first command writes, None if the vocabulary is not known.

    They are two for each token of the vocabulary, at half of the text's tokens, each of which is taken as four bytes.
    """
    head = model.tensors.get("output.weight") or model.tensors.get("token_embd.weight")
    return None if head is None else TEXT.stat().st_size // 4 * head.shape[0]


def routing_text(keep: int) -> str:
    """What a number of experts means for programs, in words."""
    facts = routing_facts(keep)
    power = "a power of two" if facts["power_of_two"] else "not a power of two"
    fused = "runs" if facts["fused_cuda_routing"] else "does not run, so routing is slower there, but right"
    multiple = "a multiple of 8" if facts["multiple_of_8"] else "not a multiple of 8, which some other programs want"
    return f"{keep} is {power}: llama.cpp's fused CUDA routing {fused}; it is {multiple}"


def _layer(block: int, choice: LayerChoice, known: ExpertCounts | None) -> dict[str, Any]:
    """The record of a layer: what it keeps, why, and the share of routed tokens that went to what it loses."""
    lost = None
    if known is not None:
        lost = 1 - float(known.counts[list(choice.kept)].sum() / known.counts.sum())
    return {
        "layer": block,
        "kept": list(choice.kept),
        "by": choice.by,
        "tokens_lost": lost,
        "scores": None
        if choice.scores is None
        else [float(one) if np.isfinite(one) else None for one in choice.scores],
        "counts": None if known is None else [int(one) for one in known.counts],
    }


def _tokens(known: Mapping[int, ExpertCounts], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of all layers: tokens of an expert in the median, experts that saw none, shares that went to dropped experts."""
    if not known:
        return None
    counts = np.concatenate([one.counts for one in known.values()])
    lost = {layer["layer"]: layer["tokens_lost"] for layer in layers if layer["tokens_lost"] is not None}
    worst = max(lost, key=lambda block: lost[block])
    return {
        "median": float(np.median(counts)),
        "unseen": int((counts == 0).sum()),
        "lost_mean": float(np.mean(list(lost.values()))),
        "lost_most": lost[worst],
        "lost_most_in": worst,
    }


def _warnings(
    experts: ExpertLayers, choices: Mapping[int, LayerChoice], tokens: Mapping[str, Any] | None, measured: int
) -> list[str]:
    """What makes the choice doubtful; `tokens` are the facts of the `measured` layers."""
    found = []
    by = {choice.by for block, choice in choices.items() if block not in experts.predicting}
    if tokens and by & {"ean", "frequency"}:
        if (few := tokens["median"]) < FEW:
            found.append(
                f"the importance matrix saw {few:g} tokens of an expert in the median, fewer than {FEW}: the choice is "
                "partly chance; take one that was measured on more text"
            )
        if unseen := tokens["unseen"]:
            found.append(
                f"{unseen} of {measured * experts.count} experts saw no token of the importance matrix; they go first"
            )
    if "frequency" in by:
        found.append(
            "counts alone say little where the router spreads tokens evenly; --score ean weighs what experts put out"
        )
    if "random" in by:
        found.append("chosen at random, to compare with")
    aimed = [block for block in experts.predicting if choices[block].by == "aimer"]
    if aimed and "aimer" not in by:
        found.append(
            f"layer {aimed[0]} predicts further tokens (MTP) and was not measured: its experts were chosen by their "
            "weights alone (aimer)"
        )
    return found
