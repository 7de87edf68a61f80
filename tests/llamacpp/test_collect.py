"""The importance matrix of the pruned model, collected on the way: whose inputs it is of, through kills and stops."""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import collected, digests, opened
from transformers import AutoModelForCausalLM

from lowmem_wanda import prune
from lowmem_wanda.cli.main import main
from lowmem_wanda.data.calibration import Calibration
from lowmem_wanda.errors import CheckpointError, OutputError
from lowmem_wanda.llamacpp.collect import collect
from lowmem_wanda.llamacpp.imatrix import About, read
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.pruning.prune import run
from lowmem_wanda.streaming.machine import Machine

BINARIES = os.environ.get("LLAMA_CPP_BIN")  # where llama-imatrix, llama-quantize and llama-tokenize are, if anywhere


@torch.no_grad()
def direct(path, tokens):
    """{file tensor: sums} of a whole model in memory, by hooks on its linears."""
    model, sums = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), {}
    kinds = (torch.nn.Linear,)

    def note(name, module, given):
        sums[name] = sums.get(name, 0) + given[0].double().square().reshape(-1, given[0].shape[-1]).sum(0)

    for name, module in model.named_modules():
        if isinstance(module, kinds) and ".layers." in name:
            module.register_forward_pre_hook(lambda module, given, name=name: note(name, module, given))
    model(torch.from_numpy(tokens), use_cache=False)
    return sums


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "stablelm"])
def test_sums_are_those_of_the_whole_model(tiny, token_file, tmp_path, family):
    tokens, work = np.load(token_file), opened(tiny(family), batch=4)
    found = collect(work, Calibration(tokens, ("t",)), tmp_path / "x.gguf")
    entries, about = read(tmp_path / "x.gguf")
    expected, names = (
        direct(tiny(family), tokens),
        gguf_names([one.name for one in work.skeleton.all_matrices], "x"),
    )
    assert found["entries"] == len(entries) == len(expected) and about == About(("t",), 6, 16)
    for name, sums in expected.items():
        entry = entries[names[f"{name}.weight"]]
        assert np.allclose(entry.sums[0], sums, rtol=1e-5) and entry.counts.tolist() == [96]


