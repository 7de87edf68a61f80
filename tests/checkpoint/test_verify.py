"""`check`: sparsity and patterns from bytes, and the proof against a source."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file, save_file

from lowmem_wanda import check, prune
from lowmem_wanda.errors import CheckpointError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("source"), "llama", torch.bfloat16, shard="1GB")


@pytest.fixture
def pruned(source, tmp_path):
    prune(source, tmp_path / "out", method="magnitude")
    return tmp_path / "out"


def rewrite(path, name, change):
    """Applies a change to one tensor, and drops the report with its checksums."""
    file = next(file for file in path.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    (path / "report.json").unlink(missing_ok=True)


def test_a_pruned_checkpoint_is_proved(source, pruned):
    findings = check(pruned, source)
    assert findings.problems == []
    assert (findings.masked, findings.identical, findings.shards_verified) == (21, 9, 4)
    matrices = {matrix.name: matrix for matrix in findings.matrices}
    assert matrices[UP].pattern == "2:4" and matrices[UP].sparsity == 0.5
    assert matrices["lm_head.weight"].pattern == "" and 0 < findings.zeroed <= sum(m.zeros for m in findings.matrices)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("1:4", "1:4"), ("4:8", "4:8"), ("3:4", "3:4"), ("1:2", "1:2"), ("8:16", "8:16"), ("50%", "")],
)
def test_patterns_are_found(source, tmp_path, pattern, found):
    prune(source, tmp_path / "out", method="magnitude", pattern=pattern)
    findings = check(tmp_path / "out", source)
    assert not findings.problems and {m.name: m.pattern for m in findings.matrices}[UP] == found


def test_gpt2s_transposed_weights_hold_theirs_down_the_columns(tmp_path):
    source = save_tiny(tmp_path / "gpt2", "gpt2")
    prune(source, tmp_path / "out", method="magnitude")
    patterns = {matrix.name: matrix.pattern for matrix in check(tmp_path / "out", source).matrices}
    assert patterns["transformer.h.0.attn.c_attn.weight"] == "2:4 (transposed)"


def first(value):
    def change(tensor):
        tensor.view(-1)[:1] = value
        return tensor

    return change


FORGED = {
    "another weight": (UP, lambda t: t + (t == 0).to(t.dtype) * 0.5, "neither the source's nor zero"),
    "one weight": (UP, first(3.0), "1 weights are neither"),
    "negative zero": (UP, lambda t: torch.where(t == 0, -0.0, t), "neither the source's nor zero"),
    "a norm": ("model.norm.weight", first(0.0), "model.norm.weight: 1 values are zero"),
    "an embedding": ("model.embed_tokens.weight", first(0.0), "is not a matrix of a block"),
    "a dtype": (UP, lambda t: t.float(), "is F32"),
    "a shape": (UP, lambda t: t.reshape(32, 64), r"is BF16 \[32, 64\]"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forgeries_are_found(source, pruned, case):
    name, change, message = FORGED[case]
    rewrite(pruned, name, change)
    (problem,) = check(pruned, source).problems
    assert message.replace("\\", "") in problem


def test_a_changed_file_and_a_broken_promise_are_found(source, pruned):
    (pruned / "config.json").write_text((source / "config.json").read_text() + " ")
    report = json.loads((pruned / "report.json").read_text())
    report["blocks"][1]["linears"][UP]["zeros"] += 1
    report["blocks"][0]["linears"]["model.layers.0.mlp.up_proj.weight"]["pattern"] = "1:4"
    report["shards"][0]["blake3"] = "0" * 64
    (pruned / "report.json").write_text(json.dumps(report))
    problems = "\n".join(check(pruned, source).problems)
    for words in ("config.json: is missing or differs", f"{UP}: has 1024 zeros, report.json says 1025",
                  "layers.0.mlp.up_proj.weight: does not hold 1:4", "model-00001-of-00004.safetensors: is not the file"):  # fmt: skip
        assert words in problems


def test_a_pattern_down_the_columns_is_not_the_promised_one(source, pruned):
    def turned(weight):
        weight[:] = 1
        weight.view(-1, 4, weight.shape[1])[:, :2] = 0
        return weight

    report = (pruned / "report.json").read_text()
    rewrite(pruned, UP, turned)
    (pruned / "report.json").write_text(report)
    assert f"{UP}: does not hold 2:4, which report.json says it does" in check(pruned).problems


@pytest.mark.parametrize("report", ["{}", '{"blocks": []}', '{"blocks": 3}', '{"blocks": [{"linears": {"a": 1}}]}',
     '{"blocks": [{"linears": {"a": ["zeros"]}}], "shards": [1]}', '{"blocks": [{"linears": {"a": {"zeros": 1}}}], "shards": 5}'])  # fmt: skip
def test_a_report_that_says_nothing_is_an_error(pruned, report):
    (pruned / "report.json").write_text(report)
    if report == "{}":
        assert check(pruned).shards_verified == 0
    else:
        with pytest.raises(CheckpointError, match="is not what prune wrote"):
            check(pruned)


def test_a_missing_tensor_is_found(source, tmp_path):
    other = save_tiny(tmp_path / "other", "llama_tied", torch.bfloat16)
    problems = check(other, source).problems
    assert f"lm_head.weight: is missing in {other}" in problems


def test_an_unfinished_job_is_said_to_be_one(source, tmp_path):
    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", method="magnitude", on_block=stop)
    with pytest.raises(CheckpointError, match="unfinished job"):
        check(tmp_path / "out")


def test_check_needs_neither_torch_nor_transformers(pruned, source):
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n" \
        f"from lowmem_wanda.cli.main import main; sys.exit(main(['check', {str(pruned)!r}, '--against', {str(source)!r}]))"  # fmt: skip
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], stdout=subprocess.DEVNULL).returncode == 0
