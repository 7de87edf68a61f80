"""Matrices that llama.cpp's converter splits: entries by the converter's names, with the sums of the parts' own inputs."""

import numpy as np
import pytest
import torch
from helpers import collected, save_tiny
from transformers import AutoModelForCausalLM

from lowmem_wanda import prune
from lowmem_wanda.cli.imatrix import imatrix_table
from lowmem_wanda.cli.main import main
from lowmem_wanda.errors import CalibrationError
from lowmem_wanda.llamacpp import collect, latents
from lowmem_wanda.llamacpp.imatrix import read
from lowmem_wanda.pruning.job import prepare

HEADS, INNER, LATENT = 4, 16, 20
SIZES = {"kv_lora_rank": LATENT, "q_lora_rank": 12, "qk_nope_head_dim": INNER, "qk_rope_head_dim": 8, "v_head_dim": 6,
         "num_key_value_heads": HEADS, "head_dim": 8}  # fmt: skip
PARTS = {"attn_k_b": HEADS * INNER, "attn_v_b": HEADS * LATENT}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same shapes in two families: llama.cpp's converter splits the matrix in the first, and not in the second."""
    return {kind: save_tiny(tmp_path_factory.mktemp(kind), kind, **SIZES) for kind in ("youtu", "minicpm3")}


@torch.no_grad()
def absorbed(path, tokens):
    """{GGUF name: sums} as llama.cpp computes attention: queries to keys' part, latents weighted by attention to
    values' part. Attention is that of transformers' plain code, which gives its weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for part in ("q_b_proj", "kv_a_layernorm"):
            module = getattr(layer.self_attn, part)
            module.register_forward_hook(lambda _, given, made, key=(index, part): seen.update({key: made.double()}))
    weights = model(torch.from_numpy(tokens), use_cache=False, output_attentions=True).attentions
    sums = {}
    for index, weight in enumerate(weights):  # (sequences, heads, length, length)
        query = seen[index, "q_b_proj"].unflatten(-1, (HEADS, -1))[..., :INNER]  # (sequences, length, heads, inner)
        latent = seen[index, "kv_a_layernorm"].reshape(*tokens.shape, LATENT)
        mixed = torch.einsum("shqk,skl->sqhl", weight.double(), latent)
        for name, inputs in (("attn_k_b", query), ("attn_v_b", mixed)):
            sums[f"blk.{index}.{name}.weight"] = inputs.square().sum((0, 1)).flatten().numpy()
    return sums


def test_parts_have_the_sums_of_what_llama_cpp_multiplies_them_with(sources, token_file, tmp_path):
    collected(sources["youtu"], token_file, tmp_path / "x.gguf")
    entries, _ = read(tmp_path / "x.gguf")
    expected = absorbed(sources["youtu"], np.load(token_file))
    assert len(entries) == 3 * 9 and not any("kv_b" in name for name in entries)
    for name, sums in expected.items():
        assert entries[name].sums.shape == (1, PARTS[name.split(".")[2]]) and entries[name].counts.tolist() == [96]
        assert np.allclose(entries[name].sums[0], sums, rtol=1e-4), name


def test_a_family_whose_matrix_stays_whole_keeps_its_entry(sources, token_file, tmp_path):
    collected(sources["minicpm3"], token_file, tmp_path / "x.gguf")
    entries, _ = read(tmp_path / "x.gguf")
    assert len(entries) == 3 * 8 and entries["blk.1.attn_kv_b.weight"].sums.shape == (1, LATENT)


@pytest.mark.parametrize("statistics", ["block", "sequential"])
def test_the_pruned_models_matrix_has_them_too(sources, token_file, tmp_path, statistics):
    settings = {"text": [str(token_file)], "batch": 4, "statistics": statistics, "imatrix": tmp_path / "a.gguf"}
    prune(sources["youtu"], tmp_path / "out", **settings)
    assert collected(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "a.gguf").read_bytes()


def test_parts_that_cannot_be_measured_have_no_entry_which_is_said(sources, token_file, tmp_path, monkeypatch):
    """As where a family computes attention by its own code."""
    monkeypatch.setattr(latents, "_is_headwise", lambda *given: False)
    made = []
    whole = collect.collect
    monkeypatch.setattr("helpers.collect", lambda *given: made.append(whole(*given)))
    collected(sources["youtu"], token_file, tmp_path / "x.gguf")
    entries, _ = read(tmp_path / "x.gguf")
    lacking = [f"blk.{index}.{part}.weight" for index in range(3) for part in PARTS]
    assert made[0]["left_out"] == lacking and made[0]["entries"] == len(entries) == 3 * 7
    assert not any("_b.weight" in name and "q_b" not in name for name in entries)
    rows = list(imatrix_table(made[0]).columns[1].cells)
    assert any("6 weights, such as blk.0.attn_k_b.weight" in row for row in rows)
    report = prune(sources["youtu"], tmp_path / "out", text=[str(token_file)], imatrix=tmp_path / "y.gguf")
    assert report["imatrix"]["left_out"] == lacking


def test_norms_of_parts_are_not_those_of_the_matrix(sources, token_file, tmp_path):
    collected(sources["youtu"], token_file, tmp_path / "x.gguf")
    with pytest.raises(CalibrationError, match=r"llama.cpp splits tensor .*kv_b_proj.weight in two .*--exclude it"):
        prepare(sources["youtu"], norms=str(tmp_path / "x.gguf"))
    prepare(sources["youtu"], norms=str(tmp_path / "x.gguf"), exclude=["*kv_b_proj*"])


def test_survive_says_which_matrices_it_does_not_look_at(sources, token_file, tmp_path, capsys):
    prune(sources["youtu"], tmp_path / "out", text=[str(token_file)], exclude=["*q_a_proj*"])
    collected(sources["youtu"], token_file, tmp_path / "x.gguf")
    assert main(["survive", str(tmp_path / "out"), "--imatrix", str(tmp_path / "x.gguf")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 matrices are not looked at, such as model.layers.0.self_attn.kv_b_proj.weight: llama.cpp splits" in shown
