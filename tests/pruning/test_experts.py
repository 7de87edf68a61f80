"""Experts: each is pruned on its own tokens, in every order, by every method, and proved by its bytes."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import digests, opened, save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_wanda import check, evaluate, imatrix, prune, survive
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.errors import PatternError
from lowmem_wanda.llamacpp.imatrix import read
from lowmem_wanda.pruning.experts import OfExperts
from lowmem_wanda.pruning.passes import Passes
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import streamed
from lowmem_wanda.streaming.watching import Observe
from lowmem_wanda.streaming.workload import Workload

BATCH = 4
USUAL = OfExperts()


class Silent:
    """In place of the sums of an importance matrix."""

    def listening(self):
        return torch.no_grad()

    def pausing(self, paused=True):
        return torch.no_grad()


def whole(path):
    """A checkpoint's model in memory, whose experts are computed as its authors wrote them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def expected_inputs(path, tokens, layer):
    """What each expert of a qwen3_moe layer is given by the whole model: (its tokens, routing weights, all tokens)."""
    model, seen = whole(path), []
    experts = model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        for ids in in_batches(tokens, BATCH):
            model(torch.from_numpy(ids), use_cache=False)
    hook.remove()
    given = [[] for _ in range(experts.num_experts)]
    for hidden, index, weights in seen:
        for expert, parts in enumerate(given):
            place, token = torch.where(index.t() == expert)
            parts.append((hidden[token], weights[token, place, None]))
    return given, [hidden for hidden, _, _ in seen]


