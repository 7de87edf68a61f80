"""Experts removed from checkpoints: what is left is the source's, loads, and computes as the whole model routed alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families.build import build
from helpers import SHARED, digests
from quantizing import FP8, MXFP4, edit, to_fp8, to_mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_wanda import Checkpoint, check, imatrix, prune, shrink, shrink_gguf
from lowmem_wanda.errors import CheckpointError, LowmemError, ModelError, OutputError, PatternError

KEPT = (0, 2, 3, 6)  # of 8 experts, in the first layer; others rotate it
FAMILIES = (
    "qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "minimax_m2", "lfm2_moe",
    "granitemoe", "olmoe", "phimoe", "qwen3_next", "jamba", "gemma4_text", "longcat_flash", "zaya",
)  # fmt: skip
FEW = {"sequences": 22, "length": 16, "batch": 4, "device": "cpu"}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function: family -> a tiny checkpoint of it, made once."""
    known = {}

    def get(family, **changes):
        key = family, *changes.items()
        if key not in known:
            if family == "gemma4_text":
                changes = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
            known[key] = build(tmp_path_factory.mktemp(family), family, **changes)
        return known[key]

    return get


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (22, 16)))
    return path


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """Eight times the same six sequences, so that what is held out is known."""
    path = tmp_path_factory.mktemp("repeated") / "tokens.npy"
    np.save(path, np.tile(np.random.default_rng(0).integers(3, 96, (6, 16)), (8, 1)))
    return path


def plan_of(path, family, keep=KEPT):
    """A plan for the layers of a checkpoint that have experts, which differs from layer to layer."""
    names = Checkpoint(path).tensors
    layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names if ".experts." in name or
                     "block_sparse_moe" in name})  # fmt: skip
    groups = 2 if family == "deepseek_v3" else 1
    plan = {}
    for layer in layers:
        turned = sorted((expert + layer) % 8 for expert in keep)
        plan[layer] = [0, 1 + layer % 3, 4, 5 + layer % 3] if groups == 2 else turned
    return plan


