"""Jobs: killed and resumed, refused, complete; what is left behind."""

import errno
import json
import multiprocessing
import os
import signal

import pytest
import torch
from helpers import contents, digests, read_tensor, save_tiny
from killing import prune_until
from transformers import AutoModelForCausalLM

from lowmem_wanda import prune
from lowmem_wanda.checkpoint import writer
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.errors import LowmemError, NumberError, OutputError, PatternError
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.pruning.prune import run


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowmem_wanda.pruning.prune", "killing"])
    return context


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("source"), "llama", torch.bfloat16)
    (path / "tokenizer.json").write_text('{"not": "normalised" }')
    return path


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and forks")
def test_killed_anywhere_and_resumed_is_byte_for_byte_uninterrupted(processes, source, token_file, tmp_path):
    prune(source, tmp_path / "whole", text=[str(token_file)], batch=4)
    expected, kills = digests(tmp_path / "whole"), 0
    for calls in range(1, 200, 9):
        target = tmp_path / f"killed-{calls}"
        for half, at in ((True, calls), (False, 7)):  # killed twice, then left to finish
            child = processes.Process(target=prune_until, args=(source, target, str(token_file), at, half))
            child.start()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            if child.exitcode == 0:
                break
            if not (target / "config.json").exists():  # else the kill came after the last rename
                with pytest.raises((OSError, ValueError)):
                    AutoModelForCausalLM.from_pretrained(target)
        prune(source, target, text=[str(token_file)], batch=4)
        assert digests(target) == expected, calls
        if half and child.exitcode == 0:
            break
    assert kills > 5 and child.exitcode == 0  # the last one came too late to kill


def test_a_finished_job_is_only_verified(source, token_file, tmp_path):
    first = prune(source, tmp_path / "out", text=[str(token_file)])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert prune(source, tmp_path / "out", text=[str(token_file)]) == json.loads(json.dumps(first))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(OutputError, match=f"{shard.name}: is not the shard that was written"):
        prune(source, tmp_path / "out", text=[str(token_file)])


def interrupted(source, target, token_file, monkeypatch, blocks=1):
    """A job that stops after so many blocks."""

    def stop(record):
        if record["index"] + 1 == blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, target, text=[str(token_file)], batch=4, on_block=stop)
    return contents(target)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pattern": "50%"}, "--pattern"),
        ({"method": "magnitude"}, "--method"),
        ({"batch": 3}, "--batch"),
        ({"dtype": "bfloat16"}, "--dtype"),
        ({"exclude": ["*q_proj*"]}, "--exclude"),
        ({"include": ["*q_proj*"]}, "--include"),
        ({"sequences": 5}, "calibration"),
        ({"length": 15}, "calibration"),
    ],
)
def test_another_job_is_refused_and_nothing_touched(source, token_file, tmp_path, monkeypatch, change, named):
    before = interrupted(source, tmp_path / "out", token_file, monkeypatch)
    with pytest.raises(OutputError, match=f"holds a job with {named}"):
        prune(source, tmp_path / "out", **{"text": [str(token_file)], "batch": 4, **change})
    assert contents(tmp_path / "out") == before


def test_another_source_is_refused(source, token_file, tmp_path, monkeypatch):
    before = interrupted(source, tmp_path / "out", token_file, monkeypatch)
    other = save_tiny(tmp_path / "other", "llama", torch.bfloat16)
    file = sorted(other.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"\1")  # one weight
    with pytest.raises(OutputError, match="holds a job with source fingerprint"):
        prune(other, tmp_path / "out", text=[str(token_file)], batch=4)
    assert contents(tmp_path / "out") == before


def test_a_damaged_shard_is_made_again(source, token_file, tmp_path, monkeypatch):
    prune(source, tmp_path / "whole", text=[str(token_file)], batch=4)
    interrupted(source, tmp_path / "out", token_file, monkeypatch, blocks=2)
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + bytes(4))  # of the right size, with a valid header
    prune(source, tmp_path / "out", text=[str(token_file)], batch=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


GARBAGE = b'5\n{"a": 1}\n\xff\n{"shard": "..", "sha256": ""}\n{"shard": "../source/config.json"}\nnull\n{"shar'


def test_garbage_in_the_progress_is_no_progress(source, token_file, tmp_path, monkeypatch):
    prune(source, tmp_path / "whole", text=[str(token_file)], batch=4)
    interrupted(source, tmp_path / "out", token_file, monkeypatch)
    with open(tmp_path / "out" / ".progress.jsonl", "ab") as file:
        file.write(GARBAGE)
    prune(source, tmp_path / "out", text=[str(token_file)], batch=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", "{}", "damaged"),
        ("report.json", '{"shards": null}', "damaged"),
        ("model.safetensors.index.json", None, "damaged"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "does not say where"),
        ("config.json", "{}", "is not the source's"),
        ("generation_config.json", None, "is not the source's"),
        ("job.json", "{", "is damaged"),
    ],
)
def test_a_finished_job_that_was_changed_is_not_finished(source, token_file, tmp_path, name, content, message):
    prune(source, tmp_path / "out", text=[str(token_file)])
    file = tmp_path / "out" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(OutputError, match=message):
        prune(source, tmp_path / "out", text=[str(token_file)])


