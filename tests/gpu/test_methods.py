"""On a GPU: better methods, experts and their removal give the same bytes in every layout, within what is predicted."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, save_tiny

from lowmem_wanda import Checkpoint, check, prune, shrink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
WAYS = {
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "lsq": {"update": "lsq"},
    "swaps": {"refine": "swaps"},
    "recover": {"recover": "block", "recover_steps": 20},
    "best": {"method": "alps", "recover": "block", "recover_steps": 20, "statistics": "sequential"},
}
LAYOUTS = [{}, {"states": "host"}, {"states": "file", "slots": 1}]
MIXED = {"num_experts": 64, "num_experts_per_tok": 4, "hidden_size": 1024, "moe_intermediate_size": 512,
         "head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 4}  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """256 sequences of 32 tokens: more tokens than any matrix here has columns."""
    path = tmp_path_factory.mktemp("many") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (256, 32)))
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Blocks of 180 MB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
    path = tmp_path_factory.mktemp("wide")
    return save_tiny(path, "llama", torch.bfloat16, shard="500MB", num_hidden_layers=2, head_dim=128, **sizes)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Two blocks of 64 experts, 200 MB each."""
    path = tmp_path_factory.mktemp("mixture")
    return save_tiny(path, "qwen3_moe", torch.bfloat16, shard="500MB", num_hidden_layers=2, **MIXED)


def shards(path):
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def zeros(path):
    """{tensor: where it is 0}, of matrices."""
    from safetensors.torch import load_file

    found = {}
    for file in path.glob("*.safetensors"):
        found |= {name: value == 0 for name, value in load_file(file).items() if value.dim() > 1}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_no_layout_changes_a_bit_of_a_better_method(source, tokens, tmp_path, way):
    settings = {"text": [str(tokens)], "batch": 16, "device": "cuda", **WAYS[way]}
    for number, layout in enumerate(LAYOUTS):
        prune(source, tmp_path / str(number), **layout, **settings)
        assert shards(tmp_path / str(number)) == shards(tmp_path / "0")
    assert not check(tmp_path / "0", against=source).problems


@pytest.mark.parametrize("way", ["sparsegpt", "alps", "lsq", "swaps"])
def test_a_gpu_and_a_cpu_choose_the_same_weights(tmp_path, tokens, way):
    source = save_tiny(tmp_path / "source", "llama")
    settings = {"text": [str(tokens)], "batch": 16, "dtype": "float32", "statistics": "dense", **WAYS[way]}
    found = []
    for device in ("cuda", "cpu"):
        prune(source, tmp_path / device, device=device, **settings)
        found.append(zeros(tmp_path / device))
    different = sum(int((found[0][name] ^ found[1][name]).sum()) for name in found[0])
    assert different <= 0.005 * sum(mask.numel() for mask in found[0].values()), different


def answer(command, source, *flags):
    """What a command gives as JSON, in a process of its own: nothing that was left behind counts."""
    call = [sys.executable, "-m", "lowmem_wanda", command, source, *flags, "--device", "cuda", "--json"]
    done = subprocess.run(list(map(str, call)), cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def flags_of(settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def within(need, memory):
    assert 0 < memory["device_measured"] <= memory["device_reserved"] <= need


@pytest.mark.parametrize("way", WAYS)
def test_a_cap_of_just_what_is_predicted_is_enough_for_a_better_method(wide, tokens, tmp_path, way):
    flags = ["--text", tokens, *flags_of(WAYS[way])]
    need = answer("plan", wide, *flags)["device_peak"]
    within(need, answer("prune", wide, tmp_path / "out", *flags, "--max-vram", f"{need}B")["peak_memory"])
    assert not check(tmp_path / "out", against=wide).problems


@pytest.mark.parametrize("statistics", ["block", "sequential"])
def test_experts_come_in_groups_within_a_cap(mixture, tokens, tmp_path, statistics):
    flags = ["--text", tokens, "--batch", 16, "--statistics", statistics]
    need = answer("plan", mixture, *flags)["device_peak"]
    for number, cap in enumerate((need, need * 7 // 10)):
        within(cap, answer("prune", mixture, tmp_path / str(number), *flags, "--max-vram", f"{cap}B")["peak_memory"])
    assert shards(tmp_path / "0") == shards(tmp_path / "1")


@pytest.mark.parametrize("refit", [(), ("--refit",)])
def test_no_layout_and_no_cap_changes_which_experts_are_kept(mixture, tokens, tmp_path, refit):
    flags = ["--text", tokens, "--batch", 16, "--drop-experts", "50%", *refit]
    need = answer("plan", mixture, *flags)["device_peak"]
    within(need, answer("shrink", mixture, tmp_path / "0", *flags, "--max-vram", f"{need}B")["peak_memory"])
    settings = {"text": [str(tokens)], "device": "cuda", "batch": 16, "drop_experts": "50%", "refit": bool(refit)}
    for number, layout in enumerate(LAYOUTS[1:], 1):
        shrink(mixture, tmp_path / str(number), **layout, **settings)
        assert shards(tmp_path / str(number)) == shards(tmp_path / "0")
    assert not check(tmp_path / "0", against=mixture).problems


def test_a_gpu_and_a_cpu_keep_the_same_experts(tmp_path, tokens):
    source = save_tiny(tmp_path / "source", "qwen3_moe")
    settings = {"text": [str(tokens)], "batch": 16, "dtype": "float32", "drop_experts": "25%"}
    for device in ("cuda", "cpu"):
        shrink(source, tmp_path / device, device=device, **settings)
    assert shards(tmp_path / "cuda") == shards(tmp_path / "cpu")
    assert len(Checkpoint(tmp_path / "cuda").tensors) < len(Checkpoint(source).tensors)
