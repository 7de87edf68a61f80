"""What quantization leaves: small GGUFs as the converter makes them, against direct computation; signed numbers for
zeros."""

import json
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families.build import build
from ggufs import convert, convert_experts, weights
from helpers import digests, read_tensor, save_tiny

from lowmem_wanda import prune, shrink
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.verify import check
from lowmem_wanda.cli.main import main
from lowmem_wanda.cli.page import page
from lowmem_wanda.errors import CheckpointError, PatternError
from lowmem_wanda.llamacpp.gguf_file import header_of, read_gguf
from lowmem_wanda.llamacpp.gguf_values import ARRAY, STRING, Field
from lowmem_wanda.llamacpp.imatrix import About, Entry, read, write
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.llamacpp.quant_types import TYPES, advice
from lowmem_wanda.llamacpp.survive import outlook, survive
from lowmem_wanda.pruning.job import prepare

KIND = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def pruned(tiny, token_file, tmp_path_factory):
    """2:4."""
    path = tmp_path_factory.mktemp("pruned") / "out"
    prune(tiny("llama"), path, text=[str(token_file)])
    return path


@pytest.fixture(scope="module")
def importance(pruned, tmp_path_factory):
    """An importance matrix, and the same by name."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("imatrix") / "x.gguf"
    names = gguf_names(list(weights(pruned)), "x")
    sums = {name: rng.uniform(1, 9, (1, weight.shape[1])) for name, weight in weights(pruned).items()}
    entries = {names[name]: Entry(value, np.array([2])) for name, value in sums.items()}
    write(path, {name: entry.sums.shape for name, entry in entries.items()}, entries.items(), About(("t",), 1, 2))
    return path, sums


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1"])
def test_figures_are_those_of_a_direct_computation(pruned, importance, tmp_path, kind):
    path, sums = importance
    report = survive(pruned, convert(pruned, tmp_path / "m.gguf", KIND[kind]), path)
    assert len(report["tensors"]) == 21 and [one["type"] for one in report["types"]] == [kind]
    totals = np.zeros(6)
    for one in report["tensors"]:
        weight, s = weights(pruned)[one["name"]], sums[one["name"]]
        stored = gguf.dequantize(gguf.quantize(weight, KIND[kind]), KIND[kind]).astype(np.float64)
        gone = weight == 0
        error = (s * np.where(gone, 0, weight - stored) ** 2).sum(), (s * weight.astype(float) ** 2).sum()
        assert one["pruned"] == gone.sum() and one["zero"] == pytest.approx((stored[gone] == 0).mean())
        assert one["error"] == pytest.approx((error[0] / error[1]) ** 0.5, rel=1e-5, abs=1e-12)
        leak = np.sqrt((stored[gone] ** 2).mean() / (weight[~gone] ** 2).mean())
        assert one["leak"] == pytest.approx(leak, rel=1e-5, abs=1e-12)
        assert one["holds"] == (TYPES[kind].grid == "keeps")
        totals += [gone.sum(), (stored[gone] == 0).sum(), *error, 1, one["holds"]]
    (whole,) = report["types"]
    assert (whole["pruned"], whole["linears"], whole["holding"]) == (totals[0], totals[4], totals[5])
    assert whole["zero"] == pytest.approx(totals[1] / totals[0])
    assert whole["zero"] == 1 if TYPES[kind].grid == "keeps" else whole["zero"] < 0.15
    assert ("Every pruned weight is zero" in report["advice"][0]) == (TYPES[kind].grid == "keeps")


@pytest.mark.parametrize("chunk", [64, 1000])
def test_rows_are_found_in_any_order_and_in_pieces(pruned, tmp_path, monkeypatch, chunk):
    """As bloom's and falcon's fused attention has them, too."""
    rng = np.random.default_rng(0)
    model = convert(pruned, tmp_path / "m.gguf", KIND.Q4_0, lambda name, weight: rng.permutation(weight))
    expected = survive(pruned, convert(pruned, tmp_path / "n.gguf", KIND.Q4_0, order=False))["types"]
    monkeypatch.setattr("lowmem_wanda.llamacpp.survive.CHUNK", chunk)
    assert survive(pruned, model)["types"][0] == pytest.approx(expected[0])


def test_transposed_weights_are_turned(tiny, token_file, tmp_path):
    """GPT-2's."""
    prune(tiny("gpt2"), tmp_path / "out", text=[str(token_file)])
    tensors = {name: t for name, t in Checkpoint(tmp_path / "out").tensors.items() if ".h." in name and t.shape[1:]}
    names, writer = gguf_names(list(tensors), "x"), gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    for name, tensor in tensors.items():
        weight = np.ascontiguousarray(read_tensor(tensor).numpy().T)
        writer.add_tensor(names[name], gguf.quantize(weight, KIND.Q8_0), raw_dtype=KIND.Q8_0)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    (whole,) = survive(tmp_path / "out", tmp_path / "m.gguf")["types"]
    assert (whole["zero"], whole["holding"], whole["linears"]) == (1, 12, 12) and whole["error"] < 0.01


