"""Paths of any bytes, names of any length, and no network: what a person sees of them."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, save_tiny
from safetensors.torch import load_file, save_file

from lowmem_wanda.cli.main import main
from lowmem_wanda.cli.terminal import bounded


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *words], capture_output=True, env={**os.environ, **environment}
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_every_command_takes_paths_that_are_no_utf_8(tmp_path, token_file):
    folder = os.fsencode(tmp_path) + b"/mod\xe9le"
    source = save_tiny(tmp_path / "made", "llama")
    os.rename(source, folder)
    text = os.fsencode(tmp_path) + b"/t\xe9xte.npy"
    shutil.copy(token_file, text)
    source, out, text = map(os.fsdecode, (folder, folder + b"-out", text))
    commands = [
        ("plan", source, "--text", text), ("prune", source, out, "--text", text, "--imatrix", out + ".gguf"), ("check", out, "--against", source),
        ("eval", out, "--against", source, "--text", text, "--length", "16", "--report", out + "-eval"), ("survive", out),
        ("compare", source, out + "-compared", "--text", text, "--calibration", text, "--length", "16", "--methods", "magnitude"),
        ("prune", source, out, "--text", text, "--imatrix", out + ".gguf"),
    ]  # fmt: skip
    for words in commands:
        done = command(*words, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    assert json.loads((tmp_path / os.fsdecode(b"mod\xe9le-out") / "report.json").read_bytes())["source"] == source


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252"])
def test_a_stdout_that_cannot_show_a_path_is_no_error(tmp_path, token_file, encoding):
    source = save_tiny(tmp_path / "模型", "llama")
    for words in (
        ("plan", source, "--text", token_file),
        ("prune", source, tmp_path / "輸出", "--text", token_file),
        ("check", tmp_path / "輸出"),
    ):
        done = command(*words, PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_error_lines_are_bounded(tmp_path, capsys):
    source = save_tiny(tmp_path / "source", "llama", shard="1GB")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {**tensors, f"model.layers.0.{'a' * 100_000}.weight": tensors["lm_head.weight"].clone()},
        source / "model.safetensors",
    )
    assert main(["prune", str(source), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert len(said) < 1200 and said.rstrip().endswith("correct config.json or remove the tensor")
    assert bounded("x" * 999) == "x" * 999 and len(bounded("x" * 5000)) <= 1000


def test_no_command_opens_a_socket_unasked(tmp_path, token_file, monkeypatch, capsys):
    def refused(*_, **__):
        raise AssertionError("a socket was opened")

    source = str(save_tiny(tmp_path / "source", "llama"))
    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    out = str(tmp_path / "out")
    for words in (
        ["prune", source, out, "--text", str(token_file)], ["plan", source, "--text", str(token_file)], ["check", out, "--against", source], ["survive", out],
        ["eval", out, "--text", str(token_file), "--length", "16", "--report", str(tmp_path / "r")], ["plan", "org/name"],
    ):  # fmt: skip
        assert main(words) == (1 if words[1] == "org/name" else 0)
    capsys.readouterr()


@pytest.mark.parametrize(("key", "value"), [("timing", None), ("summary", {"sparsity": "x"}), ("peak_memory", "x")])
def test_odd_figures_in_the_report_of_a_finished_job(tmp_path, token_file, capsys, key, value):
    source, out = save_tiny(tmp_path / "source", "llama"), tmp_path / "out"
    words = ["prune", str(source), str(out), "--text", str(token_file)]
    assert main(words) == 0
    report = json.loads((out / "report.json").read_bytes())
    (out / "report.json").write_text(json.dumps({**report, key: value}))
    assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and error.endswith(f"delete {out} and run again")


@pytest.mark.parametrize("flag", ["--seed", "--sequences", "--max-ram"])
def test_numbers_of_flags_are_bounded(tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        main(["prune", str(tmp_path), str(tmp_path / "out"), flag, "9" * 5000])
    assert len(capsys.readouterr().err.splitlines()[-1]) < 200
