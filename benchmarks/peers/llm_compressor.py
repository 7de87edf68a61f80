"""llm-compressor's Wanda 2:4, or its SparseGPT with --sparsegpt:

    python llm_compressor.py SOURCE TOKENS.npy TARGET --dtype bfloat16 [--disk] [--sparsegpt]

Run this with an interpreter that has llm-compressor 0.14; it imports nothing of ours. It does what llm-compressor's
guides and `examples/disk_offloading` say: it takes the sequential pipeline, and for `--disk` a model loaded by
`load_offloaded_model` with `device_map="auto_offload"`. That puts on disk what does not fit in memory. Weights are
allowed no memory here, as it comes to with a model larger than memory. One sequence is computed at a time, the default;
eight take as long and 130 MB more (width 1024, length 256). Shards are as large as the source's, because with the
default of 20 GB an offloaded model is mapped whole to be saved.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.offload import get_device_map, load_offloaded_model
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--sparsegpt", action="store_true")
    arguments = parser.parse_args()
    model = load(arguments.source, getattr(torch, arguments.dtype), arguments.disk)
    prune(model, np.load(arguments.tokens), SparseGPTModifier if arguments.sparsegpt else WandaPruningModifier)
    if not arguments.disk:  # an offloaded model cannot change its dtype
        model.to(torch.bfloat16)
    model.save_pretrained(
        arguments.target, max_shard_size=max(file.stat().st_size for file in arguments.source.glob("*.safetensors"))
    )


def load(source: Path, dtype: torch.dtype, disk: bool) -> PreTrainedModel:
    if not disk:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map="auto_offload", max_memory={"cpu": 0}, offload_folder="offload_folder"
        )
    places = {str(offloaded) for _, offloaded in get_device_map(model.model.layers).values()}
    if "disk" not in places:
        raise SystemExit(f"no block is offloaded to disk: {places}")
    return model


def prune(model: PreTrainedModel, tokens: np.ndarray, modifier: type) -> None:
    """Prunes `model` in place, on tokens (sequences, length)."""
    dataset = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    oneshot(
        model=model,
        dataset=dataset,
        # it needs a tokenizer, but does not use it where a data set has `input_ids`
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"": 0}))),
        recipe=modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )


if __name__ == "__main__":
    main()
