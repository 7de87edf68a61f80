"""The table of refusals: each names the file or flag, the cause as it is, and a next move; exit code 1, nothing changed."""

import errno
import json
import os
import sys

import pytest
import torch
from helpers import contents, save_tiny
from safetensors.torch import load_file, save_file

from lowmem_wanda.checkpoint import writer
from lowmem_wanda.cli.main import main

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064d}\nsize 13476835328\n"


def write(name, content):
    return lambda source: (source / name).write_text(content)


def adapter(source):
    for file in source.iterdir():
        file.unlink()
    save_file({"lora_A.weight": torch.ones(4, 8)}, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def vendor(source):
    for file in source.iterdir():
        file.unlink()
    save_file({"layers.0.wq.weight": torch.ones(4, 8)}, source / "consolidated.safetensors")


def renamed(prefix):
    def work(source):
        tensors = load_file(source / "model.safetensors")
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, source / "model.safetensors")

    return work


def spoiled(source):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, source / "model.safetensors")


def config(**changes):
    def work(source):
        file = source / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return work


def marked(source):
    file = source / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def nested(source):
    (source / "model.safetensors").unlink()
    (source / "weights").mkdir()
    (source / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "weights/model-00001-of-00001.safetensors"}}'
    )


def nothing(source):
    pass


def sentencepiece(source):
    (source / "tokenizer.model").write_bytes(b"x")


TABLE = {  # name: what is done to the source, flags, what is said
    "adapter": (adapter, [], ["holds an adapter of org/base, not a model", "merge it"]),
    "vendor's format": (vendor, [], ["consolidated.safetensors", "Hugging Face's format"]),
    "pointer": (write("model.safetensors", POINTER), [], ["model.safetensors: is a pointer of Git LFS", "git lfs pull"]),
    "pointer of a tokenizer": (write("tokenizer.json", POINTER), [], ["tokenizer.json: is a pointer of Git LFS", "git lfs pull"]),
    "wrapped": (renamed("_orig_mod."), [], ["model.safetensors", "begin with '_orig_mod.'", "save the model within"]),
    "NaN": (spoiled, ["--method", "magnitude"], ["model.norm.weight holds NaN or infinity", "download it again"]),
    "layers": (config(num_hidden_layers=10**9), [], ["config.json: num_hidden_layers is 1000000000", "get the config.json"]),
    "byte order mark": (marked, [], ["config.json: begins with a byte order mark", "save it without"]),
    "shards in a folder": (nested, [], ["'weights/model-00001-of-00001.safetensors'", "put all shards beside the index"]),
    "no tokenizer": (nothing, [], ["its tokenizer cannot be loaded", "add a tokenizer.json", "or give token ids"]),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), [], ["config.json: quantization_config says gptq", "prune the unquantized"]),
    "own code": (config(auto_map={"AutoModelForCausalLM": "m.M"}), [], ["config.json: auto_map", "--trust-remote-code"]),
    "no such text": (nothing, ["--text", "none.txt"], ["none.txt: cannot be read", "give a text file"]),
    "pattern": (nothing, ["--pattern", "2:" + "9" * 5000], ["--pattern|pattern", "2:4"]),
    "memory of nothing": (nothing, ["--max-ram", "0", "--method", "magnitude"], ["--max-ram", "give --max-ram"]),
    "device": (nothing, ["--device", "cuda:99"], ["--device cuda:99 is not available here", "give cpu or auto"]),
    "too small a memory": (nothing, ["--max-ram", "1MB", "--method", "magnitude"], ["--max-ram", "would fit", "give --max-ram"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_a_refusal_says_what_and_what_next(tmp_path, capsys, case):
    change, flags, said = TABLE[case]
    source = save_tiny(tmp_path / "source", "llama", shard="1GB")
    change(source)
    before = contents(source)
    assert main(["prune", str(source), str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and len(error) < 1100 and "report this bug" not in error
    for words in said:
        assert any(word in error for word in words.split("|")), error
    assert contents(source) == before and not (tmp_path / "out/config.json").exists()


def test_sizes_that_are_none_are_wrong_usage(tmp_path, capsys):
    for size in ("9" * 5000, "-1GB", "many"):
        with pytest.raises(SystemExit) as stopped:
            main(["prune", "a", "b", "--max-ram", size])
        assert stopped.value.code == 2 and "--max-ram" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
@pytest.mark.parametrize("kind", ["loop", "dangling", "file"])
def test_targets_that_are_no_folders(tmp_path, capsys, kind):
    source, out = save_tiny(tmp_path / "source", "llama"), tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(out if kind == "loop" else tmp_path / "gone")
    assert main(["prune", str(source), str(out), "--method", "magnitude"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(out) in error and "Traceback" not in error and "report this bug" not in error
    assert {"loop": "link", "dangling": "link to a folder that is not there", "file": "give a new or empty directory"}[
        kind
    ] in error


@pytest.mark.parametrize(
    ("number", "move"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "make the directory writable"),
    ],
)
def test_errors_of_the_system_have_a_move(tmp_path, monkeypatch, capsys, number, move):
    source = save_tiny(tmp_path / "source", "llama")

    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer.os, "write", failing)
    assert main(["prune", str(source), str(tmp_path / "out"), "--method", "magnitude"]) == 1
    assert move in capsys.readouterr().err.splitlines()[-1]


def test_a_shard_that_is_removed_meanwhile(tmp_path, capsys, monkeypatch):
    from lowmem_wanda import prune
    from lowmem_wanda.errors import OutputError

    source = save_tiny(tmp_path / "source", "llama")
    with pytest.raises(
        OutputError,
        match="model-0000[12]-of-00004.safetensors: was removed while the job ran; run the same command again",
    ):
        prune(source, tmp_path / "out", method="magnitude", slots=1,
              on_block=lambda record: record["index"] == 2 and (tmp_path / "out/model-00002-of-00004.safetensors").unlink())  # fmt: skip
    assert main(["prune", str(source), str(tmp_path / "out"), "--method", "magnitude"]) == 0
