"""Small files: which are copied, which are left out and said, and none that changed or lies elsewhere."""

import json
import os
import threading

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import save_file

from lowmem_wanda import Checkpoint, check, prune
from lowmem_wanda.errors import CheckpointError, OutputError


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", "llama", shard="1GB")


def pruned(source, out, **settings):
    """The facts of a pruning that copies at once."""
    facts = {}
    report = prune(source, out, method="magnitude", on_start=facts.update, **settings)
    assert {key: report[key] for key in ("left_out_files", "untouched")} == {
        key: facts[key] for key in ("left_out_files", "untouched")
    }
    return report


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "LICENSE", "extra.json", "notes.jinja"])
def test_links_out_of_the_folder_are_not_followed(source, tmp_path, name):
    (tmp_path / "secret").write_text("a key of mine")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    report = pruned(source, tmp_path / "out")
    assert report["left_out_files"] == {name: "is a link out of the folder"} and not (tmp_path / "out" / name).exists()
    assert not check(tmp_path / "out", source).problems


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_a_file_that_the_model_needs_must_be_there_itself(source, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (source / name).rename(elsewhere) if (source / name).exists() else elsewhere.write_text("{}")
    (source / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*elsewhere, out of the folder"):
        pruned(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_the_folder_and_into_a_caches_blobs_are_followed(source, tmp_path):
    blobs, snapshot = tmp_path / "models--org--tiny/blobs", tmp_path / "models--org--tiny/snapshots/abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for file in source.iterdir():
        file.rename(blobs / f"sum-of-{file.name}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"sum-of-{file.name}", snapshot))
    (snapshot / "README.md").write_text("a card")
    (snapshot / "LICENSE").symlink_to("README.md")
    report = pruned(snapshot, tmp_path / "out")
    assert not report["left_out_files"] and {"config.json", "README.md", "LICENSE"} <= set(report["copied_files"])
    assert (tmp_path / "out/LICENSE").read_text() == "a card" and not (tmp_path / "out/LICENSE").is_symlink()
    assert not check(tmp_path / "out", snapshot).problems


def test_an_adapter_beside_the_model_is_left_out(source, tmp_path):
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.lora_A.weight": torch.ones(4, 64)}, source / "adapter_model.safetensors")
    report = pruned(source, tmp_path / "out")
    assert "not merged" in report["left_out_files"]["adapter_config.json"]
    assert not list((tmp_path / "out").glob("adapter*")) and not check(tmp_path / "out", source).problems


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v3", "tokenizer.vocab", "vocab.spm", "tokenizer.model", "qwen.tiktoken", "tekken.json"]
)
def test_tokenizers_of_every_kind_are_copied_and_missed(source, tmp_path, name):
    (source / name).write_bytes(b"words")
    pruned(source, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    assert check(tmp_path / "out", source).problems == [f"{name}: is missing or differs from the source's"]


OTHERS = {
    "an adapter": (
        ["adapter_model.safetensors", "adapter_config.json"],
        "holds an adapter of org/base, not a model; merge it",
    ),
    "an adapter without words": (["adapter_model.safetensors"], "holds an adapter, not a model"),
    "Meta's format": (["consolidated.safetensors", "params.json"], "consolidated.safetensors, the vendor's own format"),
    "Mistral's shards": (["consolidated-00001-of-00002.safetensors"], "the vendor's own format"),
    "a cache's root": (["refs", "blobs"], "neither model.safetensors"),
}


@pytest.mark.parametrize(("files", "message"), OTHERS.values(), ids=list(OTHERS))
def test_what_is_no_model_is_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "README.md"])
def test_a_pointer_of_git_lfs_is_named(source, tmp_path, name):
    (source / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\\noid sha256:{0:064d}\\nsize 13476835328\\n"
    )
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of Git LFS.*git lfs pull"):
        pruned(source, tmp_path / "out")


def test_a_pointer_among_whole_shards_is_named(tmp_path):
    source = save_tiny(tmp_path / "source", "llama")
    shard = sorted(source.glob("*.safetensors"))[2]
    shard.write_text("version https://git-lfs.github.com/spec/v1\\noid sha256:0\\nsize 1\\n")
    with pytest.raises(CheckpointError, match=f"{shard.name}: is a pointer of Git LFS"):
        Checkpoint(source)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_edited_during_the_run_is_not_published(source, tmp_path, name):
    original = (source / name).read_text()

    def edit(record):
        (source / name).write_text(original.replace("}", ' , "x": 1}', 1))

    with pytest.raises(OutputError, match=f"{name}: was changed while the job ran"):
        prune(source, tmp_path / "out", method="magnitude", on_block=edit)
    assert not (tmp_path / "out/config.json").exists()
    (source / name).write_text(original)
    prune(source, tmp_path / "out", method="magnitude")
    assert (tmp_path / "out" / name).read_text() == original


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_nothing_waits_for_a_pipe(source, tmp_path, name, kind):
    (source / name).unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}
    make[kind](source / name)
    found = []

    def work():
        try:
            pruned(source, tmp_path / "out")
        except CheckpointError as error:
            found.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert not found or name in found[0]
    assert found or kind == "folder"  # a folder of that name is passed over


@pytest.mark.parametrize("name", [".lock", ".progress.jsonl", "job.json"])
def test_nothing_waits_for_a_pipe_in_the_target(source, tmp_path, name):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(OutputError):
        pruned(source, tmp_path / "out")


def test_a_source_that_changed_with_its_time_kept_is_noticed(source, tmp_path):
    """As `rsync -t` and restored snapshots leave it."""
    file = source / "model.safetensors"
    before = file.stat()

    def change(record):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(CheckpointError, match="model.safetensors: was changed or cut short"):
        prune(source, tmp_path / "out", method="magnitude", on_block=change, slots=1)


def test_all_bytes_of_the_source_are_seen_where_it_is_asked_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.checkpoint.directory.WHOLE", 0)
    monkeypatch.setattr("lowmem_wanda.checkpoint.directory.SAMPLE", 8)
    for verify in (False, True):
        out = tmp_path / f"{verify}"
        report = prune(source, out, method="magnitude", verify_source=verify)
        assert report["source_seen"] == (1.0 if verify else 8 / (4 << 20))
        (out / "config.json").unlink()
        data = bytearray((source / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (source / "model.safetensors").write_bytes(data)
        facts = {}
        if verify:
            with pytest.raises(OutputError, match="holds a job with --verify-source"):
                prune(source, out, method="magnitude", verify_source=True)
        else:
            prune(source, out, method="magnitude", on_start=facts.update)
            assert facts["resumed"] and facts["source_seen"] < 1


def test_matrices_outside_the_blocks_are_named(source, tmp_path):
    report = pruned(source, tmp_path / "out")
    assert report["dense_outside"] == ["lm_head.weight", "model.embed_tokens.weight"]
    held = sum(tensor.numel for tensor in Checkpoint(source).tensors.values())
    assert report["dense_outside_share"] == pytest.approx(2 * 96 * 32 / held)


def test_a_card_of_any_size_is_copied_in_pieces(source, tmp_path):
    import resource
    import subprocess
    import sys

    with open(source / "README.md", "wb") as file:
        file.truncate(1 << 30)
    code = f"import lowmem_wanda; lowmem_wanda.prune({str(source)!r}, {str(tmp_path / 'out')!r}, method='magnitude')"
    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (900 << 20,) * 2)
    )
    assert done.returncode == 0 and (tmp_path / "out/README.md").stat().st_size == 1 << 30
