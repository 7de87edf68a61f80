"""Tiny GGUFs of mixtures of experts, with the tensors and keys that llama.cpp loads, and importance matrices of them."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V

WIDTH, INNER = 64, 32
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's vocabulary shows as themselves
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
TOKENS = [*map(chr, PLAIN), *(chr(256 + place) for place in range(len(OTHERS)))]
VOCABULARY = len(TOKENS)


def attention(block, width):
    for name in ("q", "output"):
        yield f"blk.{block}.attn_{name}.weight", (width, width)
    for name in ("k", "v"):
        yield f"blk.{block}.attn_{name}.weight", (width // 2, width)
    yield f"blk.{block}.attn_norm.weight", (width,)


def experts(block, count, width, inner, merged=False):
    start = f"blk.{block}.ffn_"
    yield f"{start}gate_inp.weight", (count, width)
    for name in ("gate_up",) if merged else ("gate", "up"):
        yield f"{start}{name}_exps.weight", (count, inner * (1 + merged), width)
    yield f"{start}down_exps.weight", (count, width, inner)


def dense(block, width, inner, end=""):
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        yield f"blk.{block}.ffn_{name}{end}.weight", shape


def qwen3moe(count, width, inner, layers):
    for block in range(layers):
        yield from llama_block(block, count, width, inner)
        for name in ("q", "k"):
            yield f"blk.{block}.attn_{name}_norm.weight", (width // 4,)


def llama_block(block, count, width, inner):
    yield from attention(block, width)
    yield from experts(block, count, width, inner)
    yield f"blk.{block}.ffn_norm.weight", (width,)


def llama(count, width, inner, layers):
    for block in range(layers):
        yield from llama_block(block, count, width, inner)


def first_dense(block, count, width, inner):
    """The first block is dense, the others have a shared expert beside the routed ones."""
    if block:
        yield from experts(block, count, width, inner)
        yield from dense(block, width, inner, "_shexp")
        yield f"blk.{block}.exp_probs_b.bias", (count,)
    else:
        yield from dense(block, width, width)


def deepseek2(count, width, inner, layers):
    for block in range(layers):
        start = f"blk.{block}."
        yield f"{start}attn_norm.weight", (width,)
        yield f"{start}attn_q_a.weight", (16, width)
        yield f"{start}attn_q_a_norm.weight", (16,)
        yield f"{start}attn_q_b.weight", (4 * 24, 16)
        yield f"{start}attn_kv_a_mqa.weight", (16 + 8, width)
        yield f"{start}attn_kv_a_norm.weight", (16,)
        yield f"{start}attn_kv_b.weight", (4 * 32, 16)
        yield f"{start}attn_output.weight", (width, 4 * 16)
        yield f"{start}ffn_norm.weight", (width,)
        yield from first_dense(block, count, width, inner)


def gpt_oss(count, width, inner, layers):
    for block in range(layers):
        start = f"blk.{block}."
        yield from attention(block, width)
        yield from experts(block, count, width, inner)
        yield f"{start}post_attention_norm.weight", (width,)
        yield f"{start}attn_sinks.weight", (4,)
        for name, size in (("attn_q", width), ("attn_k", width // 2), ("attn_v", width // 2), ("attn_output", width)):
            yield f"{start}{name}.bias", (size,)
        yield f"{start}ffn_gate_inp.bias", (count,)
        for name, size in (("gate", inner), ("up", inner), ("down", width)):
            yield f"{start}ffn_{name}_exps.bias", (count, size)


def glm4moe(count, width, inner, layers):
    """The last block predicts a further token."""
    for block in range(layers):
        start = f"blk.{block}."
        yield from attention(block, width)
        for name, size in (("q", width), ("k", width // 2), ("v", width // 2)):
            yield f"{start}attn_{name}.bias", (size,)
        yield f"{start}post_attention_norm.weight", (width,)
        yield from first_dense(block, count, width, inner)
    last = f"blk.{layers - 1}.nextn."
    yield f"{last}eh_proj.weight", (width, 2 * width)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        yield f"{last}{name}.weight", (width,)


FAMILIES = {  # architecture: tensors, layers, keys of its own
    "qwen3moe": (qwen3moe, 2, {"expert_feed_forward_length": INNER}),
    "llama": (llama, 2, {}),
    "deepseek2": (deepseek2, 3, {
        "expert_group_count": 4, "expert_group_used_count": 2, "expert_shared_count": 1, "leading_dense_block_count": 1,
        "expert_feed_forward_length": INNER, "attention.kv_lora_rank": 16, "attention.q_lora_rank": 16, "attention.key_length": 24,
        "attention.value_length": 16, "rope.dimension_count": 8, "expert_gating_func": 2, "expert_weights_scale": 1.0,
    }),
    "gpt-oss": (gpt_oss, 2, {"expert_feed_forward_length": INNER, "attention.sliding_window": 16}),
    "glm4moe": (glm4moe, 3, {
        "nextn_predict_layers": 1, "expert_shared_count": 1, "leading_dense_block_count": 1, "expert_gating_func": 2,
        "expert_feed_forward_length": INNER,
    }),
    "granitemoe": (llama, 2, {"logit_scale": 1.0}),
}  # fmt: skip


def metadata(architecture, count, width=WIDTH, inner=INNER, layers=None, used=2, **changes):
    """{key: value} of a model; `changes` are keys of the architecture, None takes one away."""
    _, own_layers, own = FAMILIES[architecture]
    keys = {
        "block_count": layers or own_layers, "context_length": 64, "embedding_length": width, "feed_forward_length": inner,
        "attention.head_count": 4, "attention.head_count_kv": 4 if architecture == "deepseek2" else 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": count, "expert_used_count": used,
        "vocab_size": VOCABULARY, **own, **changes,
    }  # fmt: skip
    if architecture != "llama" and architecture != "granitemoe":
        keys["feed_forward_length"] = width
    return {
        "general.name": f"tiny {architecture}",
        **{f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items() if value is not None},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * VOCABULARY,
        "tokenizer.ggml.merges": ["a b"],
    }


def write(path, architecture, count=8, kind=Q.F32, seed=0, width=WIDTH, inner=INNER, layers=None, more=(), skip=(), reshape=None,
          split=0, values=None, **changes):  # fmt: skip
    """A GGUF with random weights: experts of a type, the rest F32. `more` are further tensors, `skip` names those left
    out, `reshape` changes shapes by name, `split` is the number of tensors in a file."""
    keys = {**metadata(architecture, count, width, inner, layers, **changes), **(values or {})}
    tensors, own_layers, _ = FAMILIES[architecture]
    shapes = [
        ("token_embd.weight", (VOCABULARY, width)), ("output_norm.weight", (width,)), ("output.weight", (VOCABULARY, width)),
        *tensors(count, width, inner, layers or own_layers), *more,
    ]  # fmt: skip
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in keys.items():
        write_value(writer, key, value)
    for name, shape in shapes:
        shape = (reshape or {}).get(name, shape)
        if name in skip:
            continue
        if "tid2eid" in name or name.endswith("_ids.weight"):
            writer.add_tensor(name, generator.integers(0, count, shape, dtype=np.int32))
            continue
        weight = generator.standard_normal(shape, dtype=np.float32) * 0.1
        if "_exps.weight" in name:
            weight *= np.exp(generator.standard_normal(shape[0], dtype=np.float32))[:, None, None]
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


def write_value(writer, key, value):
    if key == "general.alignment":
        return writer.add_custom_alignment(value)
    if isinstance(value, list):
        return writer.add_array(key, value)
    kinds = {str: V.STRING, bool: V.BOOL, int: V.UINT32, float: V.FLOAT32}
    return writer.add_key_value(key, value, kinds[type(value)])


def write_imatrix(path, model, seed=1, skip=(), change=lambda name, sums, counts: (sums, counts)):
    """An importance matrix of a GGUF as llama-imatrix makes it: every stack of experts, and attention."""
    reader, generator = gguf.GGUFReader(model), np.random.default_rng(seed)
    architecture = reader.get_field("general.architecture").contents()
    blocks = reader.get_field(f"{architecture}.block_count").contents()
    predicting = reader.get_field(f"{architecture}.nextn_predict_layers")
    running = blocks - (predicting.contents() if predicting else 0)

    class Writer(gguf.GGUFWriter):
        def add_architecture(self):
            pass

    writer = Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 10)
    writer.add_uint32("imatrix.chunk_size", 512)
    counts = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or int(parts[1]) >= running or not tensor.name.endswith("weight") or len(tensor.shape) < 2:
            continue
        if tensor.name in skip:
            continue
        inputs, many = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
        seen = np.array([5120]) if many == 1 else counts.setdefault(parts[1], generator.integers(1, 5000, many))
        sums = generator.random((many, inputs), dtype=np.float32) * seen[:, None]
        sums, seen = change(tensor.name, sums.astype(np.float32), seen.astype(np.float32))
        writer.add_tensor(tensor.name + ".in_sum2", sums)
        writer.add_tensor(tensor.name + ".counts", seen.reshape(-1, 1))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


def tensors_of(path):
    """{name: tensor} of a file, as the gguf package reads it."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields_of(path):
    """{key: value} of a file."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def kept_of(report):
    """{layer: ids that it keeps}."""
    return {layer["layer"]: layer["kept"] for layer in report["layers"]}


def is_cut(name):
    """Whether a tensor has a slice for each expert."""
    return "_exps." in name or "ffn_gate_inp." in name or "exp_probs_b" in name
