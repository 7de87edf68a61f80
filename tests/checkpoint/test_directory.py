"""Broken and hostile checkpoints: each refused in one sentence that names the file or tensor."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from helpers import read_tensor, save_tiny
from safetensors.torch import load_file, save_file

from lowmem_wanda import prune
from lowmem_wanda.checkpoint import loading
from lowmem_wanda.checkpoint import reader as reading
from lowmem_wanda.checkpoint.directory import INDEX, Checkpoint
from lowmem_wanda.checkpoint.loading import is_local, read
from lowmem_wanda.checkpoint.reader import read_header
from lowmem_wanda.errors import CheckpointError, LowmemError
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.streaming.machine import READS


@pytest.fixture
def llama(tmp_path):
    return save_tiny(tmp_path / "llama", "llama")


@pytest.fixture
def single(tmp_path):
    return save_tiny(tmp_path / "single", "llama", shard="1GB")


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def shards(path):
    return sorted(path.glob("*.safetensors"))


def remap(llama, name, shard):
    index = llama / INDEX
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {name: shard})


def rewrite(file, change):
    """Changes the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def header(file, entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def only_bin(llama):
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, llama / "pytorch_model.bin")


def truncate(llama):
    file = shards(llama)[1]
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "no directory": (lambda p: p.rename(p.with_name("gone")), "no such directory"),
    "only .bin": (only_bin, r"pytorch_model\.bin.*never opened"),
    "shard missing": (lambda p: shards(p)[2].unlink(), r"model-00003-of.*cannot be read"),
    "shard truncated": (truncate, r"model-00002-of.*truncated"),
    "index is no JSON": (lambda p: (p / INDEX).write_text("{"), f"{INDEX}.*not valid JSON"),
    "index without map": (lambda p: (p / INDEX).write_text("{}"), "no weight_map"),
    "index lists too much": (lambda p: remap(p, "model.extra", shards(p)[0].name), "model.extra.*does not hold"),
    "index says elsewhere": (lambda p: remap(p, NORM, shards(p)[0].name), f"{NORM}.*{INDEX} says"),
    "absolute path": (lambda p: remap(p, NORM, "/etc/model.safetensors"), f"{NORM}.*/etc/model.safetensors"),
    "parent path": (lambda p: remap(p, NORM, "../llama/model-00001-of-00005.safetensors"), f"{NORM}.*not a safetensors file of this"),
    "index leaves one out": (
        lambda p: edit(p / INDEX, weight_map={k: v for k, v in json.loads((p / INDEX).read_text())["weight_map"].items() if k != NORM}),
        f"{NORM}.*does not list",
    ),
    "quantized by config": (lambda p: edit(p / "config.json", quantization_config={"quant_method": "gptq"}), "gptq"),
    "own code": (lambda p: edit(p / "config.json", auto_map={"AutoModelForCausalLM": "m.M"}), "--trust-remote-code"),
    "no causal LM": (lambda p: edit(p / "config.json", architectures=["LlamaForTokenClassification"]), "not a causal language"),
    "unknown family": (lambda p: edit(p / "config.json", model_type="nonesuch"), "config.json"),
    "config missing": (lambda p: (p / "config.json").unlink(), r"config\.json.*cannot be read"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
    "text for a number": (lambda p: edit(p / "config.json", hidden_size="abc"), r"config\.json: transformers cannot build"),
    "no heads": (lambda p: edit(p / "config.json", num_attention_heads=0), r"config\.json"),
    "negative width": (lambda p: edit(p / "config.json", intermediate_size=-5), r"config\.json"),
    "architectures is a number": (lambda p: edit(p / "config.json", architectures=5), "not a causal language"),
    "other shape": (lambda p: edit(p / "config.json", intermediate_size=128), r"\[64, 32\].*\[128, 32\]"),
    "tensor missing": (lambda p: edit(p / "config.json", num_hidden_layers=4), r"no tensor for model\.layers\.3"),
    "tensor without place": (lambda p: edit(p / "config.json", num_hidden_layers=2), r"model\.layers\.2.*has no place"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(llama, case):
    damage, message = BROKEN[case]
    damage(llama)
    with pytest.raises(LowmemError, match=message) as error:
        prepare(llama, method="magnitude")
    assert "\n" not in str(error.value)


SINGLE_BROKEN = {
    "packed integers": (lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int32)}), f"{Q}.*quantized"),
    "fp8": (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"{Q}.*quantized"),
    "integer norm": (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), f"{NORM}.*not floating"),
    "extra matrix": (
        lambda t: t.update({"model.layers.0.mlp.new.weight": torch.ones(2, 32)}),
        r"new\.weight.*has no place",
    ),
}


@pytest.mark.parametrize("case", SINGLE_BROKEN)
def test_broken_tensors_are_refused(single, case):
    change, message = SINGLE_BROKEN[case]
    rewrite(single / "model.safetensors", change)
    with pytest.raises(LowmemError, match=message):
        prepare(single, method="magnitude")