def loaded(path):
    """The model by transformers, with nothing missing."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval(), info["unexpected_keys"]


def experts_in(model):
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "down_proj") and
        isinstance(module.down_proj, torch.nn.Parameter)
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_left_computes_as_the_whole_model_routed_alike(made, tmp_path, family):
    source, out = made(family), tmp_path / "out"
    plan = plan_of(source, family)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    report = shrink(source, out, plan=tmp_path / "plan.json", device="cpu")
    assert report["experts"] | {"before": 8, "kept": 4, "layers": len(plan)} == report["experts"]
    (small, unexpected), (whole, also) = loaded(out), loaded(source)
    assert unexpected == also
    dense, seen = experts_in(whole), []

    def compare(name, module, args, output):
        layer = int(name.split("layers.")[1].split(".")[0])
        hidden, index, weights = args
        places = torch.tensor([*plan[layer], *range(8, 16)])  # behind the experts are those that compute nothing
        seen.append(torch.equal(output, dense[name](hidden, places[index], weights)))

    for name, module in experts_in(small).items():
        module.register_forward_hook(lambda *given, name=name: compare(name, *given))
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = small(input_ids=tokens, use_cache=False).logits
    assert torch.isfinite(logits).all() and len(seen) == len(plan) and all(seen)
    findings = check(out, against=source)
    assert not findings.problems and findings.cut and findings.kept == {k: tuple(v) for k, v in plan.items()}
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, out))
    changed = {key for key in before if before[key] != after[key]}
    assert len(changed) == 1 and before.keys() == after.keys()
    assert list(Checkpoint(out).tensors) and {t.dtype for t in Checkpoint(out).tensors.values()} == {"F32"}


def test_as_many_experts_as_they_are_wide_are_told_apart(tmp_path):
    sizes = {"num_experts": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    source = build(tmp_path / "source", "qwen3_next", **sizes)
    shrink(source, tmp_path / "out", keep_experts=24, score="aimer", device="cpu")
    assert not check(tmp_path / "out", against=source).problems
    assert loaded(tmp_path / "out")[0].config.num_experts == 24
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert [key for key in before if before[key] != after[key]] == ["num_experts"]


def reference(path, tokens, before=None):
    """{layer: {sum: numbers for each expert}} of the whole model by transformers, by hooks on its experts.

    With `before`, a smaller model, its first layer stands in place of the whole one's.
    """
    model, _ = loaded(path)
    if before is not None:
        model.model.layers[0] = loaded(before)[0].model.layers[0]
    found = {}

    def entered(name, module, args):
        hidden, index, weights = args
        layer = int(name.split("layers.")[1].split(".")[0])
        if before is not None and layer == 0:
            return
        sums = found.setdefault(layer, np.zeros((7, 8)))
        for expert in range(8):
            token, place = (index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            ones = torch.ones(len(token), 1)
            outputs = module.forward(hidden[token], torch.full((len(token), 1), expert), ones).double()
            gates, norms = weights[token, place].double(), outputs.norm(dim=1)
            sums[:6, expert] += [
                len(token), gates.sum(), norms.sum(), (norms**2).sum(), (gates * norms).sum(), ((gates * norms) ** 2).sum()
            ]  # fmt: skip
            sums[6, expert] = max(sums[6, expert], outputs.abs().max())

    for name, module in experts_in(model).items():
        module.register_forward_pre_hook(lambda module, args, name=name: entered(name, module, args))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens), use_cache=False)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_text"])
def test_sums_are_those_of_hooks_on_the_whole_model(made, token_file, tmp_path, family):
    from lowmem_wanda.sparsity.expert_sums import SUMS

    report = shrink(made(family), tmp_path / "out", keep_experts=4, text=[token_file], **FEW)
    expected = reference(made(family), np.load(token_file))
    assert {layer["layer"] for layer in report["layers"]} == expected.keys()
    for layer in report["layers"]:
        found = np.array([layer["sums"][name] for name in SUMS])
        np.testing.assert_allclose(found, expected[layer["layer"]], rtol=1e-6)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_in_the_block_order_layers_see_the_smaller_ones_before_them(made, token_file, tmp_path, family, refit):
    from lowmem_wanda.sparsity.expert_sums import SUMS

    way = {"keep_experts": 4, "statistics": "block", "refit": refit, "text": [token_file], **FEW}
    report = shrink(made(family), tmp_path / "out", **way)
    expected = reference(made(family), np.load(token_file), before=tmp_path / "out")
    found = np.array([report["layers"][1]["sums"][name] for name in SUMS])
    np.testing.assert_allclose(found, expected[1], rtol=1e-6)


@pytest.mark.parametrize("statistics", ["dense", "block"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_a_refit_brings_the_layer_closer_by_what_the_report_says(made, repeated, tmp_path, family, statistics):
    way = {"keep_experts": 4, "statistics": statistics, "text": [repeated], **FEW, "sequences": 48}
    plain = shrink(made(family), tmp_path / "plain", **way)
    report = shrink(made(family), tmp_path / "refit", refit=True, **way)
    first, models = report["layers"][0], [loaded(path)[0] for path in (made(family), tmp_path / "plain",
                                                                      tmp_path / "refit")]  # fmt: skip
    assert first["kept"] == plain["layers"][0]["kept"]
    seen = []
    for model in models:
        module = next(iter(experts_in(model).values()))
        module.register_forward_hook(lambda module, args, output: seen.append(output.double()))
        model(input_ids=torch.from_numpy(np.load(repeated)), use_cache=False)
    whole, cut, fitted = seen
    lost = [float((one - whole).square().sum() / whole.square().sum()) for one in (cut, fitted)]
    assert first["refit"]["before"] == pytest.approx(lost[0], rel=1e-4)
    assert first["refit"]["after"] == pytest.approx(lost[1], rel=1e-4) and lost[1] < lost[0]
    held = [one.view(48, 16, -1)[7::8] for one in (whole, cut, fitted)]
    shares = [float((one - held[0]).square().sum() / held[0].square().sum()) for one in held[1:]]
    assert first["refit"]["held_out"] == pytest.approx(shares, rel=1e-4) and first["refit"]["taken"]
    findings = check(tmp_path / "refit", against=made(family))
    assert not findings.problems and findings.moved and findings.kept == check(tmp_path / "refit").kept
    few = {expert for layer in report["layers"] for expert in layer["refit"]["few_tokens"]}
    counts = {kept: layer["counts"][kept] for layer in report["layers"] for kept in layer["kept"]}
    assert all(expert in counts for expert in few)


def test_a_refit_that_does_not_help_leaves_the_source_s_weights(made, token_file, tmp_path, monkeypatch):
    from lowmem_wanda.shrinking import refit as module

    monkeypatch.setattr(module, "fit_outputs", lambda left, routes, inner: {
        expert: torch.ones(64, inner(expert, route[0][:1]).shape[1]) for expert, route in routes.items()
    })  # fmt: skip
    way = {"keep_experts": 4, "text": [token_file], **FEW}
    report = shrink(made("qwen3_moe"), tmp_path / "out", refit=True, **way)
    assert report["refit"]["not_taken"] == [layer["layer"] for layer in report["layers"]]
    assert all(layer["refit"]["before"] == layer["refit"]["after"] for layer in report["layers"])
    shrink(made("qwen3_moe"), tmp_path / "plain", **way)
    assert shards(tmp_path / "out") == shards(tmp_path / "plain")
    assert not check(tmp_path / "out", against=made("qwen3_moe")).moved


def test_without_a_report_it_is_said_that_one_is_missing(made, tmp_path):
    shrink(made("qwen3_moe"), tmp_path / "out", keep_experts=4, score="aimer", device="cpu")
    (tmp_path / "out/report.json").unlink()
    problems = check(tmp_path / "out", against=made("qwen3_moe")).problems
    assert len(problems) == 1 and "is 4, in the source 8, and there is no report.json" in problems[0]


def test_any_batch_and_groups_of_experts_give_the_same(made, token_file, tmp_path, monkeypatch):
    from dataclasses import replace

    from lowmem_wanda.shrinking import shrink as module

    whole = shrink(made("qwen3_moe"), tmp_path / "whole", keep_experts=4, text=[token_file], **FEW)
    other = shrink(made("qwen3_moe"), tmp_path / "other", keep_experts=4, text=[token_file], **{**FEW, "batch": 11})
    choose = module.choose

    def in_groups(*given):
        found, need = choose(*given)
        return replace(found, part=30000, slots=2), need

    monkeypatch.setattr(module, "choose", in_groups)
    parts = shrink(made("qwen3_moe"), tmp_path / "parts", keep_experts=4, text=[token_file], **FEW)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    for one, two, three in zip(whole["layers"], other["layers"], parts["layers"], strict=True):
        assert one["sums"] == three["sums"] and one["kept"] == two["kept"]
        for name, values in one["sums"].items():
            np.testing.assert_allclose(values, two["sums"][name], rtol=1e-6)


def tensors_of(path):
    return {name: load_file(tensor.file)[name] for name, tensor in Checkpoint(path).tensors.items()}


def linears_of(report):
    return {name: one for block in report["blocks"] for name, one in block["linears"].items()}


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "glm4_moe"])
def test_what_is_left_is_pruned_as_the_smaller_checkpoint_would_be(made, token_file, tmp_path, family, pattern):
    given, plan = {"pattern": pattern, "text": [token_file], **FEW}, tmp_path / "plan.json"
    one = shrink(made(family), tmp_path / "one", keep_experts=4, statistics="block", write_plan=plan, **given)
    shrink(made(family), tmp_path / "smaller", plan=plan, device="cpu")
    two = prune(tmp_path / "smaller", tmp_path / "two", **given)
    found, expected = (tensors_of(tmp_path / name) for name in ("one", "two"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)
    assert linears_of(one).keys() == linears_of(two).keys()
    assert one["summary"]["sparsity"] == two["summary"]["sparsity"]
    same = ("zeros", "shape", "pattern", "tensor", "start", "tokens", "expert", "scored_by")
    assert all(linears_of(one)[name].get(key) == its.get(key) for name, its in linears_of(two).items() for key in same)
    findings = check(tmp_path / "one", against=made(family))
    assert not findings.problems and findings.masked and findings.zeroed
    assert all(matrix.pattern[:3] == "2:4" for matrix in findings.matrices if matrix.sparsity) or pattern != "2:4"


@pytest.mark.parametrize(
    "more", [{}, {"statistics": "block"}, {"refit": True}, {"statistics": "block", "refit": True},
             {"statistics": "block", "pattern": "2:4"}], ids=str
)  # fmt: skip
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(made, token_file, tmp_path, more):
    way = {"keep_experts": 4, "score": "weighted", "text": [token_file], **more, **FEW}
    shrink(made("deepseek_v3"), tmp_path / "whole", **way)

    class Killed(BaseException):
        pass

    def stop(record):
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            shrink(made("deepseek_v3"), tmp_path / "stopped", on_block=stop, **way)
        assert not (tmp_path / "stopped/config.json").exists()
        with pytest.raises(CheckpointError, match="unfinished"):
            check(tmp_path / "stopped")
    shrink(made("deepseek_v3"), tmp_path / "stopped", **way)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    shrink(made("deepseek_v3"), tmp_path / "stopped", **way)  # a finished one is proved
    with pytest.raises(OutputError, match="--keep-experts = 4, this one has 6"):
        shrink(made("deepseek_v3"), tmp_path / "stopped", **{**way, "keep_experts": 6})


def test_recorded_scores_choose_again_without_a_forward_pass(made, token_file, tmp_path):
    recorded, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    source = made("qwen3_moe")
    for score in ("reap", "squares", "man"):
        given = {"keep_experts": 5, "score": score}
        shrink(source, tmp_path / f"{score}1", record=recorded, write_plan=plan, text=[token_file], **given, **FEW)
        shrink(source, tmp_path / f"{score}2", scores_from=recorded, device="cpu", **given)
        shrink(source, tmp_path / f"{score}3", plan=plan, device="cpu")
        first, *others = ({name: one for name, one in digests(tmp_path / f"{score}{number}").items() if name != "job.json"}
                          for number in (1, 2, 3))  # fmt: skip
        assert first == others[0] == others[1]
        recorded.unlink()
        plan.unlink()


def test_experts_with_outlying_outputs_are_kept(tmp_path, token_file, monkeypatch):
    source = build(tmp_path / "source", "qwen3_moe")
    way = {"keep_experts": 4, "score": "frequency", "text": [token_file], **FEW}
    plain = shrink(source, tmp_path / "plain", **way)["layers"][1]
    gone = next(one for one in range(8) if one not in plain["kept"] and plain["counts"][one])
    edit(source, lambda tensors: {
        name: tensor * 60 if f".1.mlp.experts.{gone}.down_proj" in name else tensor for name, tensor in tensors.items()
    }, {})  # fmt: skip
    report = shrink(source, tmp_path / "out", protect="super", record=tmp_path / "scores.json", **way)
    assert [layer["protected"] for layer in report["layers"]] == [[], [gone], []][: len(report["layers"])]
    assert gone in report["layers"][1]["kept"] and not check(tmp_path / "out", against=source).problems
    known = {"keep_experts": 4, "score": "frequency", "scores_from": tmp_path / "scores.json", "device": "cpu"}
    shrink(source, tmp_path / "again", protect="super", **known)
    assert shards(tmp_path / "again") == shards(tmp_path / "out")

    class Killed(BaseException):
        pass

    def stop(record):
        if "kept" in record:
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            shrink(source, tmp_path / "stopped", protect="super", on_block=stop, **way)
    shrink(source, tmp_path / "stopped", protect="super", **way)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "out")


def shards(path):
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def test_the_importance_matrix_is_that_of_the_smaller_model(made, token_file, tmp_path):
    pytest.importorskip("gguf")
    way = {"keep_experts": 4, "text": [token_file], **FEW}
    for _ in range(2):  # a finished one is proved, and stays
        report = shrink(made("qwen3_moe"), tmp_path / "out", imatrix=tmp_path / "ours.gguf", **way)
    assert report["imatrix"]["sequences"] == 22 and not report["imatrix"]["left_out"]
    imatrix(tmp_path / "out", tmp_path / "theirs.gguf", text=[token_file], **FEW)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    with pytest.raises(PatternError, match="run `imatrix` on what is written"):
        shrink(made("qwen3_moe"), tmp_path / "no", imatrix=tmp_path / "no.gguf", keep_experts=4, score="aimer")
    with pytest.raises(OutputError, match="exists"):
        shrink(made("qwen3_moe"), tmp_path / "no", imatrix=tmp_path / "ours.gguf", **way)
    assert not (tmp_path / "no").exists()


def test_other_scores_are_refused_in_words(made, token_file, tmp_path):
    recorded = tmp_path / "scores.json"
    shrink(made("qwen3_moe"), tmp_path / "1", record=recorded, keep_experts=4, text=[token_file], **FEW)
    with pytest.raises(LowmemError, match="is of 8 experts in the layers 0, 1, .*, and this model has 8 in"):
        shrink(made("deepseek_v3"), tmp_path / "2", scores_from=recorded, keep_experts=4, device="cpu")
    content = json.loads(recorded.read_text())
    content["layers"]["0"]["norms"][0] = "many"
    recorded.write_text(json.dumps(content))
    with pytest.raises(LowmemError, match="the sums of layer 0 are damaged"):
        shrink(made("qwen3_moe"), tmp_path / "3", scores_from=recorded, keep_experts=4, device="cpu")
    assert not (tmp_path / "2").exists() and not (tmp_path / "3").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_aimer_is_its_definition(made, tmp_path, family):
    report = shrink(made(family), tmp_path / "out", keep_experts=4, score="aimer", device="cpu")
    model, _ = loaded(made(family))
    for layer, (_, module) in zip(report["layers"], experts_in(model).items(), strict=True):
        for expert, score in enumerate(layer["scores"]):
            weights = torch.cat([one[expert].flatten() for one in (module.gate_up_proj, module.down_proj)]).double()
            assert score == pytest.approx(-float(weights.abs().mean() / weights.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(("family", "change", "config"), [
    ("qwen3_moe", to_fp8, FP8), ("gpt_oss", to_mxfp4, MXFP4),
], ids=["fp8", "mxfp4"])  # fmt: skip
def test_quantized_sources_are_cut_as_they_are_stored(tmp_path, token_file, family, change, config):
    source = build(tmp_path / "source", family, torch.bfloat16, hidden_size=64)
    edit(source, change, {"quantization_config": config})
    report = shrink(source, tmp_path / "out", keep_experts=4, text=[token_file], **FEW)
    findings = check(tmp_path / "out", against=source)
    assert not findings.problems and findings.cut and findings.identical
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert {one.dtype for one in after.tensors.values()} == {one.dtype for one in before.tensors.values()}
    kept = report["layers"][0]["kept"]
    if family == "gpt_oss":
        name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
        stored = {path: load_file(Checkpoint(path).tensors[name].file)[name] for path in (source, tmp_path / "out")}
        assert torch.equal(stored[tmp_path / "out"], stored[source][kept])
    shrink(source, tmp_path / "bf16", keep_experts=4, text=[token_file], dequantize=True, **FEW)
    assert "BF16" in {one.dtype for one in Checkpoint(tmp_path / "bf16").tensors.values()}
    assert not check(tmp_path / "bf16", against=source).problems
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


def to_int4(tensors):
    """Linears in the layout of compressed-tensors; their values are of no account."""
    made = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight"):
            rows, columns = tensor.shape
            made[f"{name}_packed"] = torch.randint(0, 99, (rows, columns // 8), dtype=torch.int32)
            made[f"{name}_scale"] = torch.rand(rows, columns // 32).bfloat16()
            made[f"{name}_shape"] = torch.tensor(tensor.shape)
        else:
            made[name] = tensor
    return made


def test_int4_is_cut_by_a_plan_or_by_scores_of_the_unquantized_model(tmp_path, token_file):
    whole = build(tmp_path / "whole", "qwen3_moe", torch.bfloat16)
    way = {"keep_experts": 4, "text": [token_file], **FEW}
    first = shrink(whole, tmp_path / "first", record=tmp_path / "scores.json", write_plan=tmp_path / "plan.json", **way)
    source = build(tmp_path / "source", "qwen3_moe", torch.bfloat16)
    edit(source, to_int4, {"quantization_config": {"quant_method": "compressed-tensors", "ignore": ["re:.*gate$"]}})
    by_scores = {"scores_from": tmp_path / "scores.json", "keep_experts": 4}
    for name, given in (("plan", {"plan": tmp_path / "plan.json"}), ("scores", by_scores)):
        report = shrink(source, tmp_path / name, **given)
        assert [layer["kept"] for layer in report["layers"]] == [layer["kept"] for layer in first["layers"]]
        findings = check(tmp_path / name, against=source)
        assert not findings.problems and findings.cut
        assert sum("_packed" in one for one in Checkpoint(tmp_path / name).tensors) == 3 * (4 * 3 + 4)
    with pytest.raises(PatternError, match="compressed-tensors, whose values are not read: give --plan"):
        shrink(source, tmp_path / "no", keep_experts=4, score="aimer")
    numbered = {"quant_method": "compressed-tensors", "ignore": ["model.layers.0.mlp.experts.3.up_proj"]}
    edit(source, lambda tensors: tensors, {"quantization_config": numbered})
    with pytest.raises(ModelError, match="names experts by number"):
        shrink(source, tmp_path / "no", plan=tmp_path / "plan.json")


def with_mtp(path, layer, like):
    """Adds a layer that predicts further tokens, as a copy of one in the model."""
    shard = sorted(path.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    added = {
        tensor.name.replace(f".{like}.", f".{layer}.", 1): load_file(tensor.file)[tensor.name]
        for tensor in Checkpoint(path).tensors.values() if f".layers.{like}." in tensor.name
    }  # fmt: skip
    added[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(64, 128)
    save_file(tensors | added, shard, metadata={"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(added, shard.name)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "num_nextn_predict_layers": 1}))


def test_layers_that_predict_further_tokens_are_cut_or_dropped(tmp_path, token_file):
    source = build(tmp_path / "source", "glm4_moe")
    depth = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    with_mtp(source, depth, depth - 1)
    report = shrink(source, tmp_path / "kept", keep_experts=4, text=[token_file], **FEW)
    assert report["experts"]["predicting"] == 1 and report["layers"][-1]["by"] == "aimer"
    assert any("predicts further tokens (MTP)" in warning for warning in report["warnings"])
    small = Checkpoint(tmp_path / "kept")
    gate = small.tensors[f"model.layers.{depth}.mlp.gate.weight"]
    assert gate.shape[0] == 4 and small.tensors[f"model.layers.{depth}.eh_proj.weight"].shape == (64, 128)
    assert sum(f".{depth}.mlp.experts." in name for name in small.tensors) == 12
    assert not check(tmp_path / "kept", against=source).problems
    shrink(source, tmp_path / "dropped", keep_experts=4, mtp="drop", text=[token_file], **FEW)
    assert not any(f".layers.{depth}." in name for name in Checkpoint(tmp_path / "dropped").tensors)
    assert json.loads((tmp_path / "dropped/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not check(tmp_path / "dropped", against=source).problems
    for path in ("kept", "dropped"):
        loaded(tmp_path / path)


@pytest.mark.parametrize(("family", "given", "error", "says"), [
    ("llama", {"keep_experts": 4}, ModelError, "no number of experts is found"),
    ("dbrx", {"keep_experts": 4}, ModelError, "no number of experts is found"),
    ("deepseek_v4", {"keep_experts": 4, "score": "aimer"}, ModelError, "tid2eid: routes tokens by their ids"),
    ("llama4_text", {"keep_experts": 4}, ModelError, "give --score aimer, or --plan"),
    ("qwen3_moe", {"keep_experts": 1}, PatternError, "the router chooses 2 for every token"),
    ("qwen3_moe", {"drop_experts": "0%"}, PatternError, "lies between 0 and 1"),
    ("deepseek_v3", {"keep_experts": 5}, PatternError, "they lie in 2 groups"),
    ("qwen3_moe", {"keep_experts": 4, "score": "best"}, PatternError, "give one of reap"),
    ("qwen3_moe", {"keep_experts": 4, "score": "aimer", "text": ["x.txt"]}, PatternError, "nothing is measured here"),
    ("qwen3_moe", {"keep_experts": 4, "mtp": "half"}, PatternError, "--mtp half"),
    ("qwen3_moe", {"keep_experts": 4, "score": "aimer", "refit": True}, PatternError, "--refit: needs a forward pass"),
    ("qwen3_moe", {"keep_experts": 4, "statistics": "sequential"}, PatternError, "give one of dense, block"),
    ("qwen3_moe", {"keep_experts": 4, "pattern": "2:4"}, PatternError, "give --statistics block, too"),
    ("qwen3_moe", {"keep_experts": 4, "pattern": "2:4", "score": "aimer"}, PatternError, "prune what is written"),
    ("qwen3_moe", {"keep_experts": 4, "pattern": "2:4", "statistics": "block", "refit": True}, PatternError, "--refit"),
    ("qwen3_moe", {"keep_experts": 4, "pattern": "4:2", "statistics": "block"}, PatternError, "4:2"),
    ("qwen3_moe", {"keep_experts": 4, "protect": "super", "refit": True}, PatternError, "so --refit does not go with it"),
    ("qwen3_moe", {"keep_experts": 4, "protect": "super", "score": "random"}, PatternError, "are not measured here"),
    ("qwen3_moe", {}, PatternError, "say how many experts are dropped"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_nothing(made, tiny, tmp_path, family, given, error, says):
    source = tiny(family) if family == "llama" else made(family)
    with pytest.raises(error, match=says):
        shrink(source, tmp_path / "out", device="cpu", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama4_text", "longcat_flash", "zaya", "jetmoe", "minimax"])
@torch.no_grad()
def test_experts_that_are_only_watched_are_cut_by_their_weights(made, tmp_path, family):
    report = shrink(
        made(family), tmp_path / "out", keep_experts=4, score="aimer", write_plan=tmp_path / "p", device="cpu"
    )
    findings = check(tmp_path / "out", against=made(family))
    assert report["experts"]["before"] == 8 and not findings.problems and findings.cut
    model, unexpected = loaded(tmp_path / "out")
    assert unexpected == loaded(made(family))[1]
    assert torch.isfinite(model(input_ids=torch.arange(3, 27)[None]).logits).all()


@pytest.mark.parametrize("change", ["byte", "row", "name", "config", "kept"])
def test_the_proof_finds_what_was_changed(made, tmp_path, change):
    source, out = made("qwen3_moe"), tmp_path / "out"
    shrink(source, out, keep_experts=4, score="aimer", device="cpu")
    shard = out / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    router = next(name for name in tensors if name.endswith("gate.weight"))
    expert = next(name for name in tensors if ".experts.0." in name)
    if change == "byte":
        tensors[expert][0, 0] += 1
    elif change == "row":
        tensors[router] = tensors[router].flip(0).contiguous()
    elif change == "name":
        other = expert.replace(".experts.0.", ".experts.1.")
        tensors[expert], tensors[other] = tensors[other], tensors[expert]
    save_file(tensors, shard, metadata={"format": "pt"})
    if change == "config":
        content = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.5}))
    if change == "kept":
        report = json.loads((out / "report.json").read_text())
        kept = report["layers"][0]["kept"]
        report["layers"][0]["kept"] = [*kept[:-1], next(one for one in range(8) if one not in kept)]
        (out / "report.json").write_text(json.dumps(report))
    problems = check(out, against=source).problems
    assert any("bytes are not those" in problem or "rms_norm_eps" in problem for problem in problems)


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with real models beside this checkout")
@torch.no_grad()
def test_a_trained_mixture(tmp_path):
    """Mean KL divergence from the whole model, by transformers (EXPERT-REMOVAL.md, 7 and 10)."""
    source, recorded = SHARED / "models/mixed-moe-2.6m", tmp_path / "scores.json"
    tokens = torch.from_numpy(np.load(SHARED / "corpora/moe-eval.npy"))
    whole = logits_of(source, tokens)
    text = [SHARED / "corpora/moe-calib-mix.npy"]
    found = {}
    for score, drop in (("reap", "50%"), ("weighted", "50%"), ("squares", "50%"), ("random", "50%"), ("reap", "25%")):
        measured = {"text": text, "sequences": 66, "length": 128, "record": recorded} if not found else {}
        again = {"scores_from": recorded} if found and score != "random" else {}
        out = tmp_path / f"{score}{drop}"
        shrink(source, out, drop_experts=drop, score=score, device="cpu", **measured, **again)
        small = logits_of(out, tokens)
        found[score, drop] = float((whole.exp() * (whole - small)).sum(-1).mean())
    assert found["random", "50%"] > 0.6 and found["reap", "50%"] <= 0.35 and found["reap", "25%"] <= 0.03
    assert found["weighted", "50%"] <= 0.17 and found["squares", "50%"] <= 0.17
    fitted = {"text": text, "sequences": 66, "length": 128, "refit": True, "device": "cpu"}
    shrink(source, tmp_path / "fitted", drop_experts="50%", score="squares", **fitted)
    small = logits_of(tmp_path / "fitted", tokens)
    distance = float((whole.exp() * (whole - small)).sum(-1).mean())
    assert distance <= 0.09 and distance <= found["squares", "50%"] / 2


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with real models beside this checkout")
@pytest.mark.parametrize("drop", ["25%", "50%"])
def test_an_importance_matrix_decides_as_for_the_gguf(tmp_path, drop):
    model, matrix = (SHARED / f"models/mixed-moe-2.6m-gguf/moe{end}" for end in ("-q8.gguf", ".imatrix.gguf"))
    whole = SHARED / "models/mixed-moe-2.6m"
    ours = shrink(whole, tmp_path / "out", drop_experts=drop, scores_from=matrix, device="cpu")
    theirs = shrink_gguf(model, tmp_path / "small.gguf", drop, scores_from=matrix)
    assert ours["how"] == "ean from moe.imatrix.gguf" == theirs["how"]
    for one, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert one["kept"] == other["kept"] and one["tokens_lost"] == pytest.approx(other["tokens_lost"])
    with pytest.raises(PatternError, match="--score reap: is not known from .*; give one of ean, frequency"):
        shrink(whole, tmp_path / "2", drop_experts=drop, score="reap", scores_from=matrix, device="cpu")


def test_an_importance_matrix_of_another_model_is_refused(made, token_file, tmp_path):
    from lowmem_wanda import imatrix

    imatrix(made("mixtral"), tmp_path / "m.gguf", text=[token_file], device="cpu")
    with pytest.raises(LowmemError, match="get the importance matrix of this very model|has no entry"):
        shrink(made("deepseek_v3"), tmp_path / "out", keep_experts=4, scores_from=tmp_path / "m.gguf", device="cpu")
    shrink(made("mixtral"), tmp_path / "fits", keep_experts=4, scores_from=tmp_path / "m.gguf", device="cpu")
    assert not check(tmp_path / "fits", against=made("mixtral")).problems


def test_removals_are_compared_in_one_table(made, token_file, tmp_path, monkeypatch):
    from lowmem_wanda import compare_shrink, evaluate
    from lowmem_wanda.shrinking import walk

    way = {
        "text": [token_file],
        "calibration": [token_file],
        "sequences": 22,
        "length": 16,
        "batch": 4,
        "device": "cpu",
    }
    walked = []
    through = walk.ShrinkWalk.through
    monkeypatch.setattr(walk.ShrinkWalk, "through", lambda self, *given: (walked.append(1), through(self, *given)))
    scores, shares = ["reap", "squares", "aimer"], ["25%", "4"]
    report = compare_shrink(made("qwen3_moe"), tmp_path / "out", drop_experts=shares, scores=scores, refit=True, **way)
    names = [row["name"] for row in report["rows"]]
    assert len(names) == len(set(names)) == 10 and names[:2] == ["reap -25%", "reap + refit -25%"]
    assert len(walked) == 1 + 4  # one that is recorded, and each refit
    row = report["rows"][names.index("squares + refit -4")]
    given = {key: way[key] for key in ("sequences", "length", "batch", "device")}
    shrink(
        made("qwen3_moe"), tmp_path / "alone", drop_experts=4, score="squares", refit=True, text=[token_file], **given
    )
    alone = evaluate(tmp_path / "alone", text=[token_file], against=made("qwen3_moe"), length=16, batch=4, device="cpu")
    assert row["kl_mean"] == alone["kl_mean"] and row["perplexity"] == alone["perplexity"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    before = (tmp_path / "out/report.json").read_bytes()
    compare_shrink(made("qwen3_moe"), tmp_path / "out", drop_experts=shares, scores=scores, refit=True, **way)
    assert (tmp_path / "out/report.json").read_bytes() == before and len(walked) == 6
    with pytest.raises(PatternError, match="--scores best"):
        compare_shrink(made("qwen3_moe"), tmp_path / "no", scores=["best"], **way)


def logits_of(path: Path, tokens):
    model, _ = loaded(path)
    model.config.output_router_logits = False
    return torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in tokens.split(30)])
