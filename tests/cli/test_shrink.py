"""What a person sees of `shrink`, and of `plan` and `check` with a GGUF."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import moe_ggufs
import numpy as np
import pytest
from helpers import ROOT, save_tiny

from lowmem_wanda.cli.main import main
from lowmem_wanda.cli.terminal import ranges


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model = moe_ggufs.write(folder / "model.gguf", "glm4moe", 16)
    return model, moe_ggufs.write_imatrix(folder / "imatrix.gguf", model)


def seen(capsys, *arguments):
    """The exit code, and what is shown, as one line each."""
    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, re.sub(r"\s+", " ", shown.out), re.sub(r"\s+", " ", shown.err)


def test_shrink_says_what_it_did_what_it_costs_and_how_to_know(made, tmp_path, capsys):
    model, matrix = made
    small = tmp_path / "my small.gguf"
    code, out, err = seen(capsys, "shrink", model, small, "--drop-experts", "25%", "--from", matrix)
    size = small.stat().st_size / model.stat().st_size
    assert code == 0 and "2 layers with 16 experts, of which 12 are kept" in err
    assert "12 of 16 kept in each of 2 layers of glm4moe, 1 of them for predicting further tokens" in out
    assert f"({size:.1%})" in out and "ean from imatrix.gguf" in out
    assert "of its tokens went to dropped ones keeps" in out and "of routed tokens went to dropped experts" in out
    assert "12 is not a power of two" in out and "not a multiple of 8" in out and "a lower quantization" in out
    assert "warning layer 2 predicts further tokens" in out
    text = ROOT / "lowmem_wanda/data/held-out.txt"
    assert f"llama-perplexity -c 64 -m {model} -f {text} --kl-divergence-base '{small}.kld'" in out
    assert (
        f"llama-perplexity -c 64 -m '{small}' --kl-divergence-base '{small}.kld' --kl-divergence" in out
        and text.exists()
    )
    assert f"check '{small}' --against {model}" in out and "the first command writes about 2.0 MB" in out
    page = Path(f"{small}.report.html").read_text("utf-8")
    for heading in ("Summary", "Warnings", "What it costs, and how to know", "Tokens", "Scores", "Layers", "Proof"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 3 and "Moonlight" in page and "http" not in page and "<script" not in page


def test_shrink_as_json_is_its_report(made, tmp_path, capsys):
    model, matrix = made
    code, out, _ = seen(
        capsys, "shrink", model, tmp_path / "small.gguf", "--keep-experts", 8, "--from", matrix, "--json"
    )
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "small.gguf.report.json").read_text("utf-8"))


def test_without_an_importance_matrix_nothing_is_said_of_tokens(made, tmp_path, capsys):
    code, out, _ = seen(capsys, "shrink", made[0], tmp_path / "s.gguf", "--drop-experts", "4", "--score", "aimer",
                        "--write-plan", tmp_path / "plan.json", "--split-size", "200KB")  # fmt: skip
    assert code == 0 and "not known what went to dropped experts" in out and re.search(r" in \d+ files ", out)
    code, out, _ = seen(capsys, "shrink", made[0], tmp_path / "again.gguf", "--plan", tmp_path / "plan.json")
    page = Path(f"{tmp_path / 'again.gguf'}.report.html").read_text("utf-8")
    assert code == 0 and "plan plan.json" in out and "<svg" not in page


def test_plan_of_a_gguf(made, capsys):
    code, out, _ = seen(capsys, "plan", made[0])
    assert code == 0 and "tiny glm4moe (glm4moe)" in out and "2 of 3 with experts, 1 for further tokens (MTP)" in out
    assert "16 in each, 2 at work for a token, 1 shared beside them" in out
    assert re.search(r"without 50% 8 experts, .* \(\d+\.\d%\); fused CUDA routing, multiple of 8", out)
    code, out, _ = seen(capsys, "plan", made[0], "--json")
    assert [cut["kept"] for cut in json.loads(out)["cuts"]] == [14, 12, 10, 8]


def test_check_of_a_gguf(made, tmp_path, capsys):
    model, matrix = made
    small = tmp_path / "small.gguf"
    seen(capsys, "shrink", model, small, "--drop-experts", "50%", "--from", matrix)
    code, out, _ = seen(capsys, "check", small, "--against", model)
    assert code == 0 and "8 of 16 experts in each of 2 layers" in out and "nothing else differs" in out
    assert json.loads(seen(capsys, "check", small, "--against", model, "--json")[1])["problems"] == []
    assert "none was removed" in seen(capsys, "check", model, "--against", model)[1]
    data = bytearray(small.read_bytes())
    data[-1] ^= 1
    small.write_bytes(data)
    code, out, err = seen(capsys, "check", small, "--against", model)
    assert code == 1 and "nothing else differs" not in out and "error: blk.2" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("shrink", "{model}", "{out}", "--drop-experts", "25%"), "say which experts are kept: --from imatrix.gguf"),
        (
            ("shrink", "{folder}", "{out}", "--drop-experts", "25%", "--score", "aimer"),
            "but no safetensors; give that file itself to `shrink`",
        ),
        (("shrink", "{model}", "{model}", "--drop-experts", "25%", "--score", "aimer"), "is the source"),
        (("shrink", "{folder}/none.gguf", "{out}", "--drop-experts", "2", "--score", "aimer"), "cannot be read"),
        (
            ("shrink", "{matrix}", "{out}", "--drop-experts", "2", "--score", "aimer"),
            "is an importance matrix, not a model",
        ),
        (("check", "{model}"), "is a GGUF, which is proved against the one it was made of: add --against"),
        (("check", "{model}", "--against", "{folder}"), "is a folder"),
        (("check", "{model}", "--against", "{matrix}"), "give the model here"),
        (("plan", "{model}", "--pattern", "4:8"), "--pattern says how a checkpoint is pruned"),
        (("plan", "{model}", "--max-ram", "8GB"), "--max-ram says how a checkpoint is pruned"),
        (("plan", "{folder}/none.gguf"), "cannot be read"),
        (("prune", "{model}", "{out}"), "is a file; give the folder of a safetensors checkpoint"),
        (("imatrix", "{model}", "{out}"), "`shrink`, `plan` and `check` take the file of a GGUF"),
    ],
)
def test_errors_are_one_sentence_and_1(made, tmp_path, capsys, arguments, says):
    model, matrix = made
    places = {"model": model, "matrix": matrix, "folder": model.parent, "out": tmp_path / "out.gguf"}
    code, out, err = seen(capsys, *(part.format(**places) for part in arguments))
    assert code == 1 and err.startswith("error: ") and says in err and not out and not list(tmp_path.iterdir())


def test_wrong_usage_is_2(made, tmp_path, capsys):
    for flags in (
        ("--drop-experts", "2", "--keep-experts", "2"),
        ("--keep-experts", "0"),
        ("--score", "best"),
        ("--split-size", "x"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["shrink", str(made[0]), str(tmp_path / "s.gguf"), *flags])
        assert stopped.value.code == 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A GGUF of 400M weights."""
    path = tmp_path_factory.mktemp("large") / "model.gguf"
    yield moe_ggufs.write(path, "qwen3moe", 64, width=512, inner=512, layers=8)
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_kill_end_cleanly_and_leave_nothing(large, tmp_path, number):
    """In the middle of scoring in processes, none of which outlives the first."""
    model = large
    sent = getattr(signal, number)
    child = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", "shrink", model, tmp_path / "small.gguf", "--drop-experts", "25%", "--score", "aimer"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # which nohup and shells in the background ignore
    )  # fmt: skip
    while child.poll() is None and not list(tmp_path.glob(".*partial")):
        time.sleep(0.01)
    child.send_signal(sent)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + sent and err.strip().endswith("stopped") and "Traceback" not in err and not out
    assert not list(tmp_path.iterdir())


