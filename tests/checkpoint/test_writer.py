"""Exact bytes, modes, and files that are whole or not there."""

import errno
import hashlib
import os
import stat
import sys

import pytest
from safetensors import safe_open

from lowmem_wanda import check, prune
from lowmem_wanda.checkpoint import checksum, writer
from lowmem_wanda.checkpoint.checksum import FASTEST, digest_of, matches
from lowmem_wanda.checkpoint.companions import companions
from lowmem_wanda.checkpoint.reader import Tensor, read_header
from lowmem_wanda.checkpoint.writer import write_bytes, write_shard
from lowmem_wanda.errors import CheckpointError, OutputError


def tensors(tmp_path):
    """One of two bytes an item, one of four: written the larger first."""
    return [
        (Tensor("b", tmp_path, "BF16", (3,), 0, 6), [b"\1\2\3\4", b"\5\6"]),
        (Tensor("ü", tmp_path, "F32", (1, 2), 0, 8), [memoryview(b"abcdefgh")]),
    ]


def test_a_shard_to_the_byte(tmp_path):
    file = tmp_path / "s.safetensors"
    shard = write_shard(file, tensors(tmp_path))
    text = '{"__metadata__":{"format":"pt"},"ü":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}'
    header = text.encode() + b" " * (-len(text.encode()) % 8)
    assert file.read_bytes() == len(header).to_bytes(8, "little") + header + b"abcdefgh\1\2\3\4\5\6"
    assert (shard.name, shard.nbytes) == (file.name, file.stat().st_size)
    assert shard.checksum == {FASTEST: digest_of(file, FASTEST)} and matches(file, shard.checksum)
    assert read_header(file)["b"].shape == (3,)
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("b").shape == (3,)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_mode_is_what_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_shard(tmp_path / "s.safetensors", tensors(tmp_path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_bytes(b"before")
    calls = []

    def write(handle, content):  # goes short once, then fails, as the system does
        calls.append(len(content))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return 1

    monkeypatch.setattr(writer.os, "write", write)
    with pytest.raises(OutputError, match=r"config\.json: the disk is full.*same command"):
        write_bytes(file, b"after")
    assert calls == [5, 4]
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


def test_an_interrupt_leaves_nothing(tmp_path):
    def pieces():
        yield b"\1\2"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "s.safetensors", [(Tensor("b", tmp_path, "BF16", (3,), 0, 6), pieces())])
    assert list(tmp_path.iterdir()) == []


def test_small_files_are_never_weights_or_code(tmp_path):
    kept = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "merges.txt", "tokenizer.model", "vocab.json"]
    left = ["a.py", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
            "job.json", "report.json", ".gitattributes", "model.gguf", "train.pt", "README.py", "license.bin", "NOTICE.exe"]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).write_text("x")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("x")
    assert [str(path) for path in companions(tmp_path).files] == sorted(["additional_chat_templates/tool.jinja", *kept])
    assert "a.py" in [path.name for path in companions(tmp_path, code=True).files]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_tensor_is_copied_from_its_own_file(tmp_path, monkeypatch, kernel):
    content = bytes(range(256)) * 64
    (tmp_path / "source").write_bytes(b"head" + content)
    tensor = Tensor("a", tmp_path / "source", "U8", (len(content),), 4, len(content))
    calls = []
    copy = writer.copy_range
    monkeypatch.setattr(writer, "copy_range", lambda *args: calls.append(copy(*args) if kernel else 0) or calls[-1])
    shard = write_shard(tmp_path / "s.safetensors", [(tensor, None)])
    assert (tmp_path / "s.safetensors").read_bytes().endswith(content)
    assert matches(tmp_path / "s.safetensors", shard.checksum) and len(calls) == 1


def test_what_is_written_is_sent_to_the_disk_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE", 4096)
    sent, ended = [], []
    monkeypatch.setattr(writer, "start_writeback", lambda handle, start, nbytes: sent.append((start, nbytes)))
    monkeypatch.setattr(writer, "end_writeback", lambda handle, start, nbytes: ended.append(start))
    content = os.urandom(5 * 4096 + 7)
    write_bytes(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    assert sent == [(4096 * number, 4096) for number in range(5)] and ended == [0, 4096, 8192]


def test_a_shard_that_is_not_as_long_as_its_header_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="were written where its header promises"):
        write_shard(tmp_path / "s.safetensors", [(Tensor("b", tmp_path, "BF16", (3,), 0, 6), [b"\1\2"])])
    assert list(tmp_path.iterdir()) == []


def test_space_is_taken_before_the_first_byte(tmp_path, monkeypatch):
    def full(handle, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "preallocate", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_shard(tmp_path / "s.safetensors", tensors(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems lack does nothing")
def test_what_linux_does_with_files(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        writer.preallocate(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_size == 1 << 20
        writer.start_writeback(file.fileno(), 0, 4096)
        writer.end_writeback(file.fileno(), 0, 4096)
        writer.forget(file.fileno())


def test_a_full_disk_is_the_targets_trouble_when_a_tensor_is_copied(tmp_path, monkeypatch):
    def full(handle, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(bytes(6))
    write = os.write
    monkeypatch.setattr(writer, "copy_range", lambda *args: 0)
    monkeypatch.setattr(
        writer.os, "write", lambda handle, content: (full if len(content) == 6 else write)(handle, content)
    )
    with pytest.raises(OutputError, match="the disk is full"):
        write_shard(tmp_path / "s.safetensors", [(Tensor("b", tmp_path / "source", "BF16", (3,), 0, 6), None)])


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems lack does nothing")
def test_what_could_not_be_written_is_told(monkeypatch):
    monkeypatch.setattr(writer, "library", lambda name: lambda *args: -1)
    monkeypatch.setattr(writer.ctypes, "get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        writer.end_writeback(0, 0, 4096)


def test_a_job_that_began_with_sha256_goes_on(source, token_file, tmp_path, monkeypatch):
    settings = {"text": [str(token_file)], "batch": 4}

    def stop(record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "FASTEST", "sha256")
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", on_block=stop, **settings)
    shards = prune(source, tmp_path / "out", **settings)["shards"]
    assert "sha256" in shards[0] and FASTEST in shards[-1]
    findings = check(tmp_path / "out", against=source)
    assert not findings.problems and findings.shards_verified == len(shards)
    monkeypatch.setattr(checksum, "KINDS", {"sha256": hashlib.sha256})
    found = check(tmp_path / "out", against=source)  # counts all the same
    assert found.masked and any("pip install blake3" in problem for problem in found.problems)
    with pytest.raises(CheckpointError, match="pip install blake3"):
        prune(source, tmp_path / "out", **settings)
