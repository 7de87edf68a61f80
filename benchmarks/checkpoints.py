"""Random Llama and Qwen3-MoE checkpoints of any shape, written block by block, so that none is ever in memory whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.checkpoint.writer import write_shard


def random_llama(path: Path, *, width: int, hidden: int, blocks: int, heads: int, kv_heads: int, vocab: int) -> Path:
    """Writes a bfloat16 checkpoint with normal weights of deviation 0.02 and norms of one."""
    path.mkdir(parents=True, exist_ok=True)
    head = width // heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": width,
        "intermediate_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    block = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    return _written(path, config, block)


def random_experts(
    path: Path, *, width: int, hidden: int, blocks: int, experts: int, vocab: int, used: int = 2
) -> Path:
    """Writes a bfloat16 Qwen3-MoE checkpoint: in each block `experts` of width `hidden`, `used` for each token."""
    path.mkdir(parents=True, exist_ok=True)
    heads, head = width // 64, 64
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": width,
        "intermediate_size": hidden, "moe_intermediate_size": hidden, "num_hidden_layers": blocks, "head_dim": head,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "num_experts": experts,
        "num_experts_per_tok": used, "norm_topk_prob": True, "vocab_size": vocab, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    narrow = max(1, heads // 4) * head
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width), "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
        "mlp.gate": (experts, width), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    for expert in range(experts):
        for part, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            block[f"mlp.experts.{expert}.{part}_proj"] = shape
    return _written(path, config, block)


def _written(path: Path, config: dict[str, Any], block: dict[str, tuple[int, ...]]) -> Path:
    """Writes a checkpoint whose blocks all have the tensors `block`, and its config.json."""
    width, vocab, blocks = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width), "model.norm.weight": (width,)}
    ]
    shards += [{f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()} for i in range(blocks)]
    weight_map = {}
    for index, shapes in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = [Tensor(n, path, "BF16", s, 0, 2 * int(np.prod(s))) for n, s in shapes.items()]
        write_shard(path / name, [(tensor, _values(tensor, index)) for tensor in tensors])
        weight_map |= dict.fromkeys(shapes, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def _values(tensor: Tensor, seed: int) -> Iterator[bytes]:
    """Yields bfloat16 bytes, the upper halves of float32: a million normal numbers, rotated anew for each million."""
    rng = np.random.default_rng([seed, *tensor.name.encode()])
    values = rng.standard_normal(min(1 << 20, tensor.numel), np.float32) * np.float32(0.02)
    if len(tensor.shape) == 1:
        values[:] = 1
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    for start in range(0, tensor.numel, 1 << 20):
        yield np.roll(halves, rng.integers(len(halves)))[: tensor.numel - start].tobytes()
