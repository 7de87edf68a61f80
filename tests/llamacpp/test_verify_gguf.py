"""The proof of a shrunk GGUF: whatever differs is found, and nothing is found where nothing differs."""

import json
from pathlib import Path

import moe_ggufs
import pytest
from gguf import GGMLQuantizationType as Q
from moe_ggufs import is_cut, tensors_of

from lowmem_wanda import check_gguf
from lowmem_wanda import shrink_gguf as shrink
from lowmem_wanda.errors import CheckpointError, ModelError
from lowmem_wanda.llamacpp.gguf_file import header_of, read_gguf
from lowmem_wanda.llamacpp.gguf_values import Field


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_check_finds_whatever_differs(made, tmp_path):
    model, matrix = made("deepseek2")
    small = tmp_path / "small.gguf"
    shrink(model, small, "50%", scores_from=matrix)
    whole, places = small.read_bytes(), {name: one.data_offset for name, one in tensors_of(small).items()}
    cases = {
        "blk.1.ffn_up_exps.weight": "blk.1.ffn_up_exps.weight: expert 0 is not the source's",
        "blk.2.ffn_gate_inp.weight": "blk.2.ffn_gate_inp.weight: expert 0 is not the source's",
        "blk.2.exp_probs_b.bias": "blk.2.exp_probs_b.bias: expert 0 is not the source's",
        "blk.0.ffn_up.weight": "blk.0.ffn_up.weight: is not the source's",
        "output_norm.weight": "output_norm.weight: is not the source's",
    }
    for name, message in cases.items():
        flipped(small, places[name])
        findings = check_gguf(small, model)
        assert message in findings.problems[0] and "checksum" in findings.problems[-1] and len(findings.problems) >= 2
        small.write_bytes(whole)
    Path(f"{small}.report.json").unlink()
    flipped(small, whole.index(b"tiny deepseek2"))
    assert check_gguf(small, model).problems == ["general.name: is not the source's"]


def test_check_finds_experts_in_wrong_groups_and_twice(made, tmp_path):
    model, _ = made("deepseek2")
    other = moe_ggufs.write(tmp_path / "other.gguf", "qwen3moe", 16, Q.Q8_0)
    small = tmp_path / "small.gguf"
    shrink(other, small, keep_experts=2, score="random")
    held = tensors_of(small)
    data = bytearray(small.read_bytes())
    for name, one in held.items():
        if name.startswith("blk.0") and is_cut(name):
            size = one.n_bytes // 2
            data[one.data_offset + size : one.data_offset + 2 * size] = data[one.data_offset : one.data_offset + size]
    small.write_bytes(data)
    assert any("once more" in problem for problem in check_gguf(small, other).problems)
    with pytest.raises(ModelError, match="has no experts"):
        dense = [name for name, _ in moe_ggufs.qwen3moe(8, 64, 32, 2) if is_cut(name)]
        check_gguf(small, moe_ggufs.write(tmp_path / "dense.gguf", "qwen3moe", 8, skip=dense))
    assert check_gguf(model, other).problems


def test_a_damaged_report_is_named(made, tmp_path):
    model, matrix = made("qwen3moe")
    small = tmp_path / "small.gguf"
    shrink(model, small, "50%", scores_from=matrix)
    report = Path(f"{small}.report.json")
    said = json.loads(report.read_text())
    said["layers"][0]["kept"][0] += 1
    report.write_text(json.dumps(said))
    assert any("does not hold the experts that" in problem for problem in check_gguf(small, model).problems)
    report.write_text("{}")
    with pytest.raises(CheckpointError, match="report.json: is damaged"):
        check_gguf(small, model)


def alike(path, many=((0, 1), (4, 5))):
    """Makes some experts of every layer of a GGUF alike."""
    data = bytearray(path.read_bytes())
    for name, one in tensors_of(path).items():
        if is_cut(name):
            size = one.n_bytes // 16
            for first, second in many:
                at = one.data_offset + first * size
                start = one.data_offset + second * size
                data[start : start + size] = data[at : at + size]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("reported", [True, False])
def test_experts_that_are_alike_are_the_sources(tmp_path, reported):
    model = alike(moe_ggufs.write(tmp_path / "model.gguf", "deepseek2", 16))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({str(block): [1, 2, 5, 6, 8, 9, 12, 13] for block in (1, 2)}))
    small = tmp_path / "small.gguf"
    shrink(model, small, plan=plan)
    if not reported:
        Path(f"{small}.report.json").unlink()
    findings = check_gguf(small, model)
    assert not findings.problems
    assert findings.kept[1] == ([1, 2, 5, 6, 8, 9, 12, 13] if reported else [0, 2, 4, 6, 8, 9, 12, 13])


