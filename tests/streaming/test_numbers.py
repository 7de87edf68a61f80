"""NaN and infinity in a checkpoint: the tensor that holds one is named, whatever is done with it."""

import numpy as np
import pytest
import torch
from helpers import collected, save_tiny
from safetensors.torch import load_file, save_file

from lowmem_wanda import compare, evaluate, prune
from lowmem_wanda.checkpoint.reader import nonfinite
from lowmem_wanda.errors import NumberError

EMBEDDING, NORM, FINAL, HEAD = (
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
)
MATRIX, LEFT = "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def spoiled(tmp_path, name, value=float("nan"), dtype=torch.float32):
    path = save_tiny(tmp_path / "source", "llama", dtype, shard="1GB")
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


WAYS = {
    "wanda": {}, "magnitude": {"method": "magnitude"}, "dense": {"statistics": "dense"},
    "some": {"include": ["*k_proj*"]}, "magnitude of some": {"method": "magnitude", "include": ["*k_proj*"]},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [EMBEDDING, NORM, FINAL, HEAD, MATRIX, LEFT])
def test_prune_names_the_tensor(tmp_path, token_file, way, name):
    path = spoiled(tmp_path, name)
    with pytest.raises(NumberError, match=f"tensor {name} holds NaN or infinity; download it again"):
        prune(path, tmp_path / "out", text=[str(token_file)], pattern="50%", **WAYS[way])
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_of_every_dtype(tmp_path, dtype, value):
    path = spoiled(tmp_path, FINAL, value, dtype)
    with pytest.raises(NumberError, match=f"{FINAL} holds NaN or infinity"):
        prune(path, tmp_path / "out", method="magnitude")


@pytest.mark.parametrize("name", [EMBEDDING, NORM, FINAL, HEAD, MATRIX])
def test_eval_compare_and_imatrix_name_it_too(tmp_path, token_file, name):
    path = spoiled(tmp_path, name)
    said = f"tensor {name} holds NaN or infinity; download it again"
    with pytest.raises(NumberError, match=said):
        evaluate(path, text=[str(token_file)], length=16)
    with pytest.raises(NumberError, match=said):
        compare(path, tmp_path / "compared", text=[str(token_file)], calibration=[str(token_file)], length=16)
    if name not in (FINAL, HEAD):  # which no input depends on
        with pytest.raises(NumberError, match=said):
            collected(path, token_file, tmp_path / "im.gguf")


def test_what_is_computed_too_large_is_not_blamed_on_the_file(tmp_path, token_file):
    path = spoiled(tmp_path, NORM, 1e38)
    with pytest.raises(NumberError, match="though all tensors are finite: try another text"):
        prune(path, tmp_path / "out", text=[str(token_file)])


@pytest.mark.parametrize(("kind", "dtype"), [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")])
def test_bits_tell(kind, dtype):
    limits = np.finfo(dtype)
    assert not nonfinite(np.array([limits.max, limits.min, 0, -0.0, limits.smallest_subnormal], dtype).tobytes(), kind)
    assert all(nonfinite(np.array([1, value], dtype).tobytes(), kind) for value in (np.nan, -np.nan, np.inf, -np.inf))
    assert not nonfinite(b"", kind) and not nonfinite(b"\\xff" * 8, "I64")
