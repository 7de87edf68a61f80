"""The shape of the code: imports go downward, one printer, small modules and functions."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lowmem_wanda"
LAYERS = (
    (
        "errors",
        "fused",
        "lowest",
        "patterns",
        "scores",
        "stats",
        "methods",
        "system",
        "memory",
        "clock",
        "losses",
        "quants",
    ),
    (
        "reading",
        "checkpoint",
        "tensors",
        "ring",
        "writer",
        "states",
        "job",
        "text",
        "windows",
        "matrices",
        "gguf_names",
        "imatrix",
        "norms",
    ),
    ("hollow", "trace", "decoder", "head", "recorder", "walk", "orders"),
    (
        "work",
        "layout",
        "scoring",
        "evaluate",
        "sweeps",
        "harness",
        "zeroshot",
        "task",
        "plan",
        "measure",
        "survive",
        "plots",
        "markup",
        "page",
        "report",
        "prune",
        "compare",
        "check",
    ),
    ("screen", "tables", "flags", "main"),
)
ORDER = [module for layer in LAYERS for module in layer]
MODULES = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))


def imports(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_its_layer():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    for name in imports(module):
        if name.startswith("lowmem_wanda."):
            assert ORDER.index(name.split(".")[1]) < ORDER.index(module), name


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module not in ("hollow", "decoder", "task", "report")]
)
def test_only_few_know_transformers(module):
    assert not {"transformers", "accelerate"} & {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", LAYERS[0][:6])
def test_the_lowest_layer_has_no_files(module):
    assert not {"os", "pathlib", "mmap", "json"} & set(imports(module))


@pytest.mark.parametrize("module", [module for module in MODULES if module != "main"])
def test_only_main_prints(module):
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_small(module):
    assert (PACKAGE / f"{module}.py").read_text("utf-8").count("\n") <= 300
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 40, node.name


def test_no_pickle_and_no_eval():
    for module in MODULES:
        assert not re.search(
            r"torch\.load|pickle\.|(?<!\.)\beval\(|\bexec\(", (PACKAGE / f"{module}.py").read_text("utf-8")
        ), module