def test_a_gguf_of_something_else_is_refused(pruned, tiny, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    for model, says in (
        (convert(other, tmp_path / "a.gguf", KIND.Q8_0), "does not hold the weights of model.layers.0"),
        (
            convert(pruned, tmp_path / "b.gguf", KIND.Q8_0, skip=[name]),
            "blk.1.ffn_up.weight should be .* no such tensor",
        ),
        (convert(pruned, tmp_path / "c.gguf", KIND.Q8_0, lambda n, w: w[:8] if n == name else w), r"it has \[8, 32\]"),
    ):
        with pytest.raises(CheckpointError, match=says):
            survive(pruned, model)
    (tmp_path / "d.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:99])
    for broken in ("d.gguf", "e.gguf"):
        with pytest.raises(CheckpointError, match=broken):
            survive(pruned, tmp_path / broken)


@pytest.mark.parametrize("zeros", ["exact", "signed-tiny"])
def test_rows_of_which_nothing_was_kept_are_no_trouble(tiny, tmp_path, zeros):
    prune(tiny("llama"), tmp_path / "out", method="magnitude", pattern="98%", zeros=zeros)
    assert any((np.abs(weight) < 1e-30).all(axis=1).any() for weight in weights(tmp_path / "out").values())
    (whole,) = survive(tmp_path / "out", convert(tmp_path / "out", tmp_path / "m.gguf", KIND.F32))["types"]
    assert whole["error"] < 0.02 and round(whole["zero"], 3) == (zeros == "exact")  # rows of one weight are like others


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tiny", "x"),
        ("tiny", [1]),
        ("pattern", "2:0"),
        ("pattern", 5),
        ("pattern", f"2:{'9' * 5000}"),
        ("transposed", None),
    ],
)
def test_a_damaged_report_is_an_error(pruned, tmp_path, key, value):
    shutil.copytree(pruned, tmp_path / "out")
    file = tmp_path / "out/report.json"
    report = json.loads(file.read_text())
    linears = report["blocks"][0]["linears"]
    if value is None:
        linears["model.norm.weight"] = linears.pop("model.layers.0.mlp.up_proj.weight")
    else:
        linears["model.layers.0.mlp.up_proj.weight"][key] = value
    file.write_text(json.dumps(report))
    if value != f"2:{'9' * 5000}":  # is no N:M, as 50 % is none
        with pytest.raises(CheckpointError, match="is not what prune wrote"):
            survive(tmp_path / "out")
    file.write_text(json.dumps({**report, "blocks": []}))
    with pytest.raises(CheckpointError, match="is not what prune wrote"):
        survive(tmp_path / "out")