def test_a_single_file_beside_an_index_is_ambiguous(llama, single):
    (single / "model.safetensors").rename(llama / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        Checkpoint(llama)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "empty file": (b"", "truncated or not a safetensors file"),
    "no JSON": (b"{nonsense", "not valid JSON"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "twice": (b'{"a": {}, "a": {}}', "stands in it twice"),
    "entry is no object": ({"a": 3}, "tensor a is malformed"),
    "negative shape": ({"a": F32 | {"shape": [-2]}}, "malformed"),
    "boolean shape": ({"a": F32 | {"shape": [True]}}, "malformed"),
    "unknown dtype": ({"a": F32 | {"dtype": "F4"}}, "dtype F4"),
    "wrong length": ({"a": F32 | {"shape": [3]}}, r"needs 12 bytes but has 8"),
    "past the end": ({"a": F32 | {"data_offsets": [8, 16]}}, "starts at byte"),
    "overlap": ({"a": F32, "b": F32}, "starts at byte"),
    "trailing bytes": ({"a": F32 | {"shape": [1], "data_offsets": [0, 4]}}, "too long"),
    "huge": ({"a": F32 | {"shape": [2**62, 2**62]}}, "needs"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_checked_before_they_are_believed(tmp_path, case):
    entries, message = HEADERS[case]
    file = tmp_path / "model.safetensors"
    header(file, entries, b"\0" * 8) if entries else file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="no safetensors header"):
        Checkpoint(tmp_path)


def test_tensors_are_read_as_safetensors_reads_them(llama):
    checkpoint = Checkpoint(llama)
    for file in checkpoint.files:
        for name, expected in load_file(file).items():
            tensor = checkpoint.tensors[name]
            assert torch.equal(read_tensor(tensor), expected)
            assert b"".join(tensor.pieces(7)) == expected.numpy().tobytes()


def test_empty_entries_of_a_config_mean_nothing(llama):
    edit(llama / "config.json", auto_map={}, quantization_config={})
    assert len(prepare(llama, method="magnitude").selected) == 3


def test_a_snapshot_of_symlinks_works(llama, tmp_path):
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(llama.iterdir()):
        blob = tmp_path / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    assert len(prepare(snapshot, method="magnitude").selected) == 3


def destinations(checkpoint):
    return [(tensor, np.empty(tensor.nbytes, np.uint8)) for tensor in checkpoint.tensors.values()]


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("drop", [False, True])
def test_every_way_of_reading_brings_the_same_bytes(llama, way, drop):
    wanted = destinations(Checkpoint(llama))
    taken = {"auto": {"mmap"} if is_local(llama) else {"pread"}}.get(way, {way})
    assert read(wanted, way, drop) == taken
    for tensor, out in wanted:
        assert out.tobytes() == b"".join(tensor.pieces())


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize(
    "change", [lambda file: file.write_bytes(file.read_bytes()[:2000]), lambda file: os.utime(file, (1, 1))]
)
def test_a_file_that_changes_is_an_error_not_a_crash(single, way, change):
    checkpoint = Checkpoint(single)
    change(single / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed or cut short while this ran, found at tensor"):
        read(destinations(checkpoint), way)
    with pytest.raises(CheckpointError, match="changed or cut short"):
        list(max(checkpoint.tensors.values(), key=lambda tensor: tensor.offset).pieces())


def test_a_file_that_shrinks_while_it_is_read_is_an_error(single, monkeypatch):
    wanted = destinations(Checkpoint(single))
    monkeypatch.setattr(reading, "stamp", lambda file: wanted[0][0].stamp)  # as if it happened after the look
    (single / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="changed or cut short"):
        read(wanted)


def test_old_buffers_are_copied_through(tmp_path, token_file):
    """Old GPT-2 files hold the causal mask as attn.bias; transformers ignores it, so it is no error."""
    path = save_tiny(tmp_path / "gpt2", "gpt2", shard="1GB")
    rewrite(path / "model.safetensors", lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    started = []
    prune(path, tmp_path / "out", text=[str(token_file)], on_start=started.append)
    assert started[0]["untouched"] == ["transformer.h.0.attn.bias"]
    assert "transformer.h.0.attn.bias" in Checkpoint(tmp_path / "out").tensors


def mount(number, place, kind, root="/"):
    return f"36 35 {number} {root} {place} rw,noatime master:1 - {kind} /dev/root rw,errors=continue\n"


def test_only_local_disks_are_mapped(tmp_path, monkeypatch):
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(loading, "MOUNTS", table)
    cases = {
        mount(number, "/", "ext4"): True,
        mount(number, "/home", "nfs4"): False,
        mount(number, "/home", "fuse.sshfs"): False,
        mount("0:77", "/", "xfs") + mount("0:78", str(tmp_path), "btrfs"): True,  # files of btrfs have other numbers
        mount("0:77", "/", "xfs") + mount("0:78", str(tmp_path), "9p"): False,
        "": False,
    }
    for text, expected in cases.items():
        table.write_text(text)
        is_local.cache_clear()
        assert is_local(tmp_path) == expected, text
    table.unlink()
    is_local.cache_clear()
    assert not is_local(tmp_path)
    is_local.cache_clear()


def test_what_cannot_be_mapped_is_read(llama, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(19, "No such device")

    monkeypatch.setattr(loading, "is_local", lambda folder: True)
    monkeypatch.setattr(loading.mmap, "mmap", refused)
    wanted = destinations(Checkpoint(llama))
    assert read(wanted) == {"pread"}
    assert all(out.tobytes() == b"".join(tensor.pieces()) for tensor, out in wanted)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(wanted, "mmap")
