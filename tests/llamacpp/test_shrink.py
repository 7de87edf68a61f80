"""Experts removed from a GGUF: the slices of every family, the choice, every refusal, and nothing left half done."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import moe_ggufs
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from helpers import ROOT
from moe_ggufs import fields_of, is_cut, kept_of, tensors_of

from lowmem_wanda import check_gguf, outline
from lowmem_wanda import shrink_gguf as shrink
from lowmem_wanda.checkpoint import output, writer
from lowmem_wanda.errors import (
    CalibrationError,
    CheckpointError,
    LowmemError,
    ModelError,
    OutputError,
    PatternError,
)
from lowmem_wanda.llamacpp import score_processes
from lowmem_wanda.llamacpp.expert_layers import routing_facts
from lowmem_wanda.llamacpp.imatrix import About, Entry, read
from lowmem_wanda.llamacpp.imatrix import write as write_entries

COUNT = 16


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("architecture", moe_ggufs.FAMILIES)
def test_kept_experts_are_the_sources_slices_and_all_else_is_the_source(made, tmp_path, architecture):
    model, matrix = made(architecture)
    small = tmp_path / "small.gguf"
    report = shrink(model, small, "25%", scores_from=matrix)
    kept, before, after = kept_of(report), tensors_of(model), tensors_of(small)
    assert list(after) == list(before) and report["experts"]["kept"] == 12
    for name, tensor in before.items():
        ids = kept[int(name.split(".")[1])] if is_cut(name) else slice(None)
        assert after[name].data.tobytes() == tensor.data[ids].tobytes(), name
        assert after[name].tensor_type == tensor.tensor_type
    said, was = fields_of(small), fields_of(model)
    note = said.pop("general.description")
    assert "kept 12 of 16 experts" in note and "ean from imatrix.gguf" in note
    assert said == {**was, f"{architecture}.expert_count": 12}
    assert sum(is_cut(name) for name in before) > 0 and small.stat().st_size == report["bytes"]["after"]
    findings = check_gguf(small, model)
    assert not findings.problems and findings.kept == kept and findings.report_verified


def reference(model, matrix, keep):
    """The rule in plain numpy: count x sqrt(sum_i E[h_i^2] |W_down[:, i]|^2)."""
    stored, entries, kept = tensors_of(model), tensors_of(matrix), {}
    for name, tensor in stored.items():
        if "ffn_down_exps.weight" in name and name + ".in_sum2" in entries:
            weight = np.stack([gguf.dequantize(one, tensor.tensor_type) for one in tensor.data]).astype(np.float64)
            sums, counts = (np.array(entries[name + end].data, np.float64) for end in (".in_sum2", ".counts"))
            scores = counts[:, 0] * np.sqrt((sums / counts * np.square(weight).sum(1)).sum(1))
            kept[int(name.split(".")[1])] = np.sort(np.argsort(-scores, kind="stable")[:keep]).tolist()
    return kept


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q5_1, Q.Q8_0, Q.MXFP4])
def test_scores_are_counts_times_norms(tmp_path, kind):
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", COUNT, kind)
    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model)
    report = shrink(model, tmp_path / "small.gguf", keep_experts=6, scores_from=matrix)
    assert kept_of(report) == reference(model, matrix, 6)


def test_k_quants_are_cut_and_scored(tmp_path, monkeypatch):
    """The gguf package cannot quantize to them, so their bytes are random with ordinary scales."""

    def random_q4_k(weight, kind):
        blocks = np.random.default_rng(0).integers(0, 256, (weight.size // 256, 144), np.uint8)
        blocks[:, :4] = np.float16([0.001, 0.002]).view(np.uint8)
        return blocks.reshape(*weight.shape[:-1], -1)

    monkeypatch.setattr(moe_ggufs.gguf, "quantize", random_q4_k)
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", 8, Q.Q4_K, width=256, inner=256)
    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model)
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    assert kept_of(report) == reference(model, matrix, 4) and not check_gguf(tmp_path / "small.gguf", model).problems


def test_other_scores(made, tmp_path):
    model, matrix = made("qwen3moe")
    counts = {block: tensors_of(matrix)[f"blk.{block}.ffn_down_exps.weight.counts"].data.ravel() for block in (0, 1)}
    by_count = shrink(model, tmp_path / "a.gguf", "50%", scores_from=matrix, score="frequency")
    assert kept_of(by_count) == {
        block: sorted(np.argsort(-seen, kind="stable")[:8].tolist()) for block, seen in counts.items()
    }
    assert any("counts alone" in warning for warning in by_count["warnings"])
    first, again, other = (
        shrink(model, tmp_path / f"r{place}.gguf", "50%", score="random", seed=seed)
        for place, seed in enumerate((1, 1, 2))
    )
    assert kept_of(first) == kept_of(again) != kept_of(other) and first["tokens"] is None
    aimer = shrink(model, tmp_path / "b.gguf", "50%", score="aimer")
    stored = tensors_of(model)
    for block, kept in kept_of(aimer).items():
        flat = [
            np.concatenate([
                gguf.dequantize(stored[f"blk.{block}.ffn_{part}_exps.weight"].data[expert], Q.Q8_0).ravel()
                for part in ("gate", "up", "down")
            ])
            for expert in range(COUNT)
        ]  # fmt: skip
        ratio = [np.abs(one).mean() / np.sqrt(np.square(one).mean()) for one in flat]
        assert kept == sorted(np.argsort(ratio)[:8].tolist())


def test_scales_of_experts_count(tmp_path):
    """Of NVFP4, and Gemma 4: each expert's weights are multiplied by a number of its own."""
    scale = "blk.0.ffn_down_exps.scale"
    model = moe_ggufs.write(tmp_path / "model.gguf", "llama", 4, layers=1, used=1, more=[(scale, (4,))])
    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model)
    plain = moe_ggufs.write(tmp_path / "plain.gguf", "llama", 4, layers=1, used=1)
    scored, unscaled = (
        shrink(path, tmp_path / f"{path.stem}-s.gguf", 1, scores_from=matrix) for path in (model, plain)
    )
    factors = np.abs(tensors_of(model)[scale].data)
    assert scored["layers"][0]["scores"] == pytest.approx(factors * unscaled["layers"][0]["scores"], rel=1e-5)
    small = tensors_of(tmp_path / "model-s.gguf")
    assert small[scale].data.tolist() == tensors_of(model)[scale].data[kept_of(scored)[0]].tolist()