def test_one_expert_with_a_scale_is_the_sources(tmp_path):
    more = [("blk.0.ffn_down_exps.scale", (4,)), ("blk.0.ffn_up_exps.scale", (1,))]
    model = moe_ggufs.write(tmp_path / "model.gguf", "llama", 4, layers=1, used=1, more=more)
    shrink(model, tmp_path / "small.gguf", keep_experts=1, score="aimer")
    findings = check_gguf(tmp_path / "small.gguf", model)
    assert not findings.problems and findings.cut == 5


def test_bytes_that_belong_to_nothing_are_found(made, tmp_path):
    model, matrix = made("gpt-oss")
    small = tmp_path / "small.gguf"
    shrink(model, small, "50%", scores_from=matrix)
    Path(f"{small}.report.json").unlink()
    data = small.read_bytes()
    first = min(one.data_offset for one in tensors_of(small).values())
    assert data[first - 1] == 0
    gaps = [one for one in tensors_of(small).values() if one.n_bytes % 32]
    for changed in (data + bytes(64), data + b"x", data[: first - 1] + b"x" + data[first:]):
        small.write_bytes(changed)
        (problem,) = check_gguf(small, model).problems
        assert "belong to no tensor" in problem
    end = gaps[0].data_offset + gaps[0].n_bytes
    small.write_bytes(data[:end] + b"x" + data[end + 1 :])
    assert check_gguf(small, model).problems == [f"small.gguf: bytes {end} to {-(-end // 32) * 32} belong to no tensor"]


def rewritten(path, **fields):
    """Writes a GGUF again with other text in its metadata, and without the report beside it."""
    model = read_gguf(path)
    header = header_of({**model.fields, **fields}, model.tensors.values(), model.version, model.alignment)
    data = path.read_bytes()[min(tensor.offset for tensor in model.tensors.values()) :]
    path.write_bytes(header + data)


def test_a_description_may_have_notes_and_nothing_else(made, tmp_path):
    model, matrix = made("qwen3moe")
    small = tmp_path / "small.gguf"
    shrink(model, small, "50%", scores_from=matrix)
    Path(f"{small}.report.json").unlink()
    note = read_gguf(small).text("general.description")
    assert "kept 8 of 16" in note
    for said, right in {
        note: True,
        f"{note} Better than the whole.": False,
        note.replace("kept 8", "kept 12"): False,
    }.items():
        rewritten(small, **{"general.description": Field.text(said)})
        assert check_gguf(small, model).problems == ([] if right else ["general.description: is not the source's"])


def test_another_version_is_found(made, tmp_path):
    model, matrix = made("qwen3moe")
    small = tmp_path / "small.gguf"
    shrink(model, small, "50%", scores_from=matrix)
    Path(f"{small}.report.json").unlink()
    data = small.read_bytes()
    small.write_bytes(data[:4] + (2).to_bytes(4, "little") + data[8:])
    assert "is version 2" in check_gguf(small, model).problems[0]


def test_files_may_be_renamed(made, tmp_path):
    model, matrix = made("qwen3moe")
    shrink(model, tmp_path / "small.gguf", "50%", scores_from=matrix)
    for name in ("small.gguf", "small.gguf.report.json"):
        (tmp_path / name).rename(tmp_path / name.replace("small", "renamed"))
    findings = check_gguf(tmp_path / "renamed.gguf", model)
    assert not findings.problems and findings.report_verified


def test_experts_of_other_groups_are_found(tmp_path):
    """Cut as if they lay in one group; then the source and the result say four."""
    model = moe_ggufs.write(tmp_path / "model.gguf", "deepseek2", 16, expert_group_count=1, expert_group_used_count=1)
    plan, small = tmp_path / "plan.json", tmp_path / "small.gguf"
    plan.write_text(json.dumps({"1": list(range(8)), "2": [0, 1, 4, 5, 8, 9, 12, 13]}))
    shrink(model, small, plan=plan)
    Path(f"{small}.report.json").unlink()
    for path in (model, small):
        four = {
            f"deepseek2.expert_group_{key}": Field.number(4, number)
            for key, number in (("count", 4), ("used_count", 2))
        }
        rewritten(path, **four)
    assert check_gguf(small, model).problems == [
        "blk.1: its experts are not those of the source's groups, equally many of each"
    ]
