"""What llama.cpp calls a weight, family by family."""

import pytest
from helpers import FAMILIES, opened

from lowmem_wanda import prune
from lowmem_wanda.errors import ModelError
from lowmem_wanda.llamacpp import names as naming
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.pruning.job import prepare

LLAMA = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}


FUSED = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


NAMES = {
    **dict.fromkeys(FAMILIES, LLAMA),
    **dict.fromkeys(("gpt2", "gpt_neox", "falcon", "bloom", "mpt", "phi3"), FUSED),
    **dict.fromkeys(("phi", "starcoder2"), {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"}),
    "glm4": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"},
}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_names_are_llama_cpps(tiny, family):
    names = gguf_names([matrix.name for matrix in opened(tiny(family)).skeleton.all_matrices], "x")
    assert set(names.values()) == {f"blk.{index}.{kind}.weight" for index in range(3) for kind in NAMES[family]}


def test_a_family_without_names_is_an_error_and_still_pruned(tiny, token_file, tmp_path):
    with pytest.raises(ModelError, match=r"tensor model.decoder.layers.0.*no name for it.*--imatrix"):
        prepare(tiny("opt"), text=[str(token_file)], imatrix=tmp_path / "x.gguf")
    report = prune(tiny("opt"), tmp_path / "out", text=[str(token_file)])
    assert report["summary"]["sparsity"] == 0.5


def test_tensors_that_would_share_a_name_are_an_error(monkeypatch):
    monkeypatch.setattr(naming, "_kind", lambda name: "model.layers.0.mlp.up_proj")
    with pytest.raises(ModelError, match=r"several tensors .* are blk.0.ffn_up.weight"):
        gguf_names(["model.layers.0.a.weight", "model.layers.0.b.weight"], "x")