def measured(path, tokens, statistic, order="block", apart=False, experts=USUAL, layer=0):
    """{matrix: (its statistic, notes)} of one block, with nothing pruned."""
    model, found = opened(path, batch=BATCH), {}
    placement, _ = choose(Workload((model,), *tokens.shape))
    with streamed(model, batches=in_batches(tokens, BATCH), placement=placement) as stream:

        def step(block, states):
            if block.index == layer:
                keep = lambda matrix, inputs, notes: found.__setitem__(matrix.name, (inputs, notes))  # noqa: E731
                passes = Passes(block, states, statistic, block.matrices, keep, Silent(), apart, experts)
                passes.run(order, False, len(states))

        stream.walk(step, indices=range(layer + 1))
    return found


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    """Twenty-two sequences of 16 token ids, so that every expert sees some."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (22, 16)))
    return path


@pytest.fixture(scope="module")
def tokens(token_file):
    return np.load(token_file)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def sums_of(parts):
    return sum(part.square().sum(0).double() for part in parts)


def name_of(expert, part):
    return f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"


def test_each_expert_is_measured_on_its_own_tokens(moe, tokens):
    given, _ = expected_inputs(moe, tokens, 0)
    found = measured(moe, tokens, SquaredNorm)
    for expert, parts in enumerate(given):
        inputs, notes = found[name_of(expert, "gate")]
        assert notes == {"expert": expert, "tokens": sum(len(hidden) for hidden, _ in parts)} and notes["tokens"] > 7
        assert torch.allclose(inputs.sums, sums_of(hidden for hidden, _ in parts), rtol=1e-6)
        assert inputs is found[name_of(expert, "up")][0]


def test_an_expert_of_few_tokens_is_scored_by_its_layer(moe, tokens):
    _, hidden = expected_inputs(moe, tokens, 0)
    found = measured(moe, tokens, SquaredNorm, experts=OfExperts(min_tokens=1000))
    for expert in range(8):
        inputs, notes = found[name_of(expert, "up")]
        assert notes["scored_by"] == "all tokens of the layer"
        assert torch.allclose(inputs.sums, sums_of(hidden), rtol=1e-6)
        assert found[name_of(expert, "down")][1]["scored_by"] == "few tokens"


def test_an_unseen_expert_is_scored_by_magnitude(moe, tokens, monkeypatch):
    unseen = measured(moe, tokens[:1, :2], SquaredNorm)
    down = [pair for name, pair in unseen.items() if "down" in name and pair[1].get("tokens") == 0]
    assert down and all(notes["scored_by"] == "magnitude" for _, notes in down)
    assert all(torch.equal(inputs.norms(), torch.ones(16)) for inputs, _ in down)
    grams = measured(moe, tokens[:1, :2], Gram, apart=True)
    inputs = next(one for name, (one, notes) in grams.items() if "down" in name and notes["tokens"] == 0)
    assert torch.equal(inputs.matrix(), torch.eye(16))


def test_all_experts_and_gate_weighted(moe, tokens):
    given, hidden = expected_inputs(moe, tokens, 0)
    every = measured(moe, tokens, SquaredNorm, experts=OfExperts(observe=Observe(every=True)))
    weighted = measured(moe, tokens, SquaredNorm, experts=OfExperts(observe=Observe(weighted=True)))
    for expert, parts in enumerate(given):
        assert torch.allclose(every[name_of(expert, "gate")][0].sums, sums_of(hidden), rtol=1e-6)
        assert every[name_of(expert, "down")][1]["tokens"] == tokens.size
        expected = sums_of(one * weight for one, weight in parts)
        assert torch.allclose(weighted[name_of(expert, "gate")][0].sums, expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_one_expert_at_a_time_is_all_at_once_to_the_bit(tiny, tokens, family):
    at_once, apart = (measured(tiny(family), tokens, Gram, apart=apart, layer=1) for apart in (False, True))
    assert at_once.keys() == apart.keys()
    for name, (inputs, notes) in at_once.items():
        assert torch.equal(inputs.matrix(), apart[name][0].matrix()) and notes == apart[name][1]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "llama4_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_proves_experts(tmp_path, token_file, family, dtype):
    source, out = save_tiny(tmp_path / "source", family, dtype), tmp_path / "out"
    report = prune(source, out, text=[token_file], batch=BATCH, statistics="sequential")
    findings = check(out, against=source)
    assert not findings.problems and report["summary"]["sparsity"] == 0.5
    assert sum(one.pattern.startswith("2:4") for one in findings.matrices) >= report["summary"]["linears"]
    assert set(report["left_dense"].values()) <= {"chooses experts", "a linear with a forward of its own"}
    figures = evaluate(out, text=[token_file], length=16)
    model, ids = whole(out), torch.from_numpy(np.load(token_file))
    logits = model(ids, use_cache=False).logits[:, :-1].reshape(-1, 96)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    assert figures["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_changed_byte_of_a_stack_is_found(tmp_path, tiny, token_file):
    source, out = tiny("gpt_oss"), tmp_path / "out"
    prune(source, out, text=[token_file], batch=BATCH)
    report = json.loads((out / "report.json").read_text())
    name, record = next(item for item in report["blocks"][1]["linears"].items() if "down_proj[2]" in item[0])
    assert record["start"] and record["tensor"] == name.removesuffix("[2]")
    record["zeros"] += 1
    (out / "report.json").write_text(json.dumps(report))
    assert any(name in problem and "zeros" in problem for problem in check(out).problems)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sparsegpt"},
        {"statistics": "sequential"},
        {"update": "lsq", "statistics": "dense"},
        {"recover": "block"},
    ],
    ids=str,
)
def test_killed_and_resumed_is_uninterrupted(tmp_path, moe, token_file, settings):
    settings = {"text": [str(token_file)], "batch": 2, **settings}
    settings |= {"recover_steps": 4} if "recover" in settings else {}
    prune(moe, tmp_path / "whole", **settings)
    for limit in (1, 2):
        out = tmp_path / f"cut after {limit}"
        with pytest.raises(KeyboardInterrupt):
            prune(moe, out, **settings, on_block=partial(stop_after, limit, []))
        prune(moe, out, **settings)
        assert digests(out) == digests(tmp_path / "whole")


def stop_after(limit, blocks, record):
    blocks.append(record)
    if len(blocks) == limit:
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "wanda+swaps", "ria"])
def test_methods_prune_experts(tmp_path, moe, token_file, method):
    name, _, after = method.partition("+")
    report = prune(moe, tmp_path / "out", text=[token_file], method=name, refine=after or "none", batch=BATCH)
    linears = [linear for block in report["blocks"] for linear in block["linears"].values()]
    assert all(linear["holds"] and linear["zeros"] * 2 == np.prod(linear["shape"]) for linear in linears)
    assert len(linears) == 3 * (4 + 3 * 8) and not check(tmp_path / "out", against=moe).problems


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_importance_matrix_has_every_expert(tmp_path, tiny, tokens, token_file, family):
    file = tmp_path / "m.gguf"
    imatrix(tiny(family), file, text=[token_file], length=16, batch=BATCH)
    entries, _ = read(file)
    found = measured(tiny(family), tokens, SquaredNorm, order="dense")
    experts = 8 if family == "qwen3_moe" else 4
    down = [inputs for name, (inputs, _) in found.items() if "down_proj" in name]
    entry = entries["blk.0.ffn_down_exps.weight"]
    assert entry.counts.tolist() == [inputs.tokens for inputs in down] and len(down) == experts
    assert np.allclose(entry.sums, np.stack([inputs.sums.numpy() for inputs in down]), rtol=1e-6)
    assert np.array_equal(entries["blk.0.ffn_gate_exps.weight"].sums, entries["blk.0.ffn_up_exps.weight"].sums)
    prune(tiny(family), tmp_path / "by-norms", norms=file)
    prune(tiny(family), tmp_path / "dense", text=[token_file], length=16, batch=BATCH, statistics="dense", min_tokens=1)
    ours, theirs = (digests(tmp_path / name) for name in ("by-norms", "dense"))
    assert sum(ours[name] == theirs[name] for name in ours if name.endswith("safetensors")) >= 3
    survived = survive(tmp_path / "dense", imatrix=file)
    assert next(one for one in survived["types"] if one["type"] == "Q8_0")["zero"] == 1


def test_flags_of_experts_are_refused_where_they_have_no_use(tmp_path, tiny, moe, token_file):
    with pytest.raises(PatternError, match="no expert"):
        prune(tiny("llama"), tmp_path / "out", text=[token_file], all_experts=True)
    with pytest.raises(PatternError, match="leave one out"):
        prune(moe, tmp_path / "out", text=[token_file], all_experts=True, gate_weighted=True)
    with pytest.raises(PatternError, match="way of its own"):
        prune(tiny("llama4_text"), tmp_path / "out", text=[token_file], gate_weighted=True)
    with pytest.raises(PatternError, match="sequential"):
        prune(tiny("llama4_text"), tmp_path / "out", text=[token_file], method="sparsegpt")
    prune(tiny("llama4_text"), tmp_path / "out", text=[token_file], method="sparsegpt", statistics="sequential")


def test_few_tokens_are_said(tmp_path, moe, token_file):
    report = prune(moe, tmp_path / "out", text=[token_file], sequences=1, length=4)
    assert any("saw fewer than 8 tokens" in line and "--sequences" in line for line in report["summary"]["also"])


@pytest.mark.real
def test_a_trained_mixture(shared, tmp_path):
    source, mix = shared / "models/mixed-moe-2.6m", shared / "corpora/moe-calib-mix.npy"
    file = tmp_path / "dense.gguf"
    imatrix(source, file, text=[mix], sequences=66, length=128)
    ours, theirs = read(file)[0], read(shared / "models/mixed-moe-2.6m-gguf/moe.imatrix.gguf")[0]
    for name, entry in theirs.items():
        assert np.array_equal(ours[name].counts, entry.counts)
        assert np.allclose(ours[name].sums, entry.sums, rtol=1e-5, atol=1e-6 * entry.sums.max())
    figures = {}
    for method in ("wanda", "magnitude"):
        prune(source, tmp_path / method, text=[mix], sequences=66, length=128, method=method)
        found = evaluate(tmp_path / method, text=[shared / "corpora/moe-eval.npy"], length=128)
        figures[method] = found["perplexity"]
    assert 21.66 < figures["wanda"] < figures["magnitude"] < 25


def test_layers_that_predict_further_tokens_are_copied(tmp_path, token_file):
    source, out = (
        save_tiny(tmp_path / "source", "deepseek_v3", num_nextn_predict_layers=1, shard="1GB"),
        tmp_path / "out",
    )
    tensors = load_file(source / "model.safetensors")
    more = {
        name.replace("layers.2", "layers.3"): value.clone() for name, value in tensors.items() if "layers.2." in name
    }
    save_file({**tensors, **more, "model.layers.3.eh_proj.weight": torch.ones(4, 4)}, source / "model.safetensors")
    report = prune(source, out, text=[token_file], batch=BATCH)
    assert sorted(report["untouched"]) == sorted([*more, "model.layers.3.eh_proj.weight"])
    assert not check(out, against=source).problems and report["summary"]["linears"] == 72


@pytest.mark.parametrize("statistics", ["block", "sequential", "dense"])
def test_last_matrices_alone_can_be_pruned(tmp_path, tiny, token_file, statistics):
    """Not all of a layer's matrices are chosen, so nothing that enters the layer is measured."""
    report = prune(tiny("mixtral"), tmp_path / "out", text=[token_file], include=["*.w2*"], statistics=statistics)
    assert report["summary"]["linears"] == 3 * 4
    assert not check(tmp_path / "out", against=tiny("mixtral")).problems
