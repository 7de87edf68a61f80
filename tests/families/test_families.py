"""Types that stand for all code paths are proved, or refused in words; and the proof finds what is wrong.

All types are run by `python tests/families/run.py`. One more type here costs about two seconds.
"""

from dataclasses import replace

import pytest
import torch
from families.build import build
from families.verify import REFUSED, VERIFIED, WRONG, verify, verify_checkpoint
from safetensors import safe_open
from transformers.utils import logging

from lowmem_wanda.streaming import matrices, naming

PROVED = [
    "bailing_hybrid",  # fused queries, keys and values; linear attention; groups of experts
    "deepseek_v3",  # latent attention, a shared expert, a dense block before sparse ones
    "falcon_h1",  # attention and a state space in one block
    "gemma4_text",  # arguments that depend on the tokens
    "gemma4_text+shared_kv",  # blocks that read what others write
    "glm4_moe",
    "gpt_oss",  # experts are stored as (inputs, outputs), with biases
    "granitemoe",  # experts in one file tensor
    "granitemoehybrid",
    "jamba",  # a linear whose weight is used, but which is never called
    "kimi_linear",
    "lfm2",  # convolutions
    "mamba2",
    "mixtral",  # a file tensor for each expert
    "nemotron_h",  # experts without a gate
    "olmo_hybrid",  # convolutions that are stored apart and computed as one
    "phimoe",  # a router with a forward of its own
    "qwen3_moe",
    "qwen3_next",  # a gate of one output, linear attention
    "vl:gemma3",
    "vl:qwen2_5_vl",
    "vl:qwen3_5_moe",
    "vl:qwen3_vl_moe",  # experts that are stored in another order of axes
]
REFUSED_TYPES = {
    "bert-generation": "not a causal language model",
    "dory": "called again in one forward",
    "inkling2_text": "stored in another form",
    "vl:kosmos-2": "fails without its blocks",
    "vl:t5gemma2": "an encoder and a decoder",
    "xlm": "not called with what",
    "xlnet": "matrices outside linear layers",
}
NEVER_WRONG = ["deepseek_v4", "glm_moe_dsa", "jetmoe", "longcat_flash", "zaya"]


pytestmark = pytest.mark.filterwarnings("default")  # what transformers warns of tiny models is of no use


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.parametrize("family", PROVED)
def test_a_type_is_proved(tmp_path, family):
    found = verify(family, tmp_path)
    assert found["outcome"] == VERIFIED, found["reason"]


def test_experts_without_an_interface_are_proved(tmp_path):
    assert verify("llama4_text", tmp_path)["outcome"] == VERIFIED


@pytest.mark.parametrize("family", REFUSED_TYPES)
def test_a_type_is_refused_in_words(tmp_path, family):
    found = verify(family, tmp_path)
    assert found["outcome"] == REFUSED, found["reason"]
    assert REFUSED_TYPES[family] in found["reason"]
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("family", NEVER_WRONG)
def test_a_type_is_proved_or_refused(tmp_path, family):
    found = verify(family, tmp_path)
    assert found["outcome"] in (VERIFIED, REFUSED), found["reason"]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_files_in_bfloat16_are_computed_in_float32(tmp_path, family):
    found = verify(family, tmp_path, torch.bfloat16)
    assert found["outcome"] == VERIFIED, found["reason"]


def test_a_block_s_experts_lie_in_several_shards(tmp_path):
    path = build(tmp_path / "source", "mixtral", shard="20KB")
    holding = set()
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, "pt") as handle:
            holding |= {shard.name for name in handle.keys() if "layers.1." in name and ".experts." in name}  # noqa: SIM118
    assert len(holding) > 1
    found = verify_checkpoint(path, tmp_path)
    assert found["outcome"] == VERIFIED, found["reason"]


def test_experts_that_saw_no_token_or_few(tmp_path):
    found = verify("olmoe", tmp_path, num_experts=32)
    assert found["outcome"] == VERIFIED, found["reason"]
    assert found["few"].keys() == {"all tokens of the layer", "few tokens", "magnitude"}


def test_as_many_experts_as_a_linear_has_outputs(tmp_path):
    found = verify("qwen3_next", tmp_path, num_experts=32, shared_expert_intermediate_size=32)
    assert found["outcome"] == VERIFIED, found["reason"]
    assert not any("k_proj" in name or "shared_expert.gate_proj" in name for name in found["left_dense"])


def another_expert(path, parameter, turned, view, sizes):
    """Matrices of a stack, each measured on what the next expert is given."""
    found = list(STACK_OF(path, parameter, turned, view, sizes))
    count = view.shape[0]
    for matrix in found:
        other = (matrix.expert + 1) % count
        yield replace(matrix, expert=other, inputs=f"{path}.{parameter}[{other}]")


def another_row(path, parameter, turned, view, sizes):
    """Matrices of a stack, each but the last from its second row on to the first row of the next."""
    for matrix in STACK_OF(path, parameter, turned, view, sizes):
        last = matrix.expert == view.shape[0] - 1
        yield matrix if last else replace(matrix, start=matrix.start + matrix.shape[1])


def swapped(*arguments):
    """Parameters of several file tensors, of which the first two are taken for each other."""
    found = VIEWS(*arguments)
    return {
        name: replace(view, tensors=(view.tensors[1], view.tensors[0], *view.tensors[2:]))
        if len(view.tensors) > 2
        else view
        for name, view in found.items()
    }


STACK_OF, VIEWS = matrices.stack_of, naming.views
MUTATIONS = {
    "another expert": ("granitemoe", matrices, "stack_of", another_expert),
    "another row": ("granitemoe", matrices, "stack_of", another_row),
    "two file tensors swapped": ("mixtral", naming, "views", swapped),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_proof_finds_what_is_wrong(tmp_path, monkeypatch, mutation):
    family, module, name, wrong = MUTATIONS[mutation]
    monkeypatch.setattr(module, name, wrong)
    found = verify(family, tmp_path)
    assert found["outcome"] == WRONG
    assert "experts" in found["reason"] and "elsewhere" in found["reason"]
