"""Random Llama checkpoints of any shape, written block by block, so that none is ever in memory whole."""

import json
from collections.abc import Iterator
from pathlib import Path

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
    shards = [
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