ORDERS = [
    {"statistics": "block"},
    {"statistics": "sequential"},
    {"statistics": "sequential", "held": 0},
    {"statistics": "sequential", "held": 1},
    {"statistics": "block", "exclude": ["*v_proj*", "*down_proj*"]},
    {"statistics": "sequential", "exclude": ["*v_proj*", "*down_proj*"]},
    {"statistics": "sequential", "include": ["*layers.1.*"], "held": 1},
    {"method": "magnitude"},
    {"zeros": "signed-tiny"},
    {"states": "file", "slots": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", ORDERS)
def test_it_is_the_pruned_models_own_to_the_byte(tiny, token_file, tmp_path, settings):
    same = {"text": [str(token_file)], "batch": 4}
    prune(tiny("llama"), tmp_path / "out", imatrix=tmp_path / "a.gguf", **same, **settings)
    assert collected(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "a.gguf").read_bytes()
    prune(tiny("llama"), tmp_path / "without", **same, **settings)
    ours, theirs = (digests(tmp_path / name) for name in ("out", "without"))
    assert {**ours, "job.json": ""} == {**theirs, "job.json": ""}


def test_what_a_killed_run_left_is_cleared_away(tiny, token_file, tmp_path):
    left = tmp_path / ".x.gguf.blocks"
    (left / ".imatrix").mkdir(parents=True)
    (left / ".imatrix/00000-0123456789abcdef.safetensors").write_text("x")
    (left / ".hidden-states.partial").write_text("x")
    (left / ".lock").write_text("")
    collected(tiny("llama"), token_file, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("strange", ["sums", ".imatrix/notes.txt", "link", "file"])
def test_a_folder_that_is_not_ours_stays_as_it_is(tiny, token_file, tmp_path, strange):
    left = tmp_path / ".x.gguf.blocks"
    if strange == "link":
        (tmp_path / "mine").mkdir()
        left.symlink_to(tmp_path / "mine")
    elif strange == "file":
        left.write_text("mine")
    else:
        (left / strange).parent.mkdir(parents=True)
        (left / strange).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"\.x\.gguf\.blocks: holds what is not of .* give another out_file"):
        collected(tiny("llama"), token_file, tmp_path / "x.gguf")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_run_to_one_file_is_kept_out(tiny, token_file, tmp_path):
    """The second starts while the first is at work; the first ends as if it had been alone."""
    target, tokens, seen = tmp_path / "x.gguf", np.load(token_file), []

    def second(record):
        with pytest.raises(OutputError, match="another process is at work"):
            collect(opened(tiny("llama")), Calibration(tokens, ("t",)), target)
        seen.append(record["index"])

    collect(opened(tiny("llama"), batch=4), Calibration(tokens, ("t",)), target, second)
    assert seen == [0, 1, 2] and [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    collect(opened(tiny("llama"), batch=4), Calibration(tokens, ("t",)), tmp_path / "y.gguf")
    assert target.read_bytes() == (tmp_path / "y.gguf").read_bytes()
    with pytest.raises(OutputError, match="exists, and is not replaced"):
        collect(opened(tiny("llama")), Calibration(tokens, ("t",)), target)


def test_in_the_dense_order_it_is_the_dense_models(tiny, token_file, tmp_path):
    prune(
        tiny("llama"),
        tmp_path / "out",
        text=[str(token_file)],
        batch=4,
        statistics="dense",
        imatrix=tmp_path / "a.gguf",
    )
    assert collected(tiny("llama"), token_file, tmp_path / "b.gguf") == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["block", "sequential", "dense"])
@pytest.mark.parametrize(("first", "blocks"), [(True, 1), (True, 3), (False, 2)])
def test_it_survives_a_stop(tiny, token_file, tmp_path, order, first, blocks):
    """Also where the job was begun without it, and where all blocks were done."""
    settings = {"text": [str(token_file)], "batch": 4, "statistics": order}
    prune(tiny("llama"), tmp_path / "whole", imatrix=tmp_path / "whole.gguf", **settings)

    def stop(record):
        if record["index"] + 1 == blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(
            tiny("llama"), tmp_path / "out", imatrix=tmp_path / "x.gguf" if first else None, on_block=stop, **settings
        )
    assert not (tmp_path / "x.gguf").exists()
    prune(tiny("llama"), tmp_path / "out", imatrix=tmp_path / "x.gguf", **settings)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("last", ["save_imatrix", "write_json", "_end"])
def test_a_kill_among_the_last_files_is_made_good(tiny, token_file, tmp_path, monkeypatch, last):
    settings = {"text": [str(token_file)], "batch": 4, "imatrix": tmp_path / "x.gguf"}
    with monkeypatch.context() as patch:
        patch.setattr(f"lowmem_wanda.pruning.publish.{last}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(tiny("llama"), tmp_path / "out", **settings)
    assert (tmp_path / "x.gguf").exists() == (last != "save_imatrix")
    for _ in range(2):  # once more is no error
        prune(tiny("llama"), tmp_path / "out", **settings)
        assert not (tmp_path / "out/.imatrix").exists()
    assert collected(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").unlink()
    with pytest.raises(OutputError, match="make one by: imatrix"):
        prune(tiny("llama"), tmp_path / "out", **settings)


def test_a_file_that_came_meanwhile_is_not_replaced_and_nothing_lost(tiny, token_file, tmp_path):
    job, path = (
        prepare(tiny("llama"), text=[str(token_file)], imatrix=tmp_path / "x.gguf", machine=Machine(batch=4)),
        tmp_path / "x.gguf",
    )
    for _ in range(2):
        with pytest.raises(OutputError, match="exists, and is not replaced"):
            run(job, tmp_path / "out", lambda record: path.write_text("mine"))
        assert path.read_text() == "mine"
    path.unlink()
    run(job, tmp_path / "out")
    assert collected(tmp_path / "out", token_file, tmp_path / "b.gguf") == path.read_bytes()
    path.write_text("mine")
    with pytest.raises(OutputError, match="is not the importance matrix"):
        run(job, tmp_path / "out")
    work = opened(tiny("llama"))
    with pytest.raises(OutputError, match="exists, and is not replaced"):
        collect(work, job.calibration, tmp_path / "y.gguf", lambda record: (tmp_path / "y.gguf").write_text("mine"))


def test_a_damaged_store_is_recorded_again(tiny, token_file, tmp_path, monkeypatch):
    job = prepare(tiny("llama"), text=[str(token_file)], imatrix=tmp_path / "x.gguf", machine=Machine(batch=4))
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_wanda.pruning.publish.save_imatrix", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "out")
    damaged = sorted((tmp_path / "out/.imatrix").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="was damaged; run the same command again"):
        run(job, tmp_path / "out")
    run(job, tmp_path / "out")
    assert collected(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "x.gguf").read_bytes()


def test_a_job_without_measuring_may_turn_to_it_and_to_another_text(tiny, token_file, tmp_path):
    """What is recorded changes no shard; sums of two texts are never mixed."""

    def stop(record):
        raise KeyboardInterrupt

    other = tmp_path / "other.npy"
    np.save(other, np.load(token_file)[::-1])
    for name, text in (("x", token_file), ("y", other)):
        settings = {"method": "magnitude", "text": [str(text)], "batch": 4, "imatrix": tmp_path / f"{name}.gguf"}
        with pytest.raises(KeyboardInterrupt) if name == "x" else contextlib.nullcontext():
            prune(tiny("llama"), tmp_path / "out", on_block=stop if name == "x" else lambda record: None, **settings)
    assert collected(tmp_path / "out", other, tmp_path / "b.gguf") == (tmp_path / "y.gguf").read_bytes()
    prune(tiny("llama"), tmp_path / "out", method="magnitude")
    with pytest.raises(OutputError, match="on this text"):
        prune(tiny("llama"), tmp_path / "out", method="magnitude", text=[str(token_file)], imatrix=tmp_path / "y.gguf")


@pytest.mark.parametrize(
    ("name", "says"), [("there.gguf", "exists"), ("x.bin", "ends in .gguf"), ("no/where.dat", "no such directory")]
)
def test_targets_that_will_not_do_are_refused_before_any_work(tiny, token_file, tmp_path, capsys, name, says):
    (tmp_path / "there.gguf").write_text("mine")
    source = str(tiny("llama"))
    path = f"{source}/x.gguf" if name == "in it" else str(tmp_path / name)
    commands = [["prune", source, str(tmp_path / "out"), "--imatrix", path], ["imatrix", source, path]]
    commands += [["plan", source, "--imatrix", path]] if says != "exists" else []
    for command in commands:
        assert main([*command, "--text", str(token_file)]) == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (tmp_path / "there.gguf").read_text() == "mine"


def test_it_may_lie_in_the_folder_that_is_made(tiny, token_file, tmp_path):
    path = tmp_path / "out/x.dat"
    for _ in range(2):
        prune(tiny("llama"), tmp_path / "out", text=[str(token_file)], imatrix=path)
        assert len(read(path)[0]) == 21


def test_without_gguf_it_says_what_to_install(tiny, token_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["imatrix", str(tiny("llama")), str(tmp_path / "x.gguf"), "--text", str(token_file)]) == 1
    assert "pip install gguf" in capsys.readouterr().err
    assert main(["prune", str(tiny("llama")), str(tmp_path / "out"), "--text", str(token_file)]) == 0
    monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace())
    assert main(["survive", str(tmp_path / "out")]) == 1
    assert "pip install --upgrade gguf" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not BINARIES, reason="LLAMA_CPP_BIN does not say where llama.cpp's tools are")
def test_llama_imatrix_says_the_same(shared, tmp_path):
    """On the finished pruned model, converted to CONVERTED by the user: set LLAMA_CPP_CONVERT to the script."""
    import json

    text = tmp_path / "text.txt"
    text.write_text((shared / "corpora/tinystories/held-out.txt").read_text().replace("<|endoftext|>", "")[:60000])
    source, out = shared / "models/stories260K", tmp_path / "out"
    prune(source, out, pattern="2:4", text=[str(text)], sequences=8, length=256)
    run = {"check": True, "capture_output": True, "text": True}
    model = str(tmp_path / "model.gguf")
    convert = [sys.executable, os.environ["LLAMA_CPP_CONVERT"], str(out), "--outfile", model, "--outtype", "f32"]
    subprocess.run(convert, **run)
    tools = Path(str(BINARIES))
    ids = json.loads(
        subprocess.run([tools / "llama-tokenize", "-m", model, "-f", text, "--ids", "--log-disable"], **run).stdout
    )
    rows = np.array(ids[: 40 * 512]).reshape(40, 512)
    rows[:, 0] = ids[0]
    theirs = [tools / "llama-imatrix", "-m", model, "-f", text, "-o", tmp_path / "theirs.gguf", "-c", "512"]
    subprocess.run([*theirs, "--chunks", "40", "-ctk", "f32", "-ctv", "f32", "-fa", "off"], **run)
    collect(opened(out), Calibration(rows, ("t",)), tmp_path / "ours.gguf")
    ours, other = (read(tmp_path / f"{name}.gguf")[0] for name in ("ours", "theirs"))
    assert ours.keys() == other.keys()
    for name, entry in ours.items():
        difference = np.linalg.norm(entry.sums - other[name].sums) / np.linalg.norm(entry.sums)
        assert difference < 3e-5 and entry.counts == other[name].counts, name


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(
    "LLAMA_CPP_CONVERT" not in os.environ, reason="LLAMA_CPP_CONVERT does not say where the converter is"
)
def test_what_converts_is_the_sources_but_for_zeros(shared, tmp_path):
    import gguf

    source = shared / "models/stories260K"
    prune(source, tmp_path / "out", pattern="2:4", method="magnitude")
    for path in (source, tmp_path / "out"):
        convert = [os.environ["LLAMA_CPP_CONVERT"], str(path), "--outfile", str(tmp_path / f"{path.name}.gguf")]
        subprocess.run([sys.executable, *convert], check=True, capture_output=True)
    theirs, ours = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("stories260K", "out"))
    same = {key for key, field in theirs.fields.items() if field.contents() == ours.fields[key].contents()}
    assert theirs.fields.keys() == ours.fields.keys() and theirs.fields.keys() - same == {"general.name"}
    dense, pruned = ({tensor.name: tensor for tensor in reader.tensors} for reader in (theirs, ours))
    assert dense.keys() == pruned.keys()  # in the order of the shards
    changed = 0
    for name, tensor in dense.items():
        one, other = tensor.data, pruned[name].data
        assert tensor.tensor_type == pruned[name].tensor_type and ((one == other) | (other == 0)).all(), name
        changed += not np.array_equal(one, other)
    assert changed == 35