def test_several_processes_score_as_one_does(made, tmp_path, monkeypatch):
    model, matrix = made("qwen3moe")
    alone = shrink(model, tmp_path / "a.gguf", "50%", scores_from=matrix)
    monkeypatch.setattr(score_processes, "WORTH", 0)
    monkeypatch.setattr(score_processes.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    together = shrink(model, tmp_path / "b.gguf", "50%", scores_from=matrix)
    assert together["layers"] == alone["layers"]


def test_an_error_of_a_scoring_process_is_shown(tmp_path, monkeypatch):
    model = moe_ggufs.write(tmp_path / "model.gguf", "llama", COUNT)
    data = bytearray(model.read_bytes())
    tensor = tensors_of(model)["blk.1.ffn_down_exps.weight"]
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32(np.nan).tobytes()
    model.write_bytes(data)
    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model)
    for worth in (1 << 30, 0):
        monkeypatch.setattr(score_processes, "WORTH", worth)
        with pytest.raises(ModelError, match="blk.1.ffn_down_exps.weight: expert 0 holds NaN or infinity"):
            shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    assert names(tmp_path) == ["imatrix.gguf", "model.gguf"]


def test_each_group_keeps_as_many_experts(made, tmp_path):
    model, matrix = made("deepseek2")
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    for kept in kept_of(report).values():
        assert np.bincount(np.array(kept) // 4).tolist() == [2, 2, 2, 2]


def test_a_layer_for_further_tokens_is_cut_alike_by_its_weights(made, tmp_path):
    model, matrix = made("glm4moe")
    report = shrink(model, tmp_path / "small.gguf", "25%", scores_from=matrix)
    assert [layer["by"] for layer in report["layers"]] == ["ean", "aimer"]
    assert any("layer 2 predicts further tokens" in warning for warning in report["warnings"])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"1": list(range(12))}))
    planned = shrink(model, tmp_path / "planned.gguf", plan=plan)
    assert kept_of(planned)[1] == list(range(12)) and kept_of(planned)[2] == kept_of(report)[2]


def test_a_width_that_equals_the_number_of_experts_is_no_stack(tmp_path):
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", 64, inner=64, used=4)  # as wide as it has experts
    shrink(model, tmp_path / "small.gguf", "50%", score="random")
    before, after = tensors_of(model), tensors_of(tmp_path / "small.gguf")
    assert before["blk.0.attn_q.weight"].data.shape == after["blk.0.attn_q.weight"].data.shape == (64, 64)
    assert after["blk.0.ffn_norm.weight"].data.shape == (64,) and after["blk.0.ffn_gate_inp.weight"].data.shape == (
        32,
        64,
    )


def test_a_cut_of_a_cut_is_the_cut(made, tmp_path):
    model, matrix = made("qwen3moe")
    at_once = tmp_path / "once.gguf"
    shrink(model, at_once, keep_experts=8, scores_from=matrix, imatrix_out=tmp_path / "once.imatrix.gguf")
    shrink(model, tmp_path / "a.gguf", keep_experts=12, scores_from=matrix, imatrix_out=tmp_path / "a.imatrix.gguf")
    shrink(tmp_path / "a.gguf", tmp_path / "b.gguf", keep_experts=8, scores_from=tmp_path / "a.imatrix.gguf",
           imatrix_out=tmp_path / "b.imatrix.gguf")  # fmt: skip
    one, two = tensors_of(at_once), tensors_of(tmp_path / "b.gguf")
    assert all(one[name].data.tobytes() == two[name].data.tobytes() for name in one)
    assert (tmp_path / "once.imatrix.gguf").read_bytes() == (tmp_path / "b.imatrix.gguf").read_bytes()
    assert not check_gguf(tmp_path / "b.gguf", model).problems
    assert fields_of(tmp_path / "b.gguf")["general.description"].count("lowmem-wanda") == 2


