"""`recover` as a command: zeros are held, the merged model is the trained one, and nothing else changes."""

import builtins
import json
import math

import numpy as np
import pytest
import torch
from helpers import contents, read_tensor, save_tiny

from lowmem_wanda import Checkpoint, check, evaluate, prune, recover
from lowmem_wanda.cli.main import main
from lowmem_wanda.errors import CalibrationError, CheckpointError, LowmemError, NumberError, OutputError
from lowmem_wanda.streaming import fine_tuning


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Token ids that can be learned: each follows from the one before."""
    path = tmp_path_factory.mktemp("text") / "rows.npy"
    start = np.random.default_rng(0).integers(3, 96, (40, 1))
    np.save(path, (start + 5 * np.arange(16)) % 90 + 3)
    return path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory, text):
    """A source and its pruned checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny(folder / "source", request.param, torch.bfloat16 if request.param == "llama" else torch.float32)
    prune(source, folder / "pruned", text=[text], device="cpu")
    return source, folder / "pruned"


@pytest.mark.parametrize("full", [False, True])
def test_zeros_are_held_and_the_rest_learns(pair, text, tmp_path, full, monkeypatch):
    source, pruned = pair
    losses, real = [], fine_tuning._merge
    monkeypatch.setattr(fine_tuning, "_merge", lambda model, masked: real(model, masked) or losses.append(model))
    more = {"full": full, "steps": 20, "learning_rate": 1e-2, "device": "cpu"}
    report = recover(pruned, tmp_path / "out", text=[text], **more)
    tuned = report["fine_tuning"]
    assert tuned["after"] < 0.9 * tuned["before"] and tuned["held_out"] == 4 and tuned["sequences"] == 36
    found = check(tmp_path / "out", against=source)
    assert found.problems == [] and found.shards_verified == len(report["shards"])
    old, new = ({n: read_tensor(t) for n, t in Checkpoint(path).tensors.items()} for path in (pruned, tmp_path / "out"))
    matrices = {name for block in report["blocks"] for name in block["linears"]}
    assert all(torch.equal(old[name] == 0, new[name] == 0) for name in matrices)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == set(tuned["tensors"]) if not full else matrices <= moved <= set(tuned["tensors"])
    assert (moved == matrices) != full
    np.save(tmp_path / "held.npy", np.load(text)[-4:])
    loss = math.log(evaluate(tmp_path / "out", text=[tmp_path / "held.npy"], length=16, device="cpu")["perplexity"])
    assert loss == pytest.approx(math.log(tuned["after"]), abs=0.02)  # merged and rounded, it is the trained model


def test_the_command_says_what_it_did(pair, text, tmp_path, capsys):
    flags = ["--text", str(text), "--full", "--steps", "2", "--device", "cpu"]
    assert main(["recover", str(pair[1]), str(tmp_path / "out"), *flags, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["fine_tuning"]["rank"] is None and "36 sequences of 16 tokens" in said.err
    assert (tmp_path / "out/report.html").exists() and not list(tmp_path.glob(".out*"))
    assert main(["recover", str(pair[1]), str(tmp_path / "new"), *flags]) == 0
    assert "before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["recover", str(pair[1]), "x", *flags, "--learning-rate", "0"])


def test_what_cannot_be_recovered_is_refused(pair, text, tmp_path, monkeypatch):
    source, pruned = pair
    settings = {"text": [text], "device": "cpu", "steps": 1}
    with pytest.raises(CheckpointError, match="give a folder that prune wrote"):
        recover(source, tmp_path / "out", **settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="is not empty"):
        recover(pruned, tmp_path / "full", **settings)
    with pytest.raises(OutputError, match="lies in the source"):
        recover(pruned, pruned / "out", **settings)
    with pytest.raises(CalibrationError, match="gives one sequence"):
        recover(pruned, tmp_path / "out", **settings, sequences=1)
    with pytest.raises(NumberError, match="training diverged"):
        recover(pruned, tmp_path / "out", **{**settings, "steps": 8}, full=True, learning_rate=1e6)
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *given: (_ for _ in ()).throw(ImportError()) if name == "peft" else real(name, *given),
    )
    with pytest.raises(LowmemError, match="pip install peft"):
        recover(pruned, tmp_path / "out", **settings)
    assert contents(tmp_path) == before
