"""The importance matrix: its two formats to the byte, its names, whose inputs it is of, and pruning by one."""

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FAMILIES, digests, opened, save_tiny
from transformers import AutoModelForCausalLM

from lowmem_wanda import prune
from lowmem_wanda.cli.main import main
from lowmem_wanda.data.calibration import Calibration
from lowmem_wanda.errors import CalibrationError, CheckpointError, ModelError, OutputError
from lowmem_wanda.llamacpp import names as naming
from lowmem_wanda.llamacpp.collect import collect
from lowmem_wanda.llamacpp.imatrix import About, Entry, read, write
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.pruning.prune import run
from lowmem_wanda.streaming.machine import Machine

BINARIES = os.environ.get("LLAMA_CPP_BIN")  # where llama-imatrix, llama-quantize and llama-tokenize are, if anywhere
ENTRIES = {
    "blk.0.ffn_up.weight": Entry(np.array([[2.0, 4.0, 8.0]]), np.array([8])),
    "blk.0.ffn_up_exps.weight": Entry(np.array([[1.0, 2.0], [3.0, 9.0]]), np.array([2, 6])),
}
SHAPES = {name: entry.sums.shape for name, entry in ENTRIES.items()}
ABOUT = About(("a.txt", "b.txt"), 2, 4)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def golden_gguf():
    """The file of ENTRIES by the GGUF specification, version 3: little-endian, tensors aligned to 32 bytes, the
    first dimension the one that runs fastest."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    head += string("general.type") + struct.pack("<I", 8) + string("imatrix")
    head += string("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2) + string("a.txt") + string("b.txt")
    head += string("imatrix.chunk_count") + struct.pack("<II", 4, 2)
    head += string("imatrix.chunk_size") + struct.pack("<II", 4, 4)
    tensors = [
        ("blk.0.ffn_up.weight.in_sum2", (3,), (2, 4, 8)),
        ("blk.0.ffn_up.weight.counts", (1,), (8,)),
        ("blk.0.ffn_up_exps.weight.in_sum2", (2, 2), (1, 2, 3, 9)),
        ("blk.0.ffn_up_exps.weight.counts", (1, 2), (2, 6)),
    ]
    data = b""
    for name, shape, values in tensors:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values).ljust(32, b"\0")
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def golden_dat():
    """The same in the older format: chunks are counted up, values are means times that."""
    made = struct.pack("<i", 2)
    for name, calls, values in (
        ("blk.0.ffn_up.weight", 2, (0.5, 1, 2)),
        ("blk.0.ffn_up_exps.weight", 2, (1, 2, 1, 3)),
    ):
        made += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        made += struct.pack(f"<{len(values)}f", *values)
    return made + struct.pack("<ii", 2, 5) + b"b.txt"


@pytest.mark.parametrize(("suffix", "golden"), [(".gguf", golden_gguf()), (".dat", golden_dat())])
def test_files_are_the_formats_to_the_byte(tmp_path, suffix, golden):
    path = tmp_path / f"imatrix{suffix}"
    write(path, SHAPES, ENTRIES.items(), ABOUT)
    assert path.read_bytes() == golden and list(tmp_path.iterdir()) == [path]
    found, about = read(path)
    assert list(found) == list(ENTRIES) and about.chunks == 2
    means = found["blk.0.ffn_up.weight"].means
    assert np.array_equal(means, ENTRIES["blk.0.ffn_up.weight"].means)
    if suffix == ".gguf":
        assert about == ABOUT
        assert np.array_equal(found["blk.0.ffn_up_exps.weight"].means, [[0.5, 1], [0.5, 1.5]])


def test_an_expert_that_saw_nothing_has_ones_in_the_older_format(tmp_path):
    entry = Entry(np.array([[4.0, 8.0], [0.0, 0.0]]), np.array([4, 0]))
    write(tmp_path / "a.dat", {"x": (2, 2)}, [("x", entry)], About(("t",), 1, 4))
    assert np.array_equal(read(tmp_path / "a.dat")[0]["x"].sums, [[1, 2, 1, 1]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        golden_gguf()[:200],
        golden_gguf()[:-40],
        golden_dat()[:30],
        struct.pack("<i", 0),
        struct.pack("<ii", 5, 1 << 30),
        struct.pack("<i", 1) + struct.pack("<i", -1),
        b'{"a": 1}' * 9,
    ],
)
def test_files_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.gguf: "):
        read(tmp_path / "x.gguf")


def hostile(*values):
    """A GGUF of one key."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a") + b"".join(struct.pack(*value) for value in values)


