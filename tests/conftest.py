"""Tiny random checkpoints of every family, made on the spot, and the way to shared/."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_wanda.reading import Tensor
from lowmem_wanda.tensors import DTYPES, read_cast

SHARED = Path(__file__).resolve().parents[2] / "shared"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 8},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 24},
    "gpt2": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 64},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2},
    "glm4": {},
    "cohere2": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "stablelm": {"use_parallel_residual": True},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layer_interval": 2},
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


def save_tiny(
    path: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, shard: str = "20KB", **changes
) -> Path:
    """Saves a random model of a family, in shards, with every parameter, norms and biases too, made random."""
    settings = {**FAMILIES, **EXPERTS}[family]
    small = {
        key: value for key, value in SMALL.items() if not (family == "falcon" and key == "head_dim")
    }  # its own, read-only
    config = AutoConfig.for_model(family.removesuffix("_tied"), **{**small, **settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """A file tensor in its stored dtype and shape."""
    return read_cast(tensor, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function: family -> directory of its tiny checkpoint, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def token_file(tmp_path_factory):
    """Six sequences of 16 token ids, as .npy."""
    import numpy as np

    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (6, 16)))
    return path


@pytest.fixture(scope="session")
def shared():
    """The folder of real models; the test is skipped where it is not."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared with real models beside this checkout")
    return SHARED