def test_the_importance_matrix_is_cut_alike(made, tmp_path):
    model, matrix = made("gpt-oss")
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix, imatrix_out=tmp_path / "out.gguf")
    before, about = read(matrix)
    after, same = read(tmp_path / "out.gguf")
    assert list(after) == list(before) and same == about
    for name, entry in before.items():
        ids = kept_of(report)[int(name.split(".")[1])] if "_exps" in name else slice(None)
        assert np.array_equal(after[name].sums, entry.sums[ids]) and np.array_equal(
            after[name].counts, entry.counts[ids]
        )


def test_a_plan_that_was_written_gives_the_same_file(made, tmp_path):
    model, matrix = made("qwen3moe")
    report = shrink(model, tmp_path / "a.gguf", "25%", scores_from=matrix, write_plan=tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan == {str(block): kept for block, kept in kept_of(report).items()}
    planned = shrink(model, tmp_path / "b.gguf", "25%", plan=tmp_path / "plan.json")
    one, two = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "b.gguf")
    assert all(one[name].data.tobytes() == two[name].data.tobytes() for name in one)
    assert planned["how"] == "plan plan.json" and planned["layers"][0]["scores"] is None


def test_split_files_in_and_out(made, tmp_path):
    whole, matrix = made("qwen3moe")
    moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", COUNT, Q.Q8_0, split=9)
    first = min(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    small = tmp_path / "out/small.gguf"
    report = shrink(first, small, "50%", scores_from=matrix, split_size=80_000)
    parts = [tmp_path / "out" / file["name"] for file in report["files"]]
    assert parts == sorted((tmp_path / "out").glob("small-0*.gguf")) and len(parts) > 2
    assert all(part.stat().st_size <= 80_000 for part in parts)
    assert [fields_of(part)["split.no"] for part in parts] == list(range(len(parts)))
    held = {name: tensor for part in parts for name, tensor in tensors_of(part).items()}
    assert fields_of(parts[0])["split.tensors.count"] == len(held) and fields_of(parts[1])["split.count"] == len(parts)
    shrink(whole, tmp_path / "one.gguf", "50%", scores_from=matrix)
    one = tensors_of(tmp_path / "one.gguf")
    assert all(one[name].data.tobytes() == held[name].data.tobytes() for name in one)
    findings = check_gguf(parts[0], first)
    assert not findings.problems and findings.report_verified
    joined = shrink(first, tmp_path / "joined.gguf", "50%", scores_from=matrix, split_size=10**9)
    assert [file["name"] for file in joined["files"]] == ["joined.gguf"] and "split.count" not in fields_of(
        tmp_path / "joined.gguf"
    )
    with pytest.raises(OutputError, match="give at least that"):
        shrink(first, tmp_path / "tiny.gguf", "50%", scores_from=matrix, split_size=10_000)


@pytest.mark.parametrize("alignment", [32, 4096, 65536])
def test_the_least_size_of_files_is_the_one_that_is_said(tmp_path, alignment):
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", 8, values={"general.alignment": alignment})
    with pytest.raises(OutputError, match="give at least that") as refused:
        shrink(model, tmp_path / "small.gguf", "50%", score="random", split_size=1000)
    least = int(str(refused.value).split(" takes ")[1].split()[0])
    with pytest.raises(OutputError, match=f"takes {least} bytes"):
        shrink(model, tmp_path / "small.gguf", "50%", score="random", split_size=least - 1)
    report = shrink(model, tmp_path / "small.gguf", "50%", score="random", split_size=least)
    assert max(file["nbytes"] for file in report["files"]) == least


def test_parts_that_are_there_are_not_replaced(made, tmp_path):
    model, matrix = made("qwen3moe")
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix, split_size=80_000)
    (tmp_path / "small.gguf.report.json").rename(tmp_path / "kept")
    for file in report["files"][:-1]:
        (tmp_path / file["name"]).unlink()
    last = tmp_path / report["files"][-1]["name"]
    before = last.read_bytes()
    with pytest.raises(OutputError, match=f"{last.name}: exists"):
        shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix, split_size=80_000)
    assert names(tmp_path) == sorted(["kept", last.name]) and last.read_bytes() == before
    last.unlink()
    last.mkdir()
    with pytest.raises(OutputError, match=f"{last.name}: exists"):
        shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix, split_size=80_000)