@pytest.mark.parametrize("pattern", ["0.5", "0.5000004"])
def test_the_exact_sparsity_and_the_small_files_are_arguments(source, token_file, tmp_path, monkeypatch, pattern):
    def stop(record):
        raise KeyboardInterrupt

    settings = {"text": [str(token_file)], "batch": 4}
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", pattern="50%", on_block=stop, **settings)
    if pattern == "0.5":
        (source / "LICENSE").write_text("other terms")
    try:
        with pytest.raises(
            OutputError, match="holds a job with " + ("small files" if pattern == "0.5" else "sparsity")
        ):
            prune(source, tmp_path / "out", pattern=pattern, **settings)
    finally:
        (source / "LICENSE").unlink(missing_ok=True)


def test_a_failing_lock_is_no_lock_held(source, token_file, tmp_path, monkeypatch):
    import fcntl

    def unable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    prune(source, tmp_path / "out", text=[str(token_file)])
    assert not (tmp_path / "out" / ".lock").exists()


def test_targets_that_are_not_ours_are_refused(source, token_file, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for target in (tmp_path / "foreign", tmp_path / "file"):
        with pytest.raises(OutputError, match="not a job of this program"):
            prune(source, target, text=[str(token_file)])
    for target in (source, source / "out", tmp_path / "link", source / ".." / source.name):
        with pytest.raises(OutputError, match="in the source"):
            prune(source, target, text=[str(token_file)])
    assert contents(tmp_path / "foreign") == {"thesis.txt": b"years of work"} and contents(source) == before


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_two_processes_do_not_share_a_job(source, token_file, tmp_path):
    job = prepare(source, text=[str(token_file)])  # here: building a model changes torch for all threads meanwhile

    def second(record):
        if record["index"]:
            return
        with pytest.raises(OutputError, match="another process is at work"):
            run(job, tmp_path / "out")

    prune(source, tmp_path / "out", text=[str(token_file)], on_block=second)


def test_too_small_a_disk_is_refused_before_the_first_byte(source, token_file, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match="needs .* MB but 0.00 MB are free"):
        prune(source, tmp_path / "out", text=[str(token_file)])
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_a_job_to_resume(source, token_file, tmp_path, monkeypatch):
    prune(source, tmp_path / "whole", text=[str(token_file)])
    written, write = [0], os.write

    def full(handle, content):
        written[0] += len(content)
        if written[0] > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content)

    monkeypatch.setattr(writer.os, "write", full)
    with pytest.raises(OutputError, match="the disk is full; free some space and run the same command"):
        prune(source, tmp_path / "out", text=[str(token_file)])
    monkeypatch.undo()
    assert (tmp_path / "out" / "model-00002-of-00004.safetensors").exists()
    prune(source, tmp_path / "out", text=[str(token_file)])
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_weight_that_is_no_number_stops_with_its_name(token_file, tmp_path, bad, method):
    path = save_tiny(tmp_path / "source", "llama", shard="1GB")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = bad
    model.save_pretrained(path)
    with pytest.raises(NumberError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        prune(path, tmp_path / "out", method=method, text=[str(token_file)])


def test_a_statistic_that_is_no_number_stops_with_its_name(token_file, tmp_path):
    path = save_tiny(tmp_path / "source", "llama", shard="1GB")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    model.save_pretrained(path)
    with pytest.raises(NumberError, match=r"tensor model\.layers\.1\.input_layernorm\.weight holds NaN or infinity"):
        prune(path, tmp_path / "out", text=[str(token_file)])


def test_include_and_exclude_choose_linears(source, token_file, tmp_path):
    flags = {"include": ["*.mlp.*"], "exclude": ["model.layers.1.*", "*.up_proj"]}
    report = prune(source, tmp_path / "out", text=[str(token_file)], **flags)
    named = [name for block in report["blocks"] for name in block["linears"]]
    assert named == [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 2) for part in ("gate", "down")]
    out, before = Checkpoint(tmp_path / "out"), Checkpoint(source)
    for name, tensor in out.tensors.items():
        assert torch.equal(read_tensor(tensor), read_tensor(before.tensors[name])) == (name not in named)


