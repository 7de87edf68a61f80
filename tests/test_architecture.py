"""The shape of the code: what a room may import, who prints, how small modules and functions are."""

import ast
import re
import sys
from pathlib import Path

import pytest

import lowmem_wanda

FACE = set(lowmem_wanda.__all__)
PACKAGE = Path(__file__).resolve().parents[1] / "lowmem_wanda"
FLOORS = (  # from the ground up: a room imports rooms on floors below its own
    {"errors"},
    {"checkpoint", "sparsity"},
    {"streaming", "data"},
    {"evaluation", "llamacpp"},
    {"pruning"},
    {"shrinking"},
    {"cli"},
)
ROOMS = {  # beside `errors`
    "sparsity": set(),
    "checkpoint": set(),
    "data": {"checkpoint"},
    "streaming": {"checkpoint"},
    "llamacpp": {"checkpoint", "data", "sparsity", "streaming"},
    "evaluation": {"checkpoint", "data", "streaming"},
    "pruning": {"checkpoint", "sparsity", "data", "streaming", "llamacpp", "evaluation"},
    "shrinking": {"checkpoint", "sparsity", "data", "streaming", "llamacpp", "evaluation", "pruning"},
    "cli": {"checkpoint.writer"},
}
THIRD = {  # a star: within a function, so that the package is needed only where it is used
    "sparsity": {"torch", "numpy", "triton", "*triton"},
    "checkpoint": {"numpy", "blake3"},
    "data": {"numpy", "*compression", "*datasets", "*pyarrow", "*zstandard"},
    "streaming": {"torch", "numpy", "transformers", "accelerate", "huggingface_hub", "psutil", "*greenlet", "*peft"},
    "llamacpp": {"numpy", "torch", "*gguf"},
    "evaluation": {"torch", "numpy", "lm_eval", "jinja2", "tqdm"},
    "pruning": {"torch", "numpy"},
    "shrinking": {"torch", "numpy"},
    "cli": {"*rich", "*matplotlib", "*psutil"},
}
ONLY = {  # packages that some modules of a room alone may import
    "torch": {"llamacpp": {"collect", "latents", "norms"}},
    "triton": {"sparsity": {"kernels"}},
    "lm_eval": {"evaluation": {"harness", "zeroshot"}},
    "jinja2": {"evaluation": {"harness"}},
    "tqdm": {"evaluation": {"harness"}},
}
WITHOUT_TORCH = (
    "cli.main",
    "checkpoint.verify",
    "llamacpp.survive",
    "llamacpp.shrink",
    "llamacpp.outline",
    "llamacpp.verify_gguf",
    "llamacpp.score_processes",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
IN_ROOMS = [path for path in FILES if path.parent != PACKAGE]


def room_of(path):
    """The room that a module lies in, at whatever depth; "" at the top."""
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def tree(path):
    return ast.parse(path.read_text("utf-8"))


def imports(path):
    """(dotted name, whether it stands within a function) of every import, but of those for type checkers alone."""
    parsed = tree(path)
    typing = {
        id(inner)
        for node in ast.walk(parsed)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    late = {
        id(inner)
        for node in ast.walk(parsed)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(parsed):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in late
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in late) for alias in node.names)


def ours(path):
    return [full.split(".")[1:] for full, _ in imports(path) if full.split(".")[0] == "lowmem_wanda"]


def others(path):
    for full, late in imports(path):
        package = full.split(".")[0]
        if package != "lowmem_wanda" and package not in sys.stdlib_module_names:
            yield package, late


def test_the_rooms_are_these_and_each_says_its_law_in_one_sentence():
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found == {*ROOMS, "docs", "errors.py", "__init__.py", "__main__.py", "py.typed"}
    for room in ROOMS:
        law = ast.get_docstring(tree(PACKAGE / room / "__init__.py"))
        assert law.endswith(".") and law.count(". ") == 0, room


@pytest.mark.parametrize("path", IN_ROOMS, ids=name)
def test_a_room_imports_what_it_may(path):
    room = room_of(path)
    for parts in ours(path):
        allowed = parts[0] in {room, "errors"} | ROOMS[room] or ".".join(parts[:2]) in ROOMS[room]
        face = len(parts) == 1 and parts[0] in ({*FACE, "__version__"} if room == "cli" else {"__version__"})
        assert allowed or face, f"{name(path)} imports {'.'.join(parts)}"


def test_floors_go_downward():
    level = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for room, allowed in ROOMS.items():
        assert all(level[other.split(".")[0]] < level[room] for other in allowed), room


@pytest.mark.parametrize("path", FILES, ids=name)
def test_third_parties_are_those_of_the_room(path):
    room = room_of(path)
    for package, late in others(path):
        known = THIRD.get(room, set())
        assert package in known or (late and f"*{package}" in known), f"{name(path)} imports {package}"
        if room in (few := ONLY.get(package, {})):
            assert path.stem in few[room], f"{name(path)} imports {package}"


def reached(module):
    """Third parties that importing a module of ours brings, following our own imports."""
    seen, found, left = set(), set(), [module]
    while left:
        current = left.pop()
        path = PACKAGE / f"{current.replace('.', '/')}.py"
        if current in seen or not path.exists():
            continue
        seen.add(current)
        found |= {package for package, late in others(path) if not late}
        for full, late in imports(path):
            parts = full.split(".")
            if parts[0] == "lowmem_wanda" and not late:
                left += [".".join(parts[1:]), ".".join(parts[1:-1])]
    return found


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_some_doors_open_without_torch(module):
    assert not {"torch", "transformers", "accelerate"} & reached(module)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "cli"], ids=name)
def test_only_the_command_line_prints(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_and_functions_are_small(path):
    assert path.read_text("utf-8").count("\n") <= 300
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 40, node.name


def test_no_pickle_and_no_eval():
    for path in FILES:
        assert not re.search(r"torch\.load|pickle\.|(?<!\.)\beval\(|\bexec\(", path.read_text("utf-8")), path