def test_alignment_of_the_source_is_kept(tmp_path):
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", 8, values={"general.alignment": 64})
    report = shrink(model, tmp_path / "small.gguf", "50%", score="random", split_size=100_000)
    for file in report["files"]:
        reader = gguf.GGUFReader(tmp_path / file["name"])
        assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)
    assert not check_gguf(tmp_path / report["files"][0]["name"], model).problems


BAD_MODELS = {
    "no experts": ({"count": 8, "skip": None}, "has no experts"),
    "strings for numbers": ({"values": {"qwen3moe.expert_used_count": ["a", "b"]}}, "a number for each layer"),
    "a number for each layer": ({"values": {"qwen3moe.expert_count": [8, 8]}}, "a number for each layer"),
    "numbers for very many layers": ({"values": {"qwen3moe.expert_count": [8] * 20_000}}, "a number for each layer"),
    "no number": ({"expert_count": None}, "expert_count says none"),
    "none at work": ({"expert_used_count": None}, "expert_used_count says that 0 of 8"),
    "more at work than there are": ({"used": 9}, "expert_used_count says that 9 of 8"),
    "layers that differ": (
        {"reshape": {"blk.1.ffn_up_exps.weight": (6, 32, 64)}},
        "is for 6 experts where the file says 8",
    ),
    "a router that differs": ({"reshape": {"blk.1.ffn_gate_inp.weight": (10, 64)}}, "is for 10 experts"),
    "another number": ({"expert_count": 16}, "is for 8 experts where the file says 16"),
    "hash routing": ({"more": [("blk.0.ffn_gate_tid2eid.weight", (96, 2))]}, "hash routing"),
    "whole numbers": ({"more": [("blk.0.attn_ids.weight", (96, 2))]}, "holds whole numbers"),
    "a known tensor that may be for experts": (
        {"more": [("blk.0.altup_router.weight", (8, 64))]},
        "it is not known whether",
    ),
    "chunks of experts": ({"more": [("blk.0.ffn_up_chexps.weight", (4, 16, 64))]}, "others share in groups"),
    "an unknown tensor": ({"more": [("blk.0.ffn_new_exps_thing.weight", (8, 64))]}, "pip install --upgrade gguf"),
    "no router": ({"skip": ["blk.0.ffn_gate_inp.weight"]}, "has experts but no ffn_gate_inp.weight"),
    "experts elsewhere": ({"more": [("dec.blk.0.ffn_up_exps.weight", (8, 32, 64))]}, "in a place that is not known"),
    "the old layout": ({"more": [("blk.0.ffn_up.3.weight", (32, 64))]}, "a tensor for each expert"),
    "groups that are unequal": ({"expert_group_count": 3}, "do not lie in 3 equal groups"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_MODELS.values(), ids=list(BAD_MODELS))
def test_models_that_are_not_understood_are_refused(tmp_path, changes, message):
    changes = dict(changes)
    if changes.get("skip", ()) is None:
        changes["skip"] = [name for name, _ in moe_ggufs.qwen3moe(8, 64, 32, 2) if is_cut(name)]
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", **{"count": 8, **changes})
    for work in (lambda: shrink(model, tmp_path / "small.gguf", "50%", score="aimer"), lambda: outline(model)):
        with pytest.raises(ModelError, match=message):
            work()
    assert names(tmp_path) == ["model.gguf"]


BAD_NUMBERS = {
    "fewer than are used": ("qwen3moe", {"keep_experts": 1}, "the router chooses 2"),
    "none left": ("qwen3moe", {"drop_experts": 16}, "none would be kept"),
    "more than there are": ("qwen3moe", {"keep_experts": 17}, "none is removed"),
    "no number": ("qwen3moe", {}, "one of both"),
    "unequal groups": ("deepseek2", {"keep_experts": 10}, "in 4 groups, .* --keep-experts 8 or 12"),
    "unequal groups by share": ("deepseek2", {"drop_experts": "37.5%"}, "--keep-experts 8 or 12"),
    "groups of one": ("deepseek2", {"keep_experts": 4}, "at least 2 each"),
}


@pytest.mark.parametrize(("architecture", "number", "message"), BAD_NUMBERS.values(), ids=list(BAD_NUMBERS))
def test_numbers_that_do_not_work_are_refused(made, tmp_path, architecture, number, message):
    with pytest.raises(PatternError, match=message):
        shrink(made(architecture)[0], tmp_path / "small.gguf", **number, score="aimer")
    assert names(tmp_path) == []


BAD_FLAGS = {
    "no choice": ({}, "say which experts are kept"),
    "a score without its matrix": ({"score": "ean"}, "needs an importance matrix"),
    "counts without a matrix": ({"score": "frequency"}, "needs an importance matrix"),
    "an unknown score": ({"score": "best"}, "one of ean, frequency, aimer, random"),
    "a plan and a score": ({"plan": "plan.json", "score": "aimer"}, "leave one out"),
    "a seed without effect": ({"score": "aimer", "seed": 3}, "no effect without --score random"),
    "a seed beside a plan": ({"plan": "plan.json", "seed": 0}, "no effect without --score random"),
    "a seed below 0": ({"score": "random", "seed": -1}, "seed -1: give 0"),
    "a matrix out of none": ({"score": "aimer", "imatrix_out": "out.gguf"}, "--imatrix-out needs"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=list(BAD_FLAGS))
def test_flags_that_do_not_go_together_are_refused(made, tmp_path, flags, message):
    with pytest.raises(PatternError, match=message):
        shrink(made("qwen3moe")[0], tmp_path / "small.gguf", "50%", **flags)


BAD_PLANS = {
    "not JSON": ("{", "is not JSON"),
    "a layer twice": ('{"0": [0, 1], "0": [0, 2], "1": [0, 1]}', "'0' stands in it twice"),
    "another form": ({"a": 1}, "no ids of experts"),
    "layers that differ": ({"0": [0, 1, 2], "1": [0, 1]}, "keeps 3 experts in layer 0 and 2 in layer 1"),
    "a layer is missing": ({"0": [0, 1, 2]}, "says nothing of layer 1"),
    "another layer": ({"0": [0, 1], "1": [0, 1], "2": [0, 1]}, "it names layer 2, which has no experts"),
    "another number": ({"0": [0, 1, 2], "1": [0, 1, 2]}, "keeps 3 of 16 experts, the flags say otherwise"),
}


@pytest.mark.parametrize(("plan", "message"), BAD_PLANS.values(), ids=list(BAD_PLANS))
def test_plans_that_do_not_fit_are_refused(made, tmp_path, plan, message):
    file = tmp_path / "plan.json"
    file.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    with pytest.raises(PatternError, match=f"plan.json: {message}"):
        shrink(made("qwen3moe")[0], tmp_path / "small.gguf", "50%", plan=file)


def test_a_plan_must_keep_groups_equal(made, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"1": list(range(8)), "2": [0, 1, 4, 5, 8, 9, 12, 13]}))
    with pytest.raises(PatternError, match="layer 1 does not keep as many experts in each of its 4 groups"):
        shrink(made("deepseek2")[0], tmp_path / "small.gguf", plan=file)


