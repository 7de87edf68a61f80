"""GGUFs as llama.cpp's converter makes them."""

import gguf
import numpy as np
from helpers import read_tensor

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.llamacpp.names import expert_in, gguf_names

HEADS = {"q_proj": 4, "k_proj": 2}


def weights(path):
    """{name: float32 matrix of a linear, (outputs, inputs)} of a tiny Llama."""
    tensors = Checkpoint(path).tensors
    return {name: read_tensor(t).float().numpy() for name, t in tensors.items() if ".layers." in name and t.shape[1:]}


def convert(path, model, kind, change=lambda name, weight: weight, skip=(), order=True, split=0):
    """A GGUF of a Llama: q and k in the row order of llama.cpp's rotary embedding, which takes each head's two halves
    in turn where transformers takes one after the other. `split` is the number of tensors in a file (0: one file)."""
    writer, made = gguf.GGUFWriter(model, "llama", split_max_tensors=split), weights(path)
    names = gguf_names(list(made), "x")
    for name, weight in made.items():
        heads = HEADS.get(name.split(".")[-2]) if order else None
        if heads:
            rows, columns = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if name not in skip:
            weight = np.ascontiguousarray(change(name, weight))
            data = gguf.quantize(weight, kind)
            writer.add_tensor(names[name], data, raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return model


def convert_experts(path, model, kind):
    """A GGUF of a tiny mixture, whose experts are stacked; routers are as they are."""
    writer, made = gguf.GGUFWriter(model, "qwen3moe"), weights(path)
    stacks = {}
    for name, tensor in sorted(gguf_names(list(made), "x").items(), key=lambda one: expert_in(one[0]) or 0):
        stacks.setdefault(tensor, []).append(made[name])
    for name, parts in stacks.items():
        own = gguf.GGMLQuantizationType.F32 if "gate_inp" in name else kind
        data = np.stack(parts) if len(parts) > 1 else parts[0]
        writer.add_tensor(name, gguf.quantize(data, own), raw_dtype=own)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return model
