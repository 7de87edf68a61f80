"""Tiny random checkpoints of any model type that transformers knows as a causal or an image-text language model.

Configurations are shrunk by the names that they use for sizes, with 2 or 3 layers of each kind that the type's default
mixes. What a few types need beside that stands in `OWN`; the product has no such table.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TEXT, IMAGES = "", "vl:"  # before a type: its causal class, or its class for images and text
WIDTH, WORDS, SPECIAL = 64, 128, 112  # ids from SPECIAL on stand for images and the like; no text has them
LEAST, MOST = 3, 6  # layers
NAMES = {
    64: """hidden_size d_model n_embd dim_model emb_dim embedding_dim embed_dim word_embed_proj_dim out_hidden_size
        text_hidden_size encoder_hidden_size hidden_size_global projection_dim image_text_hidden_size lru_width
        attention_hidden_size adapter_out_dim adapter_in_dim adapter_input_size output_dim decoder_hidden_size vision_hidden_size projector_output_dim
        projector_input_dim vision_output_dim patch_embed_hidden_size projector_hidden_size projection_hidden_dim
        backbone_hidden_size input_embedding_size output_embedding_size projection_hidden_size merged_hidden_size hidden_sizes moe_hidden_size""",
    48: "embedding_size moe_shared_expert_intermediate_size shared_expert_intermediate_size share_expert_dim "
        "shared_intermediate_size shared_experts_intermediate_size",
    96: """intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff d_ff d_inner mlp_dim ffn_hidden_size
        intermediate_size_mlp dense_intermediate_size feed_forward_size alignment_intermediate_size
        projection_intermediate_size decoder_intermediate_size""",
    32: """moe_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank o_lora_rank router_hidden_size
        hidden_size_per_layer_input image_size base_channels latent_channels laurel_rank hc_lowrank loop_gate_rank adapter_rank index_head_dim
        codebook_dim audio_vocab_size global_head_dim""",
    16: """head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim state_size
        mamba_d_state ssm_state_size mamba_d_head mamba_head_dim mamba_headdim dim_head kv_channels swa_head_dim d_kv
        d_head attention_head_size chunk_size mamba_chunk_size sliding_window window_size sliding_window_size
        local_attention attention_window_size index_topk query_pre_attn_scalar attention_chunk_size
        num_position_embeddings image_seq_length num_patches gated_norm_rank block_size resampler_dim_head
        resampler_head_dim num_query_tokens latent_query_num resampler_num_latents resampler_n_latents num_filters""",
    8: "qk_rope_head_dim rotary_dim patch_size time_step_rank mamba_dt_rank mamba_n_heads mamba_num_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts index_block_size pos_emb_height pos_emb_width posemb_grid_size "
       "attention_head_dim d_rel",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        linear_num_value_heads swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        resampler_n_heads resampler_heads linear_num_heads conf_num_attention_heads num_query_groups index_n_heads
        num_sliding_attention_heads linear_num_key_heads zero_expert_num decoder_attention_num_groups""",
    2: """num_key_value_heads swa_num_key_value_heads kv_n_heads num_kv_heads num_experts_per_tok moe_topk moe_k
        moe_top_k num_experts_per_token top_k_experts n_group num_expert_group n_groups mamba_n_groups topk_group
        mamba_ngroups depth encoder_layers num_encoder_layers conf_num_hidden_layers resampler_depth num_global_layers
        num_res_blocks temporal_patch_size num_global_key_value_heads decoder_num_layers index_topk_blocks
        layer_group_size""",
    1: """first_k_dense_replace num_dense_layers moe_layer_start_index n_shared_experts num_shared_experts
        moe_num_shared_experts num_lstm_layers topk_groups insert_layer_id""",
    0: "num_nextn_predict_layers",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers layers num_blocks",
    24: "qk_head_dim",
    256: """max_position_embeddings n_positions max_seq_len max_target_positions max_source_positions n_ctx
        model_max_length context_length rel_extent""",
    WORDS: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size codebook_size num_embeddings "
           "pronunciation_vocab_size shape_vocab_size mel_vocab_size",
}  # fmt: skip
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
UNSET = {
    "n_shared_experts",
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "num_kv_heads",
}
DEPTHS = set(NAMES[3].split())
IDS = ("_token_id", "_token_index", "_token_ids", "_start_id", "_end_id", "_newline_id", "_patch_id")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
OWN: dict[str, dict[str, Any]] = {  # by the `model_type` of a configuration, or its class where it has none
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "apertus1p5": {"image_token_offset": 32, "audio_token_offset": 64},
    "apertus1p5_vision_tokenizer": {"codebook_size": 32},
    "blt": {"encoder_hash_byte_group_vocab": 64, "vocab_size": 128},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": ROPE | {"mrope_section": [4, 2, 2]}, "full_attention": None},
    },
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v4": {
        "hc_mult": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 40},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}},
    "hunyuan_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "emu3": {"vocabulary_map": {"<image>": SPECIAL, "<|extra_200|>": SPECIAL + 1}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {"hidden_size": 128, "state_size": 4, "time_step_rank": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "gemma4_assistant": {
        "default": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "glm5_next_text": {"num_key_value_heads": 4, "hc_mult": 2, "intermediate_size": 192, "moe_intermediate_size": 96},
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "full", "shared"]},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "2/4"},
    "hy_v4": {"hc_mult": 2},
    "hy_v4_vl_text": {"hc_mult": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"moe_layers": [1, 2]},
    "mamba": {"hidden_size": 128, "state_size": 4, "time_step_rank": 4},
    "mamba2": {"num_heads": 8},
    "mistral4": {"qk_nope_head_dim": 8},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "radio": {"video_temporal_patch_size": 2},
    "paddleocr_vl_text": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "prophetnet": {"num_buckets": 4},
    "recurrent_gemma": {"intermediate_size": 384},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 32]},
    "step3p5": {"sliding_window": 16, "num_sliding_attention_heads": 4},
    "wavtokenizer_encoder": {"codebook_dim": 64, "codebook_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "hidden_size": 128,
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "mamba_dt_rank": 4,
        "mamba_d_state": 4,
        "num_hidden_layers": 5,
        "layers_block_type": HYBRID,
    },
    "zamba2": {"num_hidden_layers": 5, "layers_block_type": HYBRID},
    "zaya": {"num_experts_per_tok": 1, "hidden_size": 256},
    "chameleon": {"vocabulary_map": {"<image>": SPECIAL}},
}
VARIANTS: dict[str, dict[str, Any]] = {  # forms of a type that its default is not
    "deepseek_v3+no_q_lora": {"q_lora_rank": None},
    "falcon+new": {"new_decoder_architecture": True},
    "gemma4_text+experts": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_text+shared_kv": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
    },
    "glm_moe_dsa+full": {"indexer_types": ["full"] * 5},
    "granitemoehybrid+dense": {"num_local_experts": 0},
    "lfm2+attention": {"layer_types": ["full_attention"] * 3},
    "llama+tied": {"tie_word_embeddings": True},
    "mixtral+64": {"num_local_experts": 64},  # as many as o_proj has outputs
    "qwen3_moe+every_second": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "qwen4_exp_text+ngrams": {
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
    },
    "zamba2+two": {"num_mem_blocks": 2},
}