@pytest.mark.parametrize("flags", [{"include": ["lm_head*"]}, {"exclude": ["*norm*"]}, {"exclude": ["*"]}])
def test_globs_that_choose_nothing_are_errors(source, tmp_path, flags):
    with pytest.raises(PatternError, match="matches no prunable tensor|leave nothing to prune"):
        prune(source, tmp_path / "out", method="magnitude", **flags)


def test_a_ragged_group_is_an_error_before_any_work(tmp_path):
    path = save_tiny(tmp_path / "source", "llama", intermediate_size=60)
    with pytest.raises(PatternError, match=r"model\.layers\.0\.mlp\.down_proj\.weight has 60 inputs, which 8"):
        prune(path, tmp_path / "out", method="magnitude", pattern="4:8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_dtype_and_the_small_files_stay(token_file, tmp_path, dtype):
    path = save_tiny(tmp_path / "source", "qwen3", dtype)
    (path / "LICENSE").write_text("terms")
    prune(path, tmp_path / "out", text=[str(token_file)], pattern="60%")
    out, before = Checkpoint(tmp_path / "out"), Checkpoint(path)
    assert {n: (t.dtype, t.shape) for n, t in out.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in before.tensors.items()
    }
    for name in ("config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    weight = read_tensor(out.tensors["model.layers.0.mlp.down_proj.weight"])
    assert ((weight == 0).sum(1) == int(64 * 0.6)).all() and not torch.signbit(weight[weight == 0]).any()


def test_the_report_holds_what_was_done(source, token_file, tmp_path):
    report = prune(source, tmp_path / "out", text=[str(token_file)])
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["summary"]["sparsity"] == 0.5 and report["summary"]["linears"] == 21
    file = {"name": "tokens.npy", "how": "rows of token ids", "documents": 6, "read": 6, "tokens": 96, "share": 1.0}
    assert report["calibration"] == {
        "text": ["tokens.npy"], "sequences": 6, "length": 16, "tokens": 96, "norms": None, "files": [file], "warnings": [],
    }  # fmt: skip
    assert all(
        linear["holds"] and linear["seconds"] > 0 for block in report["blocks"] for linear in block["linears"].values()
    )
    assert 0 < report["peak_memory"]["host_measured"] < 2 * report["peak_memory"]["host_predicted"]
    assert not (tmp_path / "out" / ".progress.jsonl").exists()


def test_group_changes_what_is_compared(source, token_file, tmp_path):
    per_row = prune(source, tmp_path / "row", text=[str(token_file)], pattern="50%")
    per_matrix = prune(source, tmp_path / "matrix", text=[str(token_file)], pattern="50%", group="matrix")
    assert per_row["summary"]["sparsity"] == 0.5 < per_matrix["summary"]["sparsity"]
    rows = [
        read_tensor(Checkpoint(tmp_path / g).tensors["model.layers.0.mlp.up_proj.weight"]).eq(0).sum(1)
        for g in ("row", "matrix")
    ]
    assert rows[0].unique().tolist() == [16] and len(rows[1].unique()) > 1


def test_statistics_are_shared_where_the_input_is(source, token_file, tmp_path, monkeypatch):
    from lowmem_wanda.sparsity.statistics import SquaredNorm

    made = []
    monkeypatch.setattr(
        SquaredNorm,
        "__init__",
        lambda self, *args, init=SquaredNorm.__init__: (made.append(self), init(self, *args))[1],
    )
    prune(source, tmp_path / "out", text=[str(token_file)])
    assert len(made) == 3 * 4  # blocks; q = k = v, o, gate = up, down


def test_the_measuring_pass_ends_at_the_last_linear(source, token_file, tmp_path, monkeypatch):
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (calls.append(args[1].shape), linear(*args))[1])
    prune(source, tmp_path / "out", text=[str(token_file)], batch=6)
    down = [shape for shape in calls if tuple(shape) == (32, 64) and shape.numel()]
    # traced on meta, computed once when the pruned block carries on, but the last
    assert len(down) == 3 + 2


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:1", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(source, tmp_path, device):
    with pytest.raises(LowmemError, match=f"--device {device} is not available"):
        prune(source, tmp_path / "out", device=device)