DOWN = "blk.1.ffn_down_exps.weight"


def spoiled(value, where):
    def change(name, sums, counts):
        if name == DOWN:
            (sums if where == "sums" else counts)[3] = value
        return sums, counts

    return change


def one_count(name, sums, counts):
    return (sums.reshape(1, -1), counts[:1]) if "_exps" in name else (sums, counts)


def same_counts(name, sums, counts):
    return sums, np.full_like(counts, 7)


def no_tokens(name, sums, counts):
    return sums * 0, counts * 0


BAD_MATRICES = {
    "NaN": ({"change": spoiled(np.nan, "sums")}, f"{DOWN} holds numbers for expert 3"),
    "a negative sum": ({"change": spoiled(-1, "sums")}, f"{DOWN} holds numbers for expert 3"),
    "a negative count": ({"change": spoiled(-1, "counts")}, f"{DOWN} holds numbers for expert 3"),
    "an infinite sum": ({"change": spoiled(np.inf, "sums")}, f"{DOWN} holds numbers for expert 3"),
    "a missing entry": ({"skip": [DOWN]}, f"has no entry {DOWN}"),
    "one count for all": (
        {"change": one_count},
        "one count of tokens for all 16 experts, as a file that was converted",
    ),
    "the same count": (
        {"change": same_counts},
        "the same count of 7 tokens for every expert, as a file that was converted",
    ),
    "no token": ({"change": no_tokens}, "measured on no token"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_MATRICES.values(), ids=list(BAD_MATRICES))
@pytest.mark.parametrize("score", ["ean", "frequency"])
def test_importance_matrices_that_cannot_tell_are_refused(made, tmp_path, changes, message, score):
    model = made("qwen3moe")[0]
    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model, **changes)
    with pytest.raises(CalibrationError, match=f"imatrix.gguf: .*{message}"):
        shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix, score=score)


def test_importance_matrices_of_other_models_are_refused(made, tmp_path):
    model = made("qwen3moe")[0]
    others = {
        "deeper": {"layers": 3}, "wider": {"inner": 64}, "of fewer experts": {"count": 8},
    }  # fmt: skip
    for name, changes in others.items():
        other = moe_ggufs.write(tmp_path / f"{name}.gguf", "qwen3moe", **{"count": COUNT, **changes})
        matrix = moe_ggufs.write_imatrix(tmp_path / f"{name}-imatrix.gguf", other)
        with pytest.raises(CalibrationError, match="of this very model"):
            shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    with pytest.raises(CheckpointError, match="is not an importance matrix"):
        shrink(model, tmp_path / "small.gguf", "50%", scores_from=model)


