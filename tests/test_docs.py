"""The documents: every command of README is run, every flag is described, every link leads somewhere, README stays short."""

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import moe_ggufs
import pytest
from gguf import GGMLQuantizationType
from ggufs import convert, convert_experts
from helpers import save_tiny
from test_architecture import PACKAGE, ROOMS, THIRD

from lowmem_wanda.cli.main import main, parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "lowmem_wanda/docs"
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS_PAGE = (DOCS / "commands.md").read_text("utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text("utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OURS = [command for command in COMMANDS if command.startswith("python cli.py")]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OTHERS = {"--model", "--constraint", "--editable"}  # flags of lm-evaluation-harness and pip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands need, so that they write nothing here."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "cli.py", folder)
    shutil.copytree(ROOT / "lowmem_wanda", folder / "lowmem_wanda", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "my.txt").write_text("It was a dark and stormy night. " * 200)
    demo = json.loads((ROOT / "lowmem_wanda/data/demo/config.json").read_text())
    save_tiny(folder / "mixture", "qwen3_moe", num_experts=16, vocab_size=demo["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "lowmem_wanda/data/demo" / name, folder / "mixture")
    model = moe_ggufs.write(folder / "model.gguf", "qwen3moe", 16)
    moe_ggufs.write_imatrix(folder / "imatrix.gguf", model)
    return folder


def run(command, capsys):
    """Runs a line such as "python cli.py check pruned" in this process; gives what it prints."""
    code = main(shlex.split(command.split("cli.py ")[1]))
    shown = capsys.readouterr()
    assert code == 0, f"{command}: {shown.err}"
    return shown.out


@pytest.mark.slow
def test_the_commands_of_the_readme_in_their_order(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    for command in OURS:
        run(command, capsys)


@pytest.mark.slow
def test_the_commands_on_the_way_to_llama_cpp(checkout, monkeypatch, capsys):
    """Ours, on the demo in stories260K's place and with a GGUF made here; its own were run by hand."""
    page = (DOCS / "llama-cpp.md").read_text("utf-8")
    monkeypatch.chdir(checkout)
    ours = re.findall(r"^python (cli.py .*)$", page, re.M)
    assert [command.split()[1] for command in ours] == [
        "prune", "survive", "plan", "shrink", "check", "shrink", "check", "eval", "survive",
    ]  # fmt: skip
    shutil.copytree(ROOT / "lowmem_wanda/data/demo", checkout / "stories260K")
    for made in ("pruned", "smaller"):  # of README's commands
        shutil.rmtree(checkout / made, ignore_errors=True)
    for made in ("pruned.imatrix.gguf", "small.gguf", "small.gguf.report.json", "small.gguf.report.html"):
        (checkout / made).unlink(missing_ok=True)
    for command in ours:
        shown = run(command, capsys)
        if " prune " in command:
            convert(checkout / "pruned", checkout / "pruned-Q4_K_M.gguf", GGMLQuantizationType.Q4_0)
        if " shrink mixture " in command:
            convert_experts(checkout / "smaller", checkout / "smaller-Q4_K_M.gguf", GGMLQuantizationType.F16)
        if " survive " in command:
            assert (
                "made smaller without zeros" if "smaller" in command else "Every pruned weight is zero in this GGUF"
            ) in shown
        if " check " in command:
            assert "nothing else differs" in shown
    assert (checkout / "small.imatrix.gguf").exists() and (checkout / "smaller.imatrix.gguf").exists()


def test_the_library_as_the_readme_shows_it(checkout, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(checkout)
    exec(compile(example, "README.md", "exec"), {})
    assert (checkout / "by-library/config.json").exists()


def anchors(page):
    """The anchors that a renderer gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_every_other_command_is_what_make_does():
    """CI runs `make demo`, `make lint` and `make test`; the lines by hand are theirs."""
    ci, makefile = ((ROOT / file).read_text("utf-8") for file in (".ci/run", "Makefile"))
    rest = [command for command in COMMANDS if command not in OURS]
    assert rest == [
        "make demo",
        "make test",
        "python3 -m venv .venv && . .venv/bin/activate",
        'pip install --constraint constraints.txt --editable ".[test]"',
        "python -m pytest",
    ]
    assert "make demo VENV=" in ci and "make test VENV=" in ci
    for target in ("demo", "quick", "test", "lint"):
        assert re.search(rf"^{target}:", makefile, re.M)
    for part in ("-m venv $(VENV)", "--constraint constraints.txt", '--editable ".[test]"', "-m pytest"):
        assert part in makefile
    demo = [command for command in OURS if "demo-pruned" in command]
    assert len(demo) == 3
    for command in demo:
        assert command.removeprefix("python ") in makefile


def test_the_workflow_tests_what_is_supported():
    workflow, setup = ((ROOT / file).read_text("utf-8") for file in (".github/workflows/test.yml", "setup.cfg"))
    assert '-m pip install --constraint constraints.txt --editable ".[test]"' in workflow
    oldest = re.search(r"transformers>=([\d.]+)", setup)[1]
    assert f"transformers=={oldest}.*" in workflow
    assert 'python: "3.10"' in workflow and "python_requires = >=3.10" in setup and "Python 3.10 to 3.13" in README


def test_the_readme_is_short_and_begins_with_a_command():
    lines = README.splitlines()
    assert len(lines) < 150
    demo = "make demo    # in a new .venv: install, prune the bundled demo model 2:4, prove the result, perplexity before and after"
    assert lines.index(demo) < 30


def commands():
    """{command: its long flags}, as its --help shows them."""
    (subparsers,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return {
        name: {flag for action in command._actions for flag in action.option_strings if flag.startswith("--")}
        for name, command in subparsers.choices.items()
    }


def sections():
    """{heading: text} of the page of commands."""
    parts = re.split(r"^## (.*)\n", COMMANDS_PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("command", "flags"), commands().items(), ids=list(commands()))
def test_a_command_and_its_flags_are_described(command, flags):
    """In the section of the command, or in one that several commands share; `plan` has the flags of `prune`."""
    own, shared = sections()[command], [text for heading, text in sections().items() if heading not in commands()]
    text = "".join([own, *shared, sections()["prune"] if command == "plan" else ""])
    assert flags <= set(FLAG.findall(text))
    assert f"`{command} " in own and f"#{command})" in README


@pytest.mark.parametrize("page", ["README.md", "lowmem_wanda/docs/commands.md", "lowmem_wanda/docs/measured.md"])
def test_no_page_names_a_flag_that_does_not_exist(page):
    known = set().union(*commands().values(), {"--version"}, OTHERS)
    assert set(FLAG.findall((ROOT / page).read_text("utf-8"))) <= known


def test_the_rooms_are_described_with_what_they_may_import():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ARCHITECTURE.splitlines() if "|" in line]
    laws = {row[0].strip("`"): row for row in rows if len(row) == 4}
    for room, allowed in ROOMS.items():
        _, _, imports, third = laws[room]
        assert set(re.findall(r"`([^`]+)`", imports)) == allowed, room
        named = {name for name in re.findall(r"`([^`]+)`", third) if not (PACKAGE / room / f"{name}.py").exists()}
        assert named == {package.strip("*") for package in THIRD[room]}, room


def test_the_files_that_are_named_exist():
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|md|yml))`", ARCHITECTURE):
        coming = name in ("pruning/recover.py", "pruning/allocate.py", "pruning/structured.py", "streaming/ranks.py")
        assert coming or (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_the_built_in_text_and_the_demo_are_as_said():
    text = sum(file.stat().st_size for file in (ROOT / "lowmem_wanda/data/texts").iterdir())
    assert text > 120_000
    for page in (README, COMMANDS_PAGE):
        assert f"{round(text, -4) // 1000} KB" in page
    assert sum(file.stat().st_size for file in (ROOT / "lowmem_wanda/data/demo").iterdir()) < 3_000_000
