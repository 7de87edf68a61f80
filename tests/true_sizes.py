"""Checkpoints of the size of published models, whose tensors are holes: headers alone take space on the disk.

The figures are those of each model's published config.json.
"""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts_per_tok": 8, "head_dim": 128, "vocab_size": 151936,
             "max_position_embeddings": 40960, "tie_word_embeddings": False}  # fmt: skip
LATENT = {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432,
          "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_shared_experts": 1, "q_lora_rank": 1536,
          "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
          "max_position_embeddings": 131072}  # fmt: skip
DENSE = {
    "Llama-3.1-70B": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 28672, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
}  # fmt: skip
PUBLISHED = {
    "Qwen3-30B-A3B": QWEN3_MOE | {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 128,
        "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072,
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "vocab_size": 151552, "max_position_embeddings": 131072,
    },
    "Qwen3-235B-A22B": QWEN3_MOE | {
        "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128,
    },
    "Qwen3-Coder-480B-A35B": QWEN3_MOE | {
        "hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8,
        "intermediate_size": 8192, "moe_intermediate_size": 2560, "num_experts": 160,
    },
    "DeepSeek-V3": LATENT | {
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "vocab_size": 129280,
    },
    "Kimi-K2": LATENT | {
        "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "vocab_size": 163840,
    },
}  # fmt: skip
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def headers(folder: Path, name: str, blocks: int | None = None) -> Path:
    """The folder of a checkpoint of bfloat16 tensors, one shard for each block, with the names of the published files.

    It has the published number of blocks, or the first `blocks` of them.
    """
    made = dict({**DENSE, **PUBLISHED}[name])
    made["num_hidden_layers"] = blocks or made["num_hidden_layers"]
    config = AutoConfig.for_model(made.pop("model_type"), **made)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shards: dict[str, dict[str, list[int]]] = {}
    for parameter, value in model.state_dict().items():
        index = next((part for part in parameter.split(".") if part.isdigit()), "outside")
        stacked = ".experts." in parameter and value.ndim == 3 and config.model_type != "gpt_oss"
        shards.setdefault(index, {}).update(apart(parameter, value) if stacked else {parameter: list(value.shape)})
    where = {}
    for index, shapes in shards.items():
        file = f"model-{index}.safetensors"
        hollow(folder / file, shapes)
        where |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def apart(parameter: str, stack: torch.Tensor) -> dict[str, list[int]]:
    """The shapes of the file tensors that a stack of experts is published as."""
    path, _, last = parameter.rpartition(".")
    rows, columns = stack.shape[1] // len(PARTS[last]), stack.shape[2]
    return {f"{path}.{expert}.{part}.weight": [rows, columns] for expert in range(len(stack)) for part in PARTS[last]}


def hollow(path: Path, shapes: dict[str, list[int]]) -> None:
    """Writes a safetensors file whose data are holes."""
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + start)