def test_ranges_are_short():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([3]) == "3"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny mixture of 16 experts, and 22 sequences of 16 token ids, two of them again and again."""
    folder = tmp_path_factory.mktemp("mixture")
    np.save(folder / "tokens.npy", np.tile(np.random.default_rng(0).integers(3, 96, (2, 16)), (11, 1)))
    return save_tiny(folder / "mixture", "qwen3_moe", num_experts=16), folder / "tokens.npy"


def test_a_checkpoint_is_shrunk_and_what_it_costs_is_said(mixture, tmp_path, capsys):
    source, tokens = mixture
    small, kept = tmp_path / "small", "--keep-experts 12 --refit --score squares"
    code, out, err = seen(capsys, "shrink", source, small, *kept.split(), "--text", tokens, "--batch", 4)
    assert code == 0 and "3 layers with 16 experts, of which 12 are kept, by squares, on cpu" in err
    assert "block 1/3" in err and "keeps " in err and "22 sequences of 16 tokens from tokens.npy" in err
    assert "12 of 16 kept in each of 3 layers of Qwen3MoeForCausalLM; 2 at work for a token" in out
    assert "squares on tokens.npy" in out and "of routed tokens went to dropped experts" in out
    assert "layers lose" in out and "of the squares of their outputs before it" in out
    assert "experts saw fewer than 100 tokens" in out and "a lower quantization" in out
    assert f"lowmem-wanda check {small} --against {source}" in out and f"report: {small}/report.html" in out
    page = (small / "report.html").read_text("utf-8")
    for heading in ("Summary", "Warnings", "Tokens", "Scores", "Refit", "Layers", "Proof"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 4 and "http" not in page and "<script" not in page
    code, out, _ = seen(capsys, "check", small, "--against", source)
    assert code == 0 and "of 16 experts" in out and "were refitted" in out and out.endswith("nothing else differs ")
    code, out, _ = seen(capsys, "eval", small, "--against", source, "--text", tokens, "--report", tmp_path / "eval")
    assert code == 0
    code, out, _ = seen(capsys, "shrink", source, small, *kept.split(), "--text", tokens, "--batch", 4)
    assert code == 0 and "12 of 16 kept" in out  # a finished one is shown again


def test_a_plan_says_what_shrinking_needs_and_gives(mixture, capsys):
    source, tokens = mixture
    code, out, _ = seen(capsys, "plan", source, "--drop-experts", "50%", "--text", tokens)
    assert code == 0 and "without 8 of 16 experts" in out and "2 at work for a token" in out
    assert "352 tokens, 44 for an expert in the mean" in out and "predicted at most" in out
    code, out, _ = seen(capsys, "plan", source, "--drop-experts", "50%", "--text", tokens, "--ram", "16GB", "--vram", "8GB",
                        "--disk", "3GB", "--flops", "80T", "--json")  # fmt: skip
    facts = json.loads(out)
    assert facts["kept"] == 8 and facts["device_peak"] and facts["after"] < facts["before"] and facts["seconds"]


@pytest.mark.parametrize(("flags", "says"), [
    (("--split-size", "1GB"), "--split-size has no use here"),
    (("--score", "aimer", "--record", "{out}.json"), "--record: nothing is measured here"),
    (("--plan", "{tokens}"), "is not JSON"),
    (("--from", "{tokens}"), "is not valid JSON"),
], ids=str)  # fmt: skip
def test_errors_of_checkpoints_are_one_sentence_and_1(mixture, tmp_path, capsys, flags, says):
    source, tokens = mixture
    given = [flag.format(out=tmp_path / "out", tokens=tokens) for flag in flags]
    number = () if "--plan" in flags else ("--keep-experts", 8)
    code, out, err = seen(capsys, "shrink", source, tmp_path / "out", *number, *given)
    assert code == 1 and err.startswith("error: ") and says in err and not out and not list(tmp_path.iterdir())


def test_flags_of_checkpoints_are_refused_beside_a_gguf(made, tmp_path, capsys):
    model, matrix = made
    for flag in (("--refit",), ("--text", "my.txt"), ("--max-ram", "1GB"), ("--record", "s.json")):
        code, _, err = seen(capsys, "shrink", model, tmp_path / "s.gguf", "--keep-experts", 8, "--from", matrix, *flag)
        assert code == 1 and f"{flag[0]} has no use here" in err
    code, _, err = seen(capsys, "shrink", model, tmp_path / "s.gguf", "--keep-experts", 8, "--score", "reap")
    assert code == 1 and "--score reap is of what experts put out, which a GGUF is not computed for" in err


def test_removals_are_compared_on_the_command_line(mixture, tmp_path, capsys):
    source, tokens = mixture
    flags = ["--text", tokens, "--calibration", tokens, "--drop-experts", "25%,50%", "--scores", "reap,aimer"]
    code, out, _ = seen(capsys, "compare", source, tmp_path / "out", *flags)
    rows = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    names = [f"{score} -{share}" for share in ("25%", "50%") for score in ("reap", "aimer")]
    assert code == 0 and [row["name"] for row in rows] == names
    assert "without" in out and "KL" in out and "reap -25%" in (tmp_path / "out/report.html").read_text("utf-8")
    code, _, err = seen(capsys, "compare", source, tmp_path / "2", *flags, "--patterns", "2:4")
    assert code == 1 and "--patterns says how weights are pruned" in err
