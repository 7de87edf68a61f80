"""The three orders of measuring, against straightforward implementations; hold == replay."""

import builtins

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowmem_wanda import prune
from lowmem_wanda.errors import LowmemError

BATCH = 4


def pruned(path, out, **settings):
    """The report, and {tensor: weight} of what was written."""
    report = prune(path, out, batch=BATCH, **settings)
    return report, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mask(weight, sums):
    score = (weight.abs() * sums.sqrt().float()).reshape(-1, 4)
    order = torch.sort(score, dim=1, stable=True).indices[:, :2]
    weight[torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True).reshape(weight.shape)] = 0


@torch.no_grad()
def whole_model(path, tokens, one_by_one):
    """Wanda 2:4 on a model in memory: each linear measured alone in the order of its call, on the model as it stands
    (sequential), or all of them on the dense model (dense)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    order = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    shared = [order[:3], order[3:4], order[4:6], order[6:]]
    linears = [[block.get_submodule(name) for name in group] for block in model.model.layers for group in shared]
    groups = linears if one_by_one else [[module for group in linears for module in group]]
    for group in groups:
        sums = dict.fromkeys(group, 0)

        def note(module, given, sums=sums):
            sums[module] = sums[module] + given[0].reshape(-1, given[0].shape[-1]).double().square().sum(0)

        hooks = [module.register_forward_pre_hook(note) for module in group]
        for start in range(0, len(tokens), BATCH):
            model(tokens[start : start + BATCH], use_cache=False)
        for hook, module in zip(hooks, group, strict=True):
            hook.remove()
            mask(module.weight.data, sums[module])
    return model.state_dict()


@pytest.mark.parametrize("order", ["sequential", "dense"])
def test_an_order_is_what_it_says(tiny, token_file, tmp_path, order):
    _, ours = pruned(tiny("llama"), tmp_path / "out", text=[str(token_file)], statistics=order)
    assert equal(ours, whole_model(tiny("llama"), torch.from_numpy(np.load(token_file)), order == "sequential"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "cohere2", "mpt"])
def test_held_or_replayed_is_the_same_to_the_bit(tiny, token_file, tmp_path, family):
    results = [
        pruned(
            tiny(family),
            tmp_path / f"{held}",
            text=[str(token_file)],
            statistics="sequential",
            held=held,
        )
        for held in (0, 1, 2)
    ]
    assert equal(results[0][1], results[1][1]) and equal(results[0][1], results[2][1])
    replayed, mixed, held = (report["summary"]["forward_passes_per_block"] for report, _ in results)
    assert held <= 1.01 < mixed < replayed


def test_passes_are_counted(tiny, token_file, tmp_path):
    passes = {
        order: pruned(tiny("llama"), tmp_path / order, text=[str(token_file)], statistics=order)[0]["blocks"][0][
            "passes"
        ]
        for order in ("block", "dense", "sequential")
    }
    down = 32 * 64 / (32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64)  # the share of the last linear
    assert passes == pytest.approx({"block": 2 - down, "dense": 1, "sequential": 1})


@pytest.mark.parametrize("order", ["block", "dense", "sequential"])
def test_every_order_resumes_to_the_same_bytes(tiny, token_file, tmp_path, order):
    def stop(record):
        if record["index"] == 1:
            raise KeyboardInterrupt

    settings = {"text": [str(token_file)], "statistics": order, "batch": BATCH}
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("llama"), tmp_path / "out", on_block=stop, **settings)
    prune(tiny("llama"), tmp_path / "out", held=1, **settings)  # how many are held changes no bit
    prune(tiny("llama"), tmp_path / "whole", **settings)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_a_block_of_which_nothing_is_pruned_moves_the_states_on(tiny, token_file, tmp_path):
    for order in ("block", "dense", "sequential"):
        report, _ = pruned(
            tiny("llama"), tmp_path / order, text=[str(token_file)], statistics=order, exclude=["model.layers.1.*"]
        )
        assert report["blocks"][1]["linears"] == {} and report["blocks"][1]["passes"] == pytest.approx(1)


def test_without_greenlet_the_error_says_what_to_install(tiny, token_file, tmp_path, monkeypatch):
    load = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: (_ for _ in ()).throw(ImportError()) if name == "greenlet" else load(name, *rest),
    )
    with pytest.raises(LowmemError, match=r"pip install greenlet"):
        pruned(tiny("llama"), tmp_path / "out", text=[str(token_file)], statistics="sequential")