@pytest.mark.parametrize(
    "content",
    [hostile(("<IIQ", 9, 0, 1 << 40)), hostile(("<IIQ", 9, 8, 1 << 40)), hostile(*[("<IIQ", 9, 9, 1)] * 3000)],
    ids=["long", "long strings", "nested"],
)
def test_a_gguf_that_promises_too_much_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        read(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("chunk_count", "many"), ("chunk_size", float("nan")), ("datasets", 7), ("chunk_count", [1, 2]), ("counts", 0)],
)
def test_an_importance_matrix_that_says_nonsense_is_refused(tmp_path, key, value):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    if key != "counts":
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](f"imatrix.{key}", value)
    writer.add_tensor("a.in_sum2", np.ones(4, np.float32))
    writer.add_tensor("a.counts", np.full(1 if key != "counts" else 4, np.nan if key == "counts" else 1, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(CheckpointError, match="x.gguf: "):
        read(tmp_path / "x.gguf")


def test_a_gguf_without_sums_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(CheckpointError, match="not an importance matrix"):
        read(tmp_path / "model.gguf")


LLAMA = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
FUSED = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
NAMES = {
    **dict.fromkeys(FAMILIES, LLAMA),
    **dict.fromkeys(("gpt2", "gpt_neox", "falcon", "bloom", "mpt", "phi3"), FUSED),
    **dict.fromkeys(("phi", "starcoder2"), {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"}),
    "glm4": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"},
}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_names_are_llama_cpps(tiny, family):
    names = gguf_names([matrix.name for block in opened(tiny(family)).skeleton.matrices for matrix in block], "x")
    assert set(names.values()) == {f"blk.{index}.{kind}.weight" for index in range(3) for kind in NAMES[family]}


def test_a_family_without_names_is_an_error_and_still_pruned(tiny, token_file, tmp_path):
    with pytest.raises(ModelError, match=r"tensor model.decoder.layers.0.*no name for it.*--imatrix"):
        prepare(tiny("opt"), text=[str(token_file)], imatrix=tmp_path / "x.gguf")
    report = prune(tiny("opt"), tmp_path / "out", text=[str(token_file)])
    assert report["summary"]["sparsity"] == 0.5


def test_tensors_that_would_share_a_name_are_an_error(monkeypatch):
    monkeypatch.setattr(naming, "_kind", lambda name: "model.layers.0.mlp.up_proj")
    with pytest.raises(ModelError, match=r"several tensors .* are blk.0.ffn_up.weight"):
        gguf_names(["model.layers.0.a.weight", "model.layers.0.b.weight"], "x")


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
        gguf_names([one.name for block in work.skeleton.matrices for one in block], "x"),
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
    assert measured(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "a.gguf").read_bytes()
    prune(tiny("llama"), tmp_path / "without", **same, **settings)
    ours, theirs = (digests(tmp_path / name) for name in ("out", "without"))
    assert {**ours, "job.json": ""} == {**theirs, "job.json": ""}


def measured(path, token_file, out):
    """The bytes of a checkpoint's importance matrix, by the command for that."""
    work = opened(path, batch=4)
    collect(work, Calibration(np.load(token_file), (Path(token_file).name,)), out)
    return out.read_bytes()


def test_what_a_killed_run_left_is_cleared_away(tiny, token_file, tmp_path):
    left = tmp_path / ".x.gguf.blocks"
    left.mkdir()
    (left / "sums").write_text("x")
    measured(tiny("llama"), token_file, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_in_the_dense_order_it_is_the_dense_models(tiny, token_file, tmp_path):
    prune(
        tiny("llama"),
        tmp_path / "out",
        text=[str(token_file)],
        batch=4,
        statistics="dense",
        imatrix=tmp_path / "a.gguf",
    )
    assert measured(tiny("llama"), token_file, tmp_path / "b.gguf") == (tmp_path / "a.gguf").read_bytes()


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
        patch.setattr(f"lowmem_wanda.pruning.prune.{last}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(tiny("llama"), tmp_path / "out", **settings)
    assert (tmp_path / "x.gguf").exists() == (last != "save_imatrix")
    for _ in range(2):  # once more is no error
        prune(tiny("llama"), tmp_path / "out", **settings)
        assert not (tmp_path / "out/.imatrix").exists()
    assert measured(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "x.gguf").read_bytes()
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
    assert measured(tmp_path / "out", token_file, tmp_path / "b.gguf") == path.read_bytes()
    path.write_text("mine")
    with pytest.raises(OutputError, match="is not the importance matrix"):
        run(job, tmp_path / "out")
    work = opened(tiny("llama"))
    with pytest.raises(OutputError, match="exists, and is not replaced"):
        collect(work, job.calibration, tmp_path / "y.gguf", lambda record: (tmp_path / "y.gguf").write_text("mine"))


def test_a_damaged_store_is_recorded_again(tiny, token_file, tmp_path, monkeypatch):
    job = prepare(tiny("llama"), text=[str(token_file)], imatrix=tmp_path / "x.gguf", machine=Machine(batch=4))
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_wanda.pruning.prune.save_imatrix", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "out")
    damaged = sorted((tmp_path / "out/.imatrix").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="was damaged; run the same command again"):
        run(job, tmp_path / "out")
    run(job, tmp_path / "out")
    assert measured(tmp_path / "out", token_file, tmp_path / "b.gguf") == (tmp_path / "x.gguf").read_bytes()


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
    assert measured(tmp_path / "out", other, tmp_path / "b.gguf") == (tmp_path / "y.gguf").read_bytes()
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
    monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace(ReaderField=int))
    assert main(["survive", str(tmp_path / "out")]) == 1
    assert "pip install --upgrade gguf" in capsys.readouterr().err


def test_pruning_by_norms_is_the_dense_order(tiny, token_file, tmp_path):
    """Two formats, and no forward pass."""
    same = {"text": [str(token_file)], "batch": 4, "pattern": "50%"}
    prune(tiny("llama"), tmp_path / "dense", statistics="dense", imatrix=tmp_path / "x.gguf", **same)
    measured(tiny("llama"), token_file, tmp_path / "x.dat")
    for suffix in ("gguf", "dat"):
        out = tmp_path / suffix
        report = prune(tiny("llama"), out, pattern="50%", norms=str(tmp_path / f"x.{suffix}"))
        assert report["summary"]["forward_passes_per_block"] == 0
        shards = [{key: value for key, value in digests(path).items() if key.startswith("model-")} for path in
                  (out, tmp_path / "dense")]  # fmt: skip
        assert shards[0] == shards[1]


def test_norms_and_the_pruned_models_matrix_go_together(tiny, token_file, tmp_path):
    measured(tiny("llama"), token_file, tmp_path / "x.gguf")
    settings = {"norms": tmp_path / "x.gguf", "imatrix": tmp_path / "y.gguf", "text": [str(token_file)], "batch": 4}
    prune(tiny("llama"), tmp_path / "out", **settings)
    assert measured(tmp_path / "out", token_file, tmp_path / "z.gguf") == (tmp_path / "y.gguf").read_bytes()


def test_norms_that_do_not_fit_are_named(tiny, token_file, tmp_path):
    measured(tiny("llama"), token_file, tmp_path / "x.gguf")
    entries, about = read(tmp_path / "x.gguf")
    name = "blk.1.ffn_down.weight"
    cases = {
        f"no entry {name}": {key: entry for key, entry in entries.items() if key != name},
        f"entry {name} has 5 values, tensor model.layers.1.mlp.down_proj.weight has 64": {
            **entries, name: Entry(np.ones((1, 5)), np.array([1]))},
        f"entry {name} was measured on no token": {**entries, name: Entry(np.ones((1, 64)), np.array([0]))},
        f"entry {name} holds numbers": {**entries, name: Entry(np.full((1, 64), np.nan), np.array([1]))},
    }  # fmt: skip
    for place, (says, changed) in enumerate(cases.items()):
        path = tmp_path / f"{place}.gguf"
        write(path, {key: entry.sums.shape for key, entry in changed.items()}, changed.items(), about)
        with pytest.raises(CalibrationError, match=says):
            prepare(tiny("llama"), norms=str(path))
        prepare(tiny("llama"), norms=str(path), exclude=["*layers.1.mlp.down_proj*"])
    for useless in ({"method": "magnitude"}, {"statistics": "dense"}, {"text": [str(token_file)]}):
        with pytest.raises(CalibrationError, match=f"--{[*useless][0]} .* has no use"):
            prepare(tiny("llama"), norms=str(tmp_path / "x.gguf"), **useless)


def test_a_job_by_other_norms_is_another_job(tiny, token_file, tmp_path):
    measured(tiny("llama"), token_file, tmp_path / "x.gguf")
    measured(save_tiny(tmp_path / "other", "llama", seed=1), token_file, tmp_path / "y.gguf")
    prune(tiny("llama"), tmp_path / "out", norms=str(tmp_path / "x.gguf"))
    shutil.copy(tmp_path / "y.gguf", tmp_path / "x.gguf")
    with pytest.raises(OutputError, match="--norms sha256"):
        prune(tiny("llama"), tmp_path / "out", norms=str(tmp_path / "x.gguf"))


@pytest.mark.slow
@pytest.mark.real
def test_real_models_by_published_norms_lie_between_wanda_and_magnitude(shared, tmp_path):
    from lowmem_wanda.evaluation.evaluate import windows_for
    from lowmem_wanda.evaluation.perplexity import evaluate_model

    source, stories = shared / "models/stories260K", shared / "corpora/tinystories"
    text = [str(stories / "calibration.txt")]
    work = opened(source)
    job = prepare(source, text=text, sequences=64, length=512)
    collect(work, job.calibration, tmp_path / "dense.gguf")
    prune(source, tmp_path / "norms", pattern="50%", norms=str(tmp_path / "dense.gguf"))
    prune(source, tmp_path / "wanda", pattern="50%", text=text, sequences=64, length=512)
    prune(source, tmp_path / "magnitude", pattern="50%", method="magnitude")
    windows = windows_for(work, [str(stories / "held-out.txt")], 512, windows=40)
    value = {
        name: evaluate_model(opened(tmp_path / name), windows)["perplexity"] for name in ("wanda", "norms", "magnitude")
    }
    assert value["wanda"] < value["norms"] < 1.2 * value["wanda"] < value["magnitude"]


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