def test_the_older_format_is_refused(made, tmp_path):
    model, matrix = made("qwen3moe")
    entries = {name: Entry(entry.sums.reshape(1, -1), entry.counts[:1]) for name, entry in read(matrix)[0].items()}
    shapes = {name: (1, entry.sums.size) for name, entry in entries.items()}
    write_entries(tmp_path / "old.dat", shapes, entries.items(), About(("a",), 1, 512))
    with pytest.raises(CalibrationError, match="older format, which does not hold how many tokens each expert saw"):
        shrink(model, tmp_path / "small.gguf", "50%", scores_from=tmp_path / "old.dat")


def test_what_was_measured_on_little_is_said(made, tmp_path):
    model = made("qwen3moe")[0]

    def few(name, sums, counts):
        return sums, np.arange(len(counts), dtype=np.float32)

    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model, change=few)
    report = shrink(model, tmp_path / "small.gguf", "25%", scores_from=matrix)
    assert (
        "7.5 tokens of an expert in the median" in report["warnings"][0]
        and "2 of 32 experts saw no token" in report["warnings"][1]
    )
    assert report["tokens"]["unseen"] == 2 and all(0 not in kept for kept in kept_of(report).values())
    lost = sum(seen for seen in range(16) if seen not in report["layers"][0]["kept"]) / sum(range(16))
    assert report["layers"][0]["tokens_lost"] == pytest.approx(lost)


def test_the_layer_that_loses_most_is_named(made, tmp_path):
    model, matrix = made("qwen3moe")
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    lost = {layer["layer"]: layer["tokens_lost"] for layer in report["layers"]}
    assert len(set(lost.values())) == 2
    assert report["tokens"]["lost_most"] == max(lost.values()) == lost[report["tokens"]["lost_most_in"]]
    assert report["tokens"]["lost_mean"] == pytest.approx(np.mean(list(lost.values())))


@pytest.mark.parametrize("score", ["aimer", "random"])
def test_a_matrix_beside_another_score_only_tells_what_is_lost(made, tmp_path, score):
    model = made("qwen3moe")[0]
    matrix = moe_ggufs.write_imatrix(
        tmp_path / "imatrix.gguf",
        model,
        change=lambda name, sums, counts: (sums, np.arange(1, len(counts) + 1, dtype=np.float32)),
    )
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix, score=score)
    assert report["how"] == score and report["tokens"]["median"] == 8.5
    assert not any("tokens" in warning for warning in report["warnings"])
    assert f"chosen by {score};" in fields_of(tmp_path / "small.gguf")["general.description"]


def test_numbers_of_tokens_that_are_none_are_refused(made, tmp_path):
    model = made("qwen3moe")[0]
    for place, value in enumerate((np.nan, np.inf, 1e33)):
        matrix = moe_ggufs.write_imatrix(tmp_path / f"{place}.gguf", model, change=spoiled(value, "counts"))
        with pytest.raises(CheckpointError, match=f"{DOWN}.counts holds what is no number of tokens"):
            shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)


def test_an_importance_matrix_is_looked_through_before_it_is_cut(made, tmp_path):
    model = made("qwen3moe")[0]
    gate, attention = "blk.0.ffn_gate_exps.weight", "blk.0.attn_q.weight"

    def spoil(name, sums, counts):
        return (sums * np.nan if name == wrong else sums), counts

    for wrong in (gate, attention):
        matrix = moe_ggufs.write_imatrix(tmp_path / "bad.gguf", model, change=spoil)
        with pytest.raises(CalibrationError, match=f"bad.gguf: {wrong}.in_sum2 holds NaN"):
            shrink(model, tmp_path / "s.gguf", "50%", scores_from=matrix, imatrix_out=tmp_path / "out.gguf")
        assert names(tmp_path) == ["bad.gguf"]
        shrink(model, tmp_path / "s.gguf", "50%", scores_from=matrix)
        for file in tmp_path.iterdir():
            file.unlink()
    matrix = moe_ggufs.write_imatrix(tmp_path / "imatrix.gguf", model, skip=[gate])
    report = shrink(model, tmp_path / "s.gguf", "50%", scores_from=matrix, imatrix_out=tmp_path / "out.gguf")
    assert f"no entry of 1 expert weights, such as {gate}" in report["warnings"][-1]


def test_room_is_looked_for_wherever_a_file_goes(made, tmp_path, monkeypatch):
    model, matrix = made("qwen3moe")
    (tmp_path / "full").mkdir()
    usage = output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        output.shutil, "disk_usage", lambda path: usage._replace(free=5000) if Path(path).name == "full" else usage
    )
    with pytest.raises(
        OutputError, match=r"full: needs 0\.\d\d MB but 0.01 MB are free there|full: needs .* MB but 0.00 MB"
    ):
        shrink(model, tmp_path / "s.gguf", "50%", scores_from=matrix, imatrix_out=tmp_path / "full/out.gguf")
    assert names(tmp_path) == ["full"] and not list((tmp_path / "full").iterdir())