NEEDS_MORE = [
    "vl:blip",
    "vl:blip-2",
    "vl:instructblip",
    "vl:instructblipvideo",
    "vl:idefics",
    "vl:kosmos-2",
    "vl:llama4",
    "vl:pi0",
    "vl:pix2struct",
    "vl:pp_formulanet",
    "vl:t5gemma2",
    "vl:udop",
    "vl:vision-encoder-decoder",
    "gemma4_assistant",
    "gemma4_unified_assistant",
]


class NotBuilt(Exception):
    """A type of which no tiny checkpoint can be made."""


def known() -> list[str]:
    """All types: those of causal language models, variants, then those of images and text as "vl:TYPE"."""
    return [
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *VARIANTS,
        *(IMAGES + name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ]


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The shrunk configuration of a type, with some settings of its text part changed."""
    config_class = CONFIG_MAPPING[family.removeprefix(IMAGES).partition("+")[0]]
    return _shrunk(_default(config_class), is_text=True, changes=VARIANTS.get(family, {}) | changes)


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config_class(**OWN.get(config_class.model_type, {}).get("default", {}))


def _own(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration needs beside what the names of its settings say."""
    settings = OWN.get(config.model_type or type(config).__name__, {})
    return {key: value for key, value in settings.items() if key != "default"}


def _shrunk(default: PreTrainedConfig, is_text: bool, changes: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of the same class, with small sizes and one layer of each kind."""
    settings = _settings(default, is_text) | changes
    return type(default)(**settings)


def _settings(default: PreTrainedConfig, is_text: bool) -> dict[str, Any]:
    """What a shrunk configuration is made with."""
    settings: dict[str, Any] = {}
    default.allow_global_per_layer_attribute_access = True
    kept, special = _layers(default, LEAST if is_text else 2), iter(range(SPECIAL, WORDS))
    for field in fields(default):
        name, value = field.name, getattr(default, field.name, None)
        unset = value is None and name in UNSET and "int" in str(field.type)
        if isinstance(value, PreTrainedConfig):
            settings[name] = _shrunk(value, _is_text(name), {})
        elif name in DEPTHS and isinstance(value, int):
            settings[name] = len(kept)
        elif name in SIZES and (unset or type(value) in (int, float)):
            settings[name] = SIZES[name] if unset or value else 0
        elif name in SIZES and isinstance(value, (list, tuple)) and all(type(one) is int for one in value):
            settings[name] = [SIZES[name]] * (len(kept) if len(value) == _depth(default) else len(value))
        elif name.endswith(IDS) and value is not None:
            settings[name] = _ids(name, value, special)
        elif _is_of_layers(name, value, default):
            settings[name] = _picked(name, value, kept, _depth(default))
        elif name == "rope_parameters" and isinstance(value, dict):
            settings[name] = _rope(value, default)
        elif name == "is_decoder" and is_text:
            settings[name] = True
        elif isinstance(value, (bool, str)) and value != field.default and not name.startswith("_"):
            settings[name] = value
    if getattr(default, "kv_lora_rank", None) or getattr(default, "qk_rope_head_dim", None):  # all heads have keys
        settings |= {"num_key_value_heads": 4} if "num_key_value_heads" in settings else {}
        if default.qk_rope_head_dim == getattr(default, "head_dim", None):
            settings["head_dim"] = SIZES["qk_rope_head_dim"]  # which rotary tables are made with
    settings |= _own(default)
    if default.is_heterogeneous:
        settings["per_layer_config"] = _per_layer(default, kept, settings)
    return settings


def _rope(value: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary settings, whose sections of dimensions shrink with them."""
    value = {key: _rope(one, config) if isinstance(one, dict) else one for key, one in value.items()}
    name = "qk_rope_head_dim" if getattr(config, "qk_rope_head_dim", 0) else "head_dim"
    ignored = getattr(config, "ignore_keys_at_rope_validation", None) or ()
    if "mrope_section" in {*value, *ignored} and "rope_theta" in value:
        total = int(SIZES[name] * value.get("partial_rotary_factor", 1)) // 2
        value["mrope_section"] = [total - 2 * (total // 4), total // 4, total // 4]
    return value


def _per_layer(default: PreTrainedConfig, kept: list[int], settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What some layers have of another size than others: twice or half of the usual one."""
    overrides = _overrides(default)
    found: dict[int, dict[str, Any]] = {}
    for place, layer in enumerate(kept):
        for name, value in overrides.get(layer, {}).items():
            more = type(value) is int and value > getattr(default, name)
            usual = settings.get(name)
            size = value if usual is None else 2 * usual if more else max(1, usual // 2)
            found.setdefault(place, {})[name] = size
    return found


def _overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    return config._heterogeneity_spec.per_layer_overrides if config.is_heterogeneous else {}


def _is_text(name: str) -> bool:
    return not any(part in name for part in ("vision", "audio", "vq", "vit", "image"))


def _ids(name: str, value: Any, special: Any) -> Any:
    """A token id of a text's begin, end and padding, or one that no text has."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in usual:
        return usual[name]
    return [next(special) for _ in value] if isinstance(value, (list, tuple)) else next(special)


def _depth(config: PreTrainedConfig) -> int:
    """The number of layers of a configuration; 0 where it has none."""
    found = (getattr(config, name, None) for name in sorted(DEPTHS | {"depth"}))
    return next((value for value in found if isinstance(value, int)), 0)


def _is_of_layers(name: str, value: Any, config: PreTrainedConfig) -> bool:
    """Whether a list has an entry for each layer, or the numbers of some layers."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (int, float, str)):
        return False
    depth = _depth(config)
    return len(value) == depth > 3 or _is_numbers(name, value, depth)


def _is_numbers(name: str, value: Any, depth: int) -> bool:
    """Whether a list has the numbers of some layers."""
    return (
        any(part in name for part in ("layer", "idx", "index"))
        and all(type(one) is int and 0 <= one < depth for one in value)
        and list(value) == sorted(set(value))
    )


def _layers(config: PreTrainedConfig, least: int) -> list[int]:
    """The numbers of layers to keep: the first of each kind, and others of the last kind up to `least`."""
    depth = _depth(config)
    lists = {field.name: getattr(config, field.name, None) for field in fields(config)}
    lists = {name: value for name, value in lists.items() if _is_of_layers(name, value, config)}
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in range(depth):
        kind = (*(_entry(*one, layer, depth) for one in sorted(lists.items())), repr(_overrides(config).get(layer)))
        kinds.setdefault(kind, layer)
    kept = sorted(kinds.values())[:MOST]
    others = (layer for layer in range(depth) if layer not in kept)
    while len(kept) < least:
        kept = sorted([*kept, next(others, depth)])
        depth += 1
    return kept


def _entry(name: str, value: Any, layer: int, depth: int) -> Any:
    return layer in value if _is_numbers(name, value, depth) else value[layer]


def _picked(name: str, value: Any, kept: list[int], depth: int) -> list[Any]:
    """A list of layers, for the kept ones alone."""
    if _is_numbers(name, value, depth):
        return [place for place, layer in enumerate(kept) if layer in value]
    return [value[layer] if layer < len(value) else value[-1] for layer in kept]


def build(path: Path, family: str, dtype: torch.dtype = torch.float32, shard: str = "100KB", **changes: Any) -> Path:
    """Saves a random checkpoint of a type in `path`, in shards. Raises NotBuilt where that fails."""
    auto = AutoModelForImageTextToText if family.startswith(IMAGES) else AutoModelForCausalLM
    try:
        config = tiny_config(family, **changes)
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype)
        make_random(model)
        if family not in NEEDS_MORE and dtype == torch.float32:  # those need more than text, and must be refused
            run(model)
        model.save_pretrained(path, max_shard_size=shard)
        saved = AutoConfig.from_pretrained(path)
        if type(saved) not in auto._model_mapping:
            raise ValueError(f"{auto.__name__} does not know {saved.model_type}, as what it is saved")
    except Exception as error:  # what transformers raises for a configuration that does not fit is not known
        raise NotBuilt(f"{type(error).__name__}: {str(error).strip()[:300]}") from error
    return path


@torch.no_grad()
def run(model: torch.nn.Module) -> None:
    """Runs a model on text, so that configurations that do not fit are found here."""
    ids = torch.randint(3, SPECIAL, (2, 32))
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")


@torch.no_grad()
def make_random(model: torch.nn.Module) -> None:
    """Adds noise to all parameters and to the buffers that are saved, so that none of them is a constant."""
    saved = model.state_dict().keys()
    buffers = (buffer for name, buffer in model.named_buffers() if name in saved)
    for tensor in (*model.parameters(), *buffers):
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all() or tensor.abs().max() > 100:  # memory that nothing was written to
                tensor.zero_()
            tensor.add_(torch.randn_like(tensor, dtype=torch.float32).to(tensor.dtype) * 0.05)
