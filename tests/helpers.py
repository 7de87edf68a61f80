"""Tiny random checkpoints of every family, and what tests read of files."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.data.calibration import Calibration
from lowmem_wanda.llamacpp.collect import collect
from lowmem_wanda.streaming.buffers import DTYPES, read_cast
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, open_model

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
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
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def save_tiny(
    path: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, shard: str = "20KB", **changes
) -> Path:
    """Saves a random model of a family, in shards, with every parameter, norms and biases too, made random."""
    settings = {**FAMILIES, **EXPERTS}.get(family, {})
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


def digests(path: Path) -> dict[str, str]:
    """Every file but the report, which tells the time."""
    files = (file for file in path.rglob("*") if file.is_file() and file.stem != "report")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def opened(path: Path, **settings) -> StreamedModel:
    """The model in a folder, opened on the CPU."""
    return open_model(path, Machine.of(device="cpu", **settings))


def collected(path, token_file, out):
    """The bytes of a checkpoint's importance matrix, by the command for that."""
    work = opened(path, batch=4)
    collect(work, Calibration(np.load(token_file), (Path(token_file).name,)), out)
    return out.read_bytes()