def test_a_type_that_cannot_be_read_needs_a_plan_of_that_layer(made, tmp_path, monkeypatch):
    model, matrix = made("glm4moe")

    def unknown(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", unknown)
    with pytest.raises(
        ModelError, match="blk.2.ffn_gate_exps.weight: is Q8_0, .* give a --plan that says what this layer"
    ):
        shrink(model, tmp_path / "s.gguf", "50%", scores_from=matrix, score="frequency")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"1": list(range(8)), "2": list(range(8))}))
    shrink(model, tmp_path / "s.gguf", plan=plan)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_names_of_files_may_hold_any_byte(made, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    source, matrix = (folder / os.fsdecode(b"\xfe" + name) for name in (b"m.gguf", b"i.gguf"))
    for file, made_one in zip((source, matrix), made("qwen3moe"), strict=True):
        file.write_bytes(made_one.read_bytes())
    report = shrink(source, folder / "small.gguf", "50%", scores_from=matrix)
    assert json.loads((folder / "small.gguf.report.json").read_bytes())["source"] == str(source)
    assert "\\udcfei.gguf" in fields_of(folder / "small.gguf")["general.description"]
    assert not check_gguf(report["target"], source).problems


def test_processes_that_score_import_nothing_from_the_users_folder(made, tmp_path, monkeypatch):
    model, matrix = made("qwen3moe")
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported from here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score_processes, "WORTH", 0)
    monkeypatch.setattr(score_processes.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    shrink(model, "small.gguf", "50%", scores_from=matrix)
    assert not check_gguf("small.gguf", model).problems


def test_a_scale_that_is_not_f32_is_refused(tmp_path):
    scale = "blk.0.ffn_down_exps.scale"
    model = moe_ggufs.write(tmp_path / "model.gguf", "llama", 4, layers=1, used=1, more=[(scale, (4,))])
    data = bytearray(model.read_bytes())
    kind = data.index(scale.encode()) + len(scale) + 4 + 8  # after the number of dimensions and the one dimension
    data[kind : kind + 4] = int(Q.F16).to_bytes(4, "little")
    short = tensors_of(model)[scale].data_offset + 8
    model.write_bytes(data[:short] + bytes(24))
    with pytest.raises(ModelError, match=f"{scale}: is F16, where a scale is F32"):
        shrink(model, tmp_path / "small.gguf", 1, score="aimer")


def test_targets_that_must_not_be_written_are_refused(made, tmp_path):
    source, matrix = made("qwen3moe")
    model = tmp_path / "model.gguf"
    model.write_bytes(source.read_bytes())
    (tmp_path / "held.gguf").write_bytes(b"mine")
    (tmp_path / "told.gguf.report.json").write_bytes(b"mine")
    os.link(model, tmp_path / "link.gguf")
    cases = [
        ({"target": model}, "is the source"), ({"target": tmp_path / "link.gguf"}, "is the source"),
        ({"target": tmp_path / "held.gguf"}, "exists, and is not replaced"), ({"target": tmp_path / "small"}, "ends in .gguf"),
        ({"target": tmp_path / "none/small.gguf"}, "no such directory"),
        ({"imatrix_out": tmp_path / "out.dat"}, "ends in .gguf"), ({"imatrix_out": tmp_path / "held.gguf"}, "exists"),
        ({"target": tmp_path / "told.gguf"}, "told.gguf.report.json: exists"),
        ({"write_plan": tmp_path / "small.gguf"}, "two of the files"), ({"write_plan": tmp_path / "held.gguf"}, "exists"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(OutputError, match=message):
            shrink(model, **{"target": tmp_path / "small.gguf", **changes}, drop_experts="50%", scores_from=matrix)
    assert (
        names(tmp_path) == ["held.gguf", "link.gguf", "model.gguf", "told.gguf.report.json"]
        and (tmp_path / "held.gguf").read_bytes() == b"mine"
    )


def everything(model, matrix, folder, **more):
    """A cut that writes all it can: two parts or more, a matrix, a plan."""
    return shrink(model, folder / "small.gguf", "50%", scores_from=matrix, imatrix_out=folder / "out.gguf",
                  write_plan=folder / "plan.json", split_size=80_000, **more)  # fmt: skip


def test_a_full_disk_is_found_before_and_leaves_nothing(made, tmp_path, monkeypatch):
    model, matrix = made("qwen3moe")
    free = output.shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patched, pytest.raises(OutputError, match="are free there"):
        patched.setattr(output.shutil, "disk_usage", lambda _: free)
        everything(model, matrix, tmp_path)
    assert names(tmp_path) == []
    write, calls = os.write, [12]

    def full(handle, data):
        calls[0] -= 1
        if calls[0] < 0:
            raise OSError(errno.ENOSPC, "full")
        return write(handle, data)

    monkeypatch.setattr(writer.os, "write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        everything(model, matrix, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_ctrl_c_leaves_nothing_wherever_it_comes(made, tmp_path, monkeypatch, function):
    model, matrix = made("qwen3moe")
    original = getattr(os, function)
    for at in range(0, 6 if function == "replace" else 12, 1):
        left = [at]

        def stopped(*args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patched:
            patched.setattr(writer.os, function, stopped)
            try:
                everything(model, matrix, tmp_path)
            except KeyboardInterrupt:
                assert names(tmp_path) == [], at
            else:
                for file in tmp_path.iterdir():
                    file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_kill_leaves_nothing_that_looks_finished(made, tmp_path):
    model, matrix = made("qwen3moe")
    program = """
import os, signal, sys
from lowmem_wanda import shrink_gguf as shrink
from lowmem_wanda.checkpoint import writer
left, write = [int(sys.argv[4])], os.write
def dying(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)
writer.os.write = dying
shrink(sys.argv[1], sys.argv[3], "50%", scores_from=sys.argv[2])
"""
    for calls in (0, 1, 5):
        done = subprocess.run(
            [sys.executable, "-c", program, model, matrix, tmp_path / "small.gguf", str(calls)], cwd=ROOT
        )
        assert done.returncode == -signal.SIGKILL
        assert all(name.startswith(".") and name.endswith(".partial") for name in names(tmp_path))
    report = shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    assert (
        names(tmp_path) == ["small.gguf", "small.gguf.report.json"] and not check_gguf(report["target"], model).problems
    )


def test_outline_says_what_is_in_it_and_what_cuts_take(made, tmp_path):
    model, matrix = made("glm4moe")
    facts = outline(model)
    assert (facts["architecture"], facts["blocks"], facts["layers"], facts["predicting"]) == ("glm4moe", 3, 2, 1)
    assert (facts["experts"], facts["used"], facts["shared"], facts["groups"]) == (16, 2, 1, 1)
    assert facts["expert_bytes"] == sum(one.n_bytes for name, one in tensors_of(model).items() if is_cut(name))
    assert [cut["kept"] for cut in facts["cuts"]] == [14, 12, 10, 8]
    report = shrink(model, tmp_path / "small.gguf", "25%", scores_from=matrix)
    assert abs(facts["cuts"][1]["bytes"] - report["bytes"]["after"]) < 300  # but for the note in its description
    grouped = outline(made("deepseek2")[0])["cuts"]
    assert grouped[1]["bytes"] and "in 4 groups" in grouped[0]["refused"] and "in 4 groups" in grouped[2]["refused"]


def test_what_a_number_of_experts_means_for_programs(made, tmp_path):
    model, matrix = made("qwen3moe")
    eight, twelve = (
        shrink(model, tmp_path / f"{keep}.gguf", keep_experts=keep, scores_from=matrix) for keep in (8, 12)
    )
    assert eight["routing"] == {"power_of_two": True, "fused_cuda_routing": True, "multiple_of_8": True}
    assert twelve["routing"] == {"power_of_two": False, "fused_cuda_routing": False, "multiple_of_8": False}
    assert "12 is not a power of two: llama.cpp's fused CUDA routing does not run" in twelve["routing_text"]
    fused = [number for number in range(1, 2049) if routing_facts(number)["fused_cuda_routing"]]
    assert fused == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 576]


def test_headers_changed_at_random_give_a_model_or_a_sentence(tmp_path):
    """Every error is one of ours, and a file that is written is whole."""
    model = moe_ggufs.write(tmp_path / "model.gguf", "deepseek2", 8, layers=2, used=1)
    data, random = model.read_bytes(), np.random.default_rng(0)
    head = len(data) - sum(tensor.n_bytes for tensor in tensors_of(model).values())
    bad, small, refused = tmp_path / "bad.gguf", tmp_path / "small.gguf", 0
    for _ in range(300):
        changed = bytearray(data)
        for place in random.integers(4, head, random.integers(1, 4)):
            changed[place] = random.integers(256)
        bad.write_bytes(changed)
        try:
            outline(bad)
            report = shrink(bad, small, keep_experts=4, score="aimer", split_size=200_000)
            assert not check_gguf(report["target"], bad).problems
        except LowmemError:
            refused += 1
        assert not list(tmp_path.glob(".*"))
        for file in tmp_path.glob("small*"):
            file.unlink()
    assert refused > 100


ODD = {
    "a string": ("eight", "expert_count is not one whole number"),
    "a share": (0.5, "expert_count is not one whole number"),
    "true": (True, "expert_count is not one whole number"),
}


@pytest.mark.parametrize(("value", "message"), ODD.values(), ids=list(ODD))
def test_metadata_of_another_type_is_refused(tmp_path, value, message):
    model = moe_ggufs.write(tmp_path / "model.gguf", "qwen3moe", 8, expert_count=value)
    with pytest.raises(CheckpointError, match=message):
        shrink(model, tmp_path / "small.gguf", "50%", score="random")
