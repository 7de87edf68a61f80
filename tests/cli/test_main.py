"""The command line as a user meets it: exit codes, streams, JSON, Ctrl-C."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny

from lowmem_wanda.cli.main import main
from lowmem_wanda.sparsity.methods.known import METHODS

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-W", "error::UserWarning", str(ROOT / "cli.py")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("source"), "llama", torch.bfloat16))


def test_prune_plan_and_check(source, token_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["plan", source, "--text", str(token_file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["blocks"], plan["prunable"], plan["tokens"]) == (3, 3 * 9216, 96)
    assert not (tmp_path / "out").exists()
    assert main(["prune", source, out, "--text", str(token_file), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["summary"]["sparsity"] == 0.5
    assert "block 1/3   7 linears  50.00% zero" in shown.err and "6 sequences of 16 tokens from tokens.npy" in shown.err
    assert main(["check", out, "--against", source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masked"] == 21


def test_the_closing_table_says_what_it_does_not_give(source, token_file, tmp_path, capsys):
    assert main(["prune", source, str(tmp_path / "out"), "--text", str(token_file)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "13.8 K of 27.6 K weights (50.00%)" in words
    assert "stay as large" in words
    assert main(["plan", source, "--method", "magnitude"]) == 0
    assert "calibration none" in " ".join(capsys.readouterr().out.split())
    assert main(["check", str(tmp_path / "out")]) == 0
    assert "q_proj.weight  BF16     32 x 32       50.00% zero  2:4" in capsys.readouterr().out


def test_our_errors_are_one_sentence_and_1(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_a_failed_proof_is_1(source, tmp_path, capsys):
    other = save_tiny(tmp_path / "other", "llama", torch.bfloat16, seed=1)
    assert main(["check", str(other), "--against", source]) == 1
    assert "neither the source's nor zero" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    from lowmem_wanda.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(["check", str(tmp_path / "nowhere"), "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [["prun"], ["prune", "a"], ["prune", "a", "b", "--method", "best"], ["prune", "a", "b", "--sequences", "0"]],
)
def test_usage_errors_are_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err


def test_without_arguments_a_user_sees_what_he_can_do(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    shown = capsys.readouterr().err
    assert error.value.code == 2 and "usage:" in shown and "prune llama-3-8b llama-3-8b-2of4 --pattern 2:4" in shown
    assert all(f"    {name} " in shown for name in ("prune", "plan", "imatrix", "check", "survive", "eval", "compare"))


@pytest.mark.parametrize("command", ["prune", "plan", "imatrix", "check", "survive", "eval", "compare"])
def test_help_says_its_defaults_in_one_way(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"; [\w.:]+ -", shown)
    if command == "prune":
        assert "number of calibration sequences (default: 128)" in shown and "(default: 2:4)" in shown


def test_help_and_usage_import_nothing_heavy():
    code = "import sys; from lowmem_wanda.cli.main import main\n" \
        "try: main(['prune', '--help'])\nexcept SystemExit: pass\n" \
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_the_choices_of_help_are_the_methods(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    assert "{" + ",".join(METHODS) + "}" in capsys.readouterr().out


def test_the_three_doors_are_one():
    for door in (CLI, [sys.executable, "-m", "lowmem_wanda"]):
        shown = subprocess.run([*door, "--version"], cwd=ROOT, capture_output=True, text=True)
        assert shown.stdout == "0.1.0\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=40, shard="1GB", vocab_size=1024)

    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 1024, (256, 32)))
    command = [
        *CLI,
        "prune",
        str(source),
        str(tmp_path / "out"),
        "--text",
        str(tmp_path / "ids.npy"),
        "--sequences",
        "256",
    ]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    while (line := child.stderr.readline()) and not line.startswith("block "):
        pass
    assert line.startswith("block 1/") or line.startswith("block  1/")
    child.send_signal(signal.SIGINT)
    said = child.stderr.read()
    assert child.wait(10) == 130
    child.stderr.close()
    assert "stopped; run the same command again to continue" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob(".*.partial"))
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert main(["check", str(tmp_path / "out"), "--against", str(source)]) == 0


@pytest.mark.slow
@pytest.mark.real
def test_nothing_is_fetched_unasked(shared, tmp_path):
    code = "import socket, sys; socket.socket.connect = socket.getaddrinfo = lambda *a, **k: sys.exit(99)\n" \
        f"from lowmem_wanda.cli.main import main; sys.exit(main(['prune', {str(shared / 'models/stories260K')!r}, " \
        f"{str(tmp_path / 'out')!r}, '--sequences', '1', '--length', '32']))"  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_paths_are_shown_as_they_are(source, token_file, tmp_path, capsys):
    odd = tmp_path / "m[bold]x"
    os.symlink(source, odd)
    assert main(["prune", str(odd), str(tmp_path / "o[final]"), "--text", str(token_file)]) == 0
    shown = capsys.readouterr()
    assert "m[bold]x: 3 blocks" in shown.err.replace("\n", "") and "o[final]" in shown.out.replace("\n", "")


def test_a_closed_pipe_is_no_traceback(source):
    shell = f"{' '.join(CLI)} check {source} | true"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_control_characters_are_shown_not_sent():
    from lowmem_wanda.cli.main import printable

    assert printable("a\nerror: b\x1b[2Jä") == "a\\nerror: b\\x1b[2Jä"


def test_eval_says_what_a_model_is_worth(source, token_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prune", source, "out", "--text", str(token_file)]) == 0
    capsys.readouterr()
    assert main(["eval", source, "out", "--text", str(token_file), "--against", source, "--json"]) == 0
    shown = capsys.readouterr()
    dense, pruned = (json.loads(line) for line in shown.out.splitlines())
    asked = {"perplexity", "perplexity_stderr", "tokens", "length", "kl_mean", "kl_p99", "top1_agreement"}
    assert asked | {"perplexity_ratio"} <= pruned.keys() and (pruned["tokens"], pruned["length"]) == (90, 16)
    assert dense["kl_max"] < 1e-6 < pruned["kl_mean"] and dense["top1_agreement"] == 1
    assert "block 3/3  off by" in shown.err and "90 tokens evaluated in 6 windows of 16" in shown.err
    report = json.loads((tmp_path / "out-eval/report.json").read_text())
    assert report["kind"] == "eval" and len(report["models"]) == 2 and report["arguments"]["against"] == source
    assert "<html" in (tmp_path / "out-eval/report.html").read_text()


def test_eval_shows_the_length_beside_the_perplexity(source, token_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", source, "--text", str(token_file), "--against", source]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "at 16" in shown and "±" in shown
    assert "\x1b" not in shown and "-eval/report.html" in shown


def test_compare_is_one_table(source, token_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["compare", source, out, "--text", str(token_file), "--calibration", str(token_file)]
    assert main([*command, "--methods", "wanda,magnitude", "--patterns", "50%,2:4"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split()[:2] for line in shown.splitlines() if "±" in line]
    assert [line[0] for line in lines] == ["dense", "wanda", "magnitude", "wanda", "magnitude"]
    assert "out/report.html" in shown.replace("\n", "") and (tmp_path / "out/report.html").exists()


def test_an_evaluation_shows_every_model_and_every_task(capsys):
    from rich.console import Console

    from lowmem_wanda.cli.evaluate import evaluation_tables

    figures = {"perplexity": 98.78, "perplexity_stderr": 7.05, "perplexity_ratio": 1.3, "kl_mean": 0.5, "kl_p99": 2.5,
               "top1_agreement": 0.5}  # fmt: skip
    tasks = {
        f"local_{name}": {"acc": 0.25, "acc_stderr": 0.125} for name in ("boolq", "rte", "hellaswag", "winogrande")
    }
    models = [{"path": path, **figures, "tasks": tasks} for path in ("p24", "p50")]
    report = {"text": ["t"], "windows": 4, "length": 64, "convention": "windows", "models": models,
              "against": {"path": "demo", "perplexity": 74.0, "perplexity_stderr": 7.0}}  # fmt: skip
    for table in evaluation_tables(report):
        Console(width=80).print(table)
    shown = capsys.readouterr().out
    assert [shown.count(path) for path in ("demo", "p24", "p50")] == [1, 2, 2] and "…" not in shown
    assert shown.count("0.250 ± 0.125") == 8 and all(task in shown for task in tasks)


def test_the_choices_of_flags_are_the_librarys():
    from lowmem_wanda.cli.main import parser
    from lowmem_wanda.data.windows import CONVENTIONS
    from lowmem_wanda.pruning.choices import ZEROS
    from lowmem_wanda.sparsity import GROUPS

    commands = parser()._subparsers._group_actions[0].choices
    choices = {a.dest: tuple(a.choices) for name in ("prune", "eval") for a in commands[name]._actions if a.choices}
    assert (choices["zeros"], choices["convention"], choices["group"]) == (ZEROS, CONVENTIONS, GROUPS)


def test_no_number_of_a_comparison_is_cut_at_80_columns(monkeypatch, capsys):
    """A row as wide as they come, on a GPU, under a name that folds."""
    from rich.console import Console

    from lowmem_wanda.cli.compare import comparison_table

    figures = {"perplexity": 1234.567, "perplexity_stderr": 123.45, "perplexity_ratio": 123.45, "kl_mean": 12.345,
               "kl_p99": 12.345, "top1_agreement": 0.123, "seconds": 4000.0, "host_bytes": 23.4e9,
               "device_bytes": 23.4e9, "name": "magnitude 50% per matrix 128 sequences"}  # fmt: skip
    report = {"text": ["t"], "windows": 58, "length": 2048, "convention": "windows", "rows": [figures], "spread": [],
              "dense": figures}  # fmt: skip
    Console(width=80).print(comparison_table(report))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    for number in ("1234.57 ± 123.45", "123.45", "12.345", "12.3%", "67 min", "23.4 GB"):
        assert number in shown, number


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["eval", "SOURCE"], "give --text FILE, --tasks"),
        (["compare", "SOURCE", "out"], "give --text FILE"),
        (["compare", "SOURCE", "SOURCE/out", "--text", "IDS"], "never written to"),
        (["eval", "SOURCE", "--text", "IDS", "--report", "SOURCE"], "holds no report of eval"),
        (["eval", "nowhere", "--text", "IDS"], "nowhere"),
        (["eval", "SOURCE", "--text", "IDS", "--length", "1"], "--length 1"),
        (["eval", "SOURCE", "--text", "missing.npy"], "missing.npy"),
    ],
)
def test_evaluations_that_cannot_be_are_one_sentence(source, token_file, tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("SOURCE", source).replace("IDS", str(token_file)) for word in command]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and says in shown.err and shown.err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("*eval/report.json"))


@pytest.mark.parametrize(
    ("package", "flags", "install"),
    [("lm_eval", ["--tasks", "boolq"], "pip install lm-eval")],
)
def test_an_extra_that_is_not_there_is_named(
    source, token_file, tmp_path, monkeypatch, capsys, package, flags, install
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "lowmem_wanda.evaluation.zeroshot", raising=False)
    assert main(["eval", source, "--text", str(token_file), *flags]) == 1
    assert install in capsys.readouterr().err


@pytest.mark.parametrize(("platform", "before", "after"), [
    ("linux", {}, "expandable_segments:True"), ("linux", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "x"}, None), ("win32", {}, None), ("darwin", {}, None),
])  # fmt: skip
def test_the_allocator_is_set_up_unless_the_user_has(monkeypatch, capsys, platform, before, after):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, ""), monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lowmem_wanda.cli.main.sys.platform", platform)
    assert main(["check", "nothing-there"]) == 1
    assert os.environ.get("PYTORCH_ALLOC_CONF") == after


@pytest.mark.parametrize("number", ["0", "-1", "9" * 5000, "²", "٣", "x"])
def test_what_is_no_number_is_usage_in_a_short_line(capsys, number):
    with pytest.raises(SystemExit) as error:
        main(["plan", "x", f"--sequences={number}"])
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not a whole number above 0" in line and len(line) < 200


def test_a_report_cannot_lie_behind_a_link_that_leads_nowhere(source, tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    text = tmp_path / "text.txt"
    text.write_text("x" * 999)
    assert main(["eval", source, "--text", str(text), "--report", str(tmp_path / "a")]) == 1
    assert "a: is a link that leads nowhere; give another directory" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_stdout_that_cannot_show_a_path_escapes_it(tiny, token_file, tmp_path, monkeypatch, encoding):
    for place, name in enumerate(("模型", "mod\udce9le")):
        source, out = tmp_path / name, tmp_path / f"出{place}"
        shutil.copytree(tiny("llama"), source)
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", stream)
        text = ["--text", str(token_file)]
        for command in (["plan", str(source), *text], ["prune", str(source), str(out), *text], ["check", str(out)],
                        ["survive", str(out)], ["survive", str(out), "--json"],
                        ["imatrix", str(source), str(tmp_path / f"模{place}.gguf"), *text],
                        ["eval", str(source), *text, "--report", str(tmp_path / f"報{place}")]):  # fmt: skip
            assert main(command) == 0, command
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_stdout_is_no_traceback(source, tmp_path):
    made = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *CLI, "check", source], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