def test_a_type_that_gguf_cannot_read_is_named(pruned, tmp_path):
    writer, made = gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), weights(pruned)
    for name, gguf_name in gguf_names(list(made), "x").items():
        writer.add_tensor(gguf_name, made[name].astype(np.float64))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(CheckpointError, match="blk.0.* is F64, which the gguf package cannot read"):
        survive(pruned, tmp_path / "m.gguf")


def test_doubles_get_no_tiny_numbers(token_file, tmp_path):
    source = save_tiny(tmp_path / "source", "llama", torch.float64)
    with pytest.raises(PatternError, match="is float64"):
        prepare(source, text=[str(token_file)], zeros="signed-tiny")


def test_a_gguf_in_parts_is_one(pruned, tmp_path):
    convert(pruned, tmp_path / "m.gguf", KIND.Q8_0, split=10)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{place}-of-00003.gguf" for place in (1, 2, 3)]
    for part in parts:
        assert survive(pruned, part)["types"][0]["linears"] == 21


def test_an_importance_matrix_of_something_else_is_refused(pruned, tmp_path):
    write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": (1, 2)}, [("blk.0.attn_q.weight", Entry(np.ones((1, 2)), np.ones(1)))],
          About(("t",), 1, 1))  # fmt: skip
    with pytest.raises(CheckpointError, match="no entry blk.0"):
        survive(pruned, imatrix=tmp_path / "x.gguf")


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
@pytest.mark.parametrize("wrong", [-1, -1e-30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("made", [True, False])
def test_sums_that_are_no_squares_are_named(pruned, importance, tmp_path, suffix, wrong, made):
    entries, about = read(importance[0])
    name = "blk.2.ffn_up.weight"
    sums = entries[name].sums.copy()
    sums[0, 5] = wrong
    changed = {**entries, name: Entry(sums, entries[name].counts)}
    path = tmp_path / f"x.{suffix}"
    write(path, {key: entry.sums.shape for key, entry in changed.items()}, changed.items(), about)
    model = convert(pruned, tmp_path / "m.gguf", KIND.Q8_0) if made else None
    with pytest.raises(CheckpointError, match=rf"x.{suffix}: entry {name} holds numbers that are not sums of squares"):
        survive(pruned, model, path)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_gguf_that_holds_nan_is_named(pruned, tmp_path, wrong):
    model = convert(pruned, tmp_path / "m.gguf", KIND.F32)
    tensor = read_gguf(model).tensors["blk.1.ffn_up.weight"]
    with open(model, "r+b") as file:
        file.seek(tensor.offset + 40)
        file.write(np.float32(wrong).tobytes())
    with pytest.raises(CheckpointError, match="blk.1.ffn_up.weight holds NaN or infinity"):
        survive(pruned, model)


def test_a_large_tokenizer_costs_little(pruned, tmp_path):
    """262144 tokens, as Gemma has: under a second, under 50 MB."""
    count, file = 1 << 18, read_gguf(convert(pruned, tmp_path / "m.gguf", KIND.Q8_0))
    texts = b"".join(struct.pack("<Q", 12) + b"token %06d" % number for number in range(count))
    arrays = {"tokens": (STRING, texts), "scores": (6, bytes(4 * count)), "token_type": (5, bytes(4 * count))}
    fields = {f"tokenizer.ggml.{key}": Field(ARRAY, struct.pack("<IQ", kind, count) + raw)
              for key, (kind, raw) in arrays.items()}  # fmt: skip
    data = (tmp_path / "m.gguf").read_bytes()[min(tensor.offset for tensor in file.tensors.values()) :]
    model = tmp_path / "large.gguf"
    model.write_bytes(header_of({**file.fields, **fields}, file.tensors.values(), 3, 32) + data)
    survive(pruned, tmp_path / "m.gguf")
    start = time.process_time()
    survive(pruned, tmp_path / "m.gguf")
    alone, start = time.process_time() - start, time.process_time()
    report = survive(pruned, model)
    assert time.process_time() - start < alone + 1 and report["types"][0]["linears"] == 21
    peaks = []
    for path in (tmp_path / "m.gguf", model):
        tracemalloc.start()
        survive(pruned, path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50e6


def test_a_prediction_is_what_comes_of_it(pruned, importance, tmp_path):
    """All rows of so small a model are looked at."""
    predicted = {one["type"]: one for one in survive(pruned, imatrix=importance[0])["types"]}
    assert list(predicted) == list(TYPES)
    for kind in ("Q4_1", "Q5_0"):
        (real,) = survive(pruned, convert(pruned, tmp_path / f"{kind}.gguf", KIND[kind]), importance[0])["types"]
        for figure in ("pruned", "zero", "leak", "error"):
            assert predicted[kind][figure] == pytest.approx(real[figure], rel=1e-6)
    assert "zero" not in predicted["Q4_K"] and predicted["Q4_K"]["grid"] == "offset"
    assert predicted["TQ2_0"]["linears"] == 0  # 256 divides none of its inputs


def test_the_report_of_a_pruning_says_it(pruned, tiny, token_file, tmp_path, monkeypatch):
    whole = json.loads((pruned / "report.json").read_text())
    report, html = whole["quantization"], page(whole)
    assert next(one["zero"] for one in report["types"] if one["type"] == "Q4_0") == 1 and report["advice"] == advice()
    assert 'id="quantization"' in html and "zeros become weights of one sign" in html
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    bare = prune(tiny("llama"), tmp_path / "out", text=[str(token_file)])["quantization"]
    assert [one["type"] for one in bare["types"]] == list(TYPES) and "zero" not in bare["types"][0]


def test_the_report_of_a_pruning_looks_at_some_of_many_matrices(pruned, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.llamacpp.survive.LOOKED_AT", 3)
    found = outlook(Checkpoint(pruned), json.loads((pruned / "report.json").read_text()))
    assert next(one["linears"] for one in found["types"] if one["type"] == "Q4_1") == 3


def test_of_a_smaller_checkpoint_without_zeros_errors_are_told(tmp_path, capsys):
    source, out = build(tmp_path / "source", "qwen3_moe", hidden_size=64), tmp_path / "out"
    shrink(source, out, keep_experts=4, score="aimer", device="cpu")
    convert_experts(out, tmp_path / "m.gguf", KIND.Q8_0)
    report = survive(out, tmp_path / "m.gguf")
    (made,) = report["types"]
    assert made["type"] == "Q8_0" and not made["pruned"] and 0 < made["error"] < 0.01
    assert len(report["tensors"]) == made["linears"] == 3 * (4 + 4 * 3)  # routers are not quantized
    assert main(["survive", str(out), str(tmp_path / "m.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "made smaller without zeros" in shown and "%still" not in shown.replace(" ", "")


def test_the_command_shows_tensors_types_and_advice(pruned, tmp_path, capsys):
    model = str(convert(pruned, tmp_path / "m.gguf", KIND.Q4_1))
    assert main(["survive", str(pruned), model]) == 0
    shown = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in shown and "2:4 broken" in shown and "in 0 of 21" in shown
    assert main(["survive", str(pruned), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["types"]) == len(TYPES)
    assert main(["survive", str(pruned)]) == 0
    assert "an offset moves zeros" in capsys.readouterr().out


def test_what_a_gguf_has_comes_first():
    one = {"linears": 7, "zero": 0.0, "signs": 0.5, "pruned": 5}
    for kind, tiny, says in (
        ("IQ2_S", False, "zeros became weights of one sign: quantize again"),
        ("IQ3_S", False, "good only if it was made with the pruned model's own importance matrix"),
        ("IQ3_S", True, "the signs of pruned weights are lost: convert with --outtype bf16"),
    ):
        assert f"7 linears are {kind}" in (first := advice([{**one, "type": kind}], tiny)[0]) and says in first
    assert advice([{**one, "type": "IQ2_S", "signs": 0.95}], tiny=True) == advice(tiny=True)
    assert "would be ruined" in advice([{**one, "type": "F16", "zero": 1}], tiny=True)[0]
    assert len(advice()) == 4 and len(advice(tiny=True)) == 3


def test_signs_that_a_conversion_loses_are_missed(tiny, token_file, tmp_path):
    prune(tiny("llama"), tmp_path / "out", text=[str(token_file)], zeros="signed-tiny")
    for kind, share in (("BF16", 1), ("F16", 0)):
        (whole,) = survive(tmp_path / "out", convert(tmp_path / "out", tmp_path / f"{kind}.gguf", KIND[kind]))["types"]
        assert whole["signs"] == share


def test_the_dense_models_gguf_is_refused(pruned, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="Q8_0, which keeps zeros, .* perhaps the dense one"):
        survive(pruned, convert(tiny("llama"), tmp_path / "m.gguf", KIND.Q8_0))


def test_checkpoints_that_are_not_pruned_or_not_done_are_refused(pruned, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="has no pruned weights"):
        survive(tiny("llama"))
    shutil.copytree(pruned, tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(CheckpointError, match="is an unfinished job"):
        survive(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signed_tiny_is_known_to_check_and_survives_a_stop(token_file, tmp_path, dtype):
    source = save_tiny(tmp_path / "source", "llama", dtype)
    settings = {"text": [str(token_file)], "batch": 4, "zeros": "signed-tiny"}
    report = prune(source, tmp_path / "out", **settings)
    assert report["summary"]["zeros"] == 0 and report["summary"]["filled"] == 3 * 9216 // 2
    assert "not zeros" in report["summary"]["gives"]
    exact = prune(source, tmp_path / "exact", text=[str(token_file)], batch=4)
    assert exact["summary"]["zeros"] == report["summary"]["filled"]
    signs = []
    for name, weight in weights(tmp_path / "out").items():
        tiny, other = np.abs(weight) == torch.finfo(dtype).smallest_normal, weights(tmp_path / "exact")[name]
        if dtype != torch.float16 or ".0." in name:  # float16's is large enough to change what is pruned after it
            assert np.array_equal(tiny, other == 0) and np.array_equal(weight[~tiny], other[~tiny])
        signs.append((weight[tiny] > 0).mean())
    assert 0.4 < min(signs) < max(signs) < 0.6
    findings = check(tmp_path / "out", source)
    assert not findings.problems  # a few weights of float16 have that size from the start
    assert 0 <= report["summary"]["filled"] - findings.zeroed < 9 * (dtype == torch.float16) + 1
    assert {matrix.pattern for matrix in findings.matrices if matrix.filled} == {"2:4"}

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "stopped", on_block=stop, **settings)
    prune(source, tmp_path / "stopped", **settings)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "out")
    prune(source, tmp_path / "other", seed=1, **settings)
    assert digests(tmp_path / "other") != digests(tmp_path / "out")


def test_the_smallest_number_is_forged_where_the_report_does_not_say_it(token_file, tmp_path):
    source = save_tiny(tmp_path / "source", "llama")
    prune(source, tmp_path / "out", text=[str(token_file)], zeros="signed-tiny")
    file = tmp_path / "out/report.json"
    report = json.loads(file.read_text())
    for block in report["blocks"]:
        for linear in block["linears"].values():
            linear["filled"] = 0
    file.write_text(json.dumps(report))
    problems = check(tmp_path / "out", source).problems
    assert any("neither the source's nor zero" in problem for problem in problems)
    report["blocks"][0]["linears"]["model.layers.0.mlp.up_proj.weight"]["filled"] = 7
    file.write_text(json.dumps(report))
    assert any(
        "weights of the smallest number, report.json says 7" in problem for problem in check(tmp_path / "out").problems
    )


def test_survive_needs_neither_torch_nor_transformers(pruned):
    import subprocess
    import sys

    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers']); from lowmem_wanda.cli.main import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "survive", str(pruned)], capture_output=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
