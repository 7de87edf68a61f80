"""README: every command in it is run, and it stays short."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from ggufs import convert

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
PAGES = sorted((ROOT / "lowmem_wanda/docs").glob("*.md"))
OURS = [command for command in COMMANDS if command.startswith("python cli.py")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands need, so that they write nothing here."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "cli.py", folder)
    shutil.copytree(ROOT / "lowmem_wanda", folder / "lowmem_wanda")
    (folder / "my.txt").write_text("It was a dark and stormy night. " * 200)
    return folder


def test_the_commands_of_the_readme_in_their_order(checkout):
    for command in OURS:
        done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_commands_on_the_way_to_llama_cpp(checkout):
    """Ours, on the demo in stories260K's place and with a GGUF made here; its own were run by hand."""
    page = (ROOT / "lowmem_wanda/docs/llama-cpp.md").read_text("utf-8")
    ours = re.findall(r"^python (cli.py .*)$", page, re.M)
    assert [command.split()[1] for command in ours] == ["prune", "survive"]
    shutil.copytree(ROOT / "lowmem_wanda/data/demo", checkout / "stories260K")
    shutil.rmtree(checkout / "pruned", ignore_errors=True)  # of README's commands
    (checkout / "pruned.imatrix.gguf").unlink(missing_ok=True)
    for command in ours:
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        if " prune " in command:
            convert(checkout / "pruned", checkout / "pruned-Q4_K_M.gguf", GGMLQuantizationType.Q4_0)
    assert "Every pruned weight is zero in this GGUF" in done.stdout


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *PAGES):
        for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), link


def test_every_other_command_is_what_make_does():
    """CI runs `make demo` and `make test`; the lines by hand are theirs."""
    ci, makefile = (ROOT / ".ci/run").read_text(), (ROOT / "Makefile").read_text()
    rest = [command for command in COMMANDS if command not in OURS]
    assert rest == [
        "make demo",
        "make test",
        "python3 -m venv .venv && . .venv/bin/activate",
        'pip install --constraint constraints.txt --editable ".[test]"',
        "python -m pytest",
    ]
    assert "make demo VENV=" in ci and "make test VENV=" in ci
    for part in ("-m venv $(VENV)", "--constraint constraints.txt", '--editable ".[test]"', "-m pytest"):
        assert part in makefile
    for command in OURS[:3]:
        assert command.removeprefix("python ") in makefile


def test_the_first_command_is_before_line_30_and_files_are_named():
    assert (
        README.splitlines().index(
            "make demo    # in a new .venv: install, prune the bundled demo model 2:4, prove the result, perplexity before and after"
        )
        < 30
    )
    for path in (ROOT / "lowmem_wanda").glob("[!_]*.py"):
        assert path.name in README


def test_the_built_in_text_and_the_demo_are_as_said():
    text = sum(file.stat().st_size for file in (ROOT / "lowmem_wanda/data/texts").iterdir())
    assert f"{round(text, -4) // 1000} KB" in README and text > 120_000
    assert sum(file.stat().st_size for file in (ROOT / "lowmem_wanda/data/demo").iterdir()) < 3_000_000
