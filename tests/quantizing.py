"""Checkpoints that are made quantized: fp8 with block scales, MXFP4."""

import json

import torch
from safetensors.torch import load_file, save_file

BLOCK = 16
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}


def fp8(weight, scale_dtype=torch.float32):
    """A matrix in fp8 and the scales of its blocks, which may be cut off at its end."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scales = (blocks.abs().amax((1, 3)) / 448).clamp_min(1e-9)
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return values.contiguous().to(torch.float8_e4m3fn), scales.to(scale_dtype)


def edit(path, change, config):
    """Changes the tensors of a checkpoint in place, one file at a time, and adds to its config.json."""
    weight_map = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors = change(load_file(shard))
        save_file(tensors, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    if (index := path / "model.safetensors.index.json").exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **config}))
    return path


def to_fp8(tensors):
    made = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight"):
            made[name], made[f"{name}_scale_inv"] = fp8(tensor.float())
        else:
            made[name] = tensor
    return made


def to_mxfp4(tensors):
    random, made = torch.Generator().manual_seed(0), {}
    for name, tensor in tensors.items():
        if ".experts." in name and not name.endswith("bias"):
            shape = (len(tensor), tensor.shape[2], tensor.shape[1] // 32)
            made[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
            made[f"{name}_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8, generator=random)
        else:
            made[name] = tensor
    return made
