"""The library's face: what it holds, that it is documented and cheap to import, and one's own method."""

import ast
import doctest
import gc
import inspect
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, digests, opened, read_tensor

import lowmem_wanda
from lowmem_wanda import Checkpoint, Method, SquaredNorm, check, compare, evaluate, imatrix, plan, prune, survive
from lowmem_wanda.errors import CalibrationError, LowmemError, NumberError, OutputError, PatternError
from lowmem_wanda.pruning import ORDERS
from lowmem_wanda.sparsity import METHODS, REFINEMENTS, UPDATES
from lowmem_wanda.sparsity.methods import known

FUNCTIONS = (prune, plan, check, evaluate, compare, imatrix, survive)
HEAVY = {"torch", "transformers", "accelerate", "numpy", "rich", "psutil"}


def test_all_names_are_there_and_only_they():
    assert lowmem_wanda.__all__ == sorted(lowmem_wanda.__all__)
    assert all(getattr(lowmem_wanda, name) is not None for name in lowmem_wanda.__all__)
    assert set(lowmem_wanda.__all__) == set(lowmem_wanda._MODULES) <= set(dir(lowmem_wanda))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lowmem_wanda.nothing  # noqa: B018
    typed = ast.parse((ROOT / "lowmem_wanda/__init__.py").read_text())
    imported = {alias.name for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(lowmem_wanda.__all__) <= imported  # a type checker sees every one of them


def test_importing_the_face_is_cheap():
    code = "import sys, lowmem_wanda; from lowmem_wanda import METHODS, ORDERS, LowmemError; " \
        f"sys.exit(bool({HEAVY} & set(sys.modules)))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert set(known.METHODS) == set(METHODS)
    assert {"none", *known.REFINEMENTS} == set(REFINEMENTS) and {"none", *known.UPDATES} == set(UPDATES)
    assert ORDERS == ("block", "dense", "sequential")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_parameter_is_documented(function):
    words = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert f"    {name}: " in words
    assert all(f"\n{section}:\n" in words for section in ("Args", "Returns", "Raises", "Example"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the examples name: a source, a text, what prune made of the source."""
    path = tmp_path_factory.mktemp("examples")
    (path / "my.txt").write_text("It was a dark and stormy night. " * 50)
    (path / "source").symlink_to(ROOT / "lowmem_wanda/data/demo")
    prune(path / "source", path / "pruned", method="magnitude")
    return path


@pytest.mark.parametrize("thing", [*FUNCTIONS, Checkpoint, Method, SquaredNorm], ids=lambda thing: thing.__name__)
def test_the_examples_run(folder, monkeypatch, thing):
    monkeypatch.chdir(folder)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    test = parser.get_doctest(inspect.getdoc(thing), {}, thing.__name__, None, 0)
    assert test.examples and runner.run(test).failed == 0


def wanda(weight, inputs):
    return weight.float().abs() * inputs.norms()


def test_ones_own_method_needs_no_registration(tiny, token_file, tmp_path):
    mine = Method(score=wanda, statistic=SquaredNorm)
    settings = {"text": [str(token_file)], "sequences": 4, "length": 64, "device": "cpu"}
    report = prune(tiny("llama"), tmp_path / "mine", method=mine, pattern="2:4", **settings)
    prune(tiny("llama"), tmp_path / "wanda", pattern="2:4", **settings)
    for shard in (tmp_path / "wanda").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "mine" / shard.name).read_bytes()
    assert report["arguments"]["method"] == "wanda" and report["summary"]["keeps_bits"]


def test_a_job_by_another_function_of_the_same_name_is_another_job(tiny, tmp_path):
    def once(weight, inputs):
        return weight.float().abs()

    first = Method(score=once, statistic=None)
    prune(tiny("llama"), tmp_path / "out", method=first)
    assert prune(tiny("llama"), tmp_path / "out", method=Method(score=once, statistic=None))

    def once(weight, inputs):
        return weight.float().abs() + 1

    with pytest.raises(OutputError, match="holds a job with method code"):
        prune(tiny("llama"), tmp_path / "out", method=Method(score=once, statistic=None))


class Power:
    """A score with a state, and a closure, a default and a partial that differ in a value."""

    def __init__(self, power):
        self.power = power

    def __call__(self, weight, inputs):
        return weight.float().abs() ** self.power


def closure(power):
    return lambda weight, inputs: weight.float().abs() ** power


def default(power):
    def score(weight, inputs, power=power):
        return weight.float().abs() ** power

    return score


@pytest.mark.parametrize("make", [Power, closure, default, lambda power: partial(default(1), power=power)])
def test_methods_that_differ_in_a_value_have_other_codes(make):
    codes = [Method(score=make(power), statistic=None).code for power in (1, 1, 2)]
    assert codes[0] == codes[1] != codes[2]


def test_a_code_is_the_same_in_every_process_or_never():
    """Sets are ordered by a seed of the process; an open file has no identity."""
    code = (
        "from lowmem_wanda import Method; print(Method(lambda w, i: w if w in {'a', 'b', 'c', 'd'} else w, None).code)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT,
                           capture_output=True, text=True).stdout for seed in "12"]  # fmt: skip
    assert runs[0] == runs[1] != ""
    with open(__file__) as file:
        other = [Method(lambda weight, inputs: file, None) for _ in range(2)]
        assert other[0].code == other[0].code != other[1].code


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"score": 5, "statistic": None}, "score, solve, refine and update are functions"),
        ({"score": wanda, "statistic": None, "group": "rows"}, "group 'rows' is not known"),
        ({"score": wanda, "statistic": dict}, r"its statistic has no add\(\)"),
    ],
)
def test_a_method_that_cannot_be_one_is_refused(settings, says):
    with pytest.raises(PatternError, match=says):
        Method(**settings)


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda weight, inputs: weight.float(), "not all finite and at least 0"),
        (lambda weight, inputs: weight.float().abs() / 0, "not all finite"),
        (lambda weight, inputs: weight.float().abs()[:1], r"its scores are \[1, 32\] for a weight of \[32, 32\]"),
        (lambda weight, inputs: weight.abs_().float(), "changes the weight in place"),
        (lambda weight, inputs: None, "its score gives NoneType"),
    ],
)
def test_scores_that_cannot_be_compared_are_an_error(tiny, tmp_path, score, says):
    with pytest.raises(NumberError, match=f"tensor model.layers.0.self_attn.q_proj.weight: method .*{says}"):
        prune(tiny("llama"), tmp_path / "out", method=Method(score=score, statistic=None))


def test_a_method_that_updates_weights_says_so_and_is_proved_by_its_zeros(tiny, token_file, tmp_path):
    def grow(weight, dense, inputs):
        weight.mul_(torch.where(dense == 0, 1, 1.25))

    moving = Method(score=wanda, statistic=SquaredNorm, update=grow)
    report = prune(tiny("llama"), tmp_path / "out", method=moving, text=[str(token_file)])
    assert not report["summary"]["keeps_bits"] and "updated" in report["summary"]["gives"]
    findings = check(tmp_path / "out", tiny("llama"))
    assert findings.problems == [] and findings.moved == 21
    name = "model.layers.0.mlp.up_proj.weight"
    out, before = (read_tensor(Checkpoint(path).tensors[name]) for path in (tmp_path / "out", tiny("llama")))
    assert torch.equal(out[out != 0], before[out != 0] * 1.25)
    (tmp_path / "out/report.json").unlink()
    assert any(
        "neither the source's nor zero" in problem for problem in check(tmp_path / "out", tiny("llama")).problems
    )


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (lambda weight, dense, inputs: weight.add_(1), "must leave pruned weights zero"),
        (lambda weight, dense, inputs: weight.div_(0), "its update leaves NaN or infinity"),
    ],
)
def test_an_update_that_breaks_a_matrix_is_an_error(tiny, tmp_path, update, says):
    with pytest.raises(LowmemError, match=f"tensor model.layers.0.self_attn.q_proj.weight: .*{says}"):
        prune(tiny("llama"), tmp_path / "out", method=Method(lambda weight, _: weight.abs(), None, update=update))


def test_a_method_counts_its_memory(tiny):
    matrix = 32 * 64
    whole = Method(score=wanda, statistic=SquaredNorm)
    assert whole.workspace(32, 64, 4) == 12 * matrix and known.METHODS["wanda"].workspace(32, 64, 4) == 0
    assert Method(wanda, SquaredNorm, update=print).workspace(32, 64, 2) == 14 * matrix
    settings = {"text": [], "sequences": 1, "length": 8, "device": "cpu"}
    ids = {"method": "magnitude"}
    assert plan(tiny("llama"), **ids, **settings).host_peak > 0


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"method": "best"}, PatternError, "--method best"),
        ({"statistics": "none"}, PatternError, "--statistics none: give one of block, dense, sequential"),
        ({"zeros": "minus"}, PatternError, "--zeros minus"),
        ({"sequences": 0}, CalibrationError, "--sequences 0"),
        ({"dtype": "int8"}, LowmemError, "--dtype int8"),
        ({"batch": 0}, LowmemError, "--batch 0"),
        ({"slots": 4}, LowmemError, "slots=4"),
        ({"pattern": "50%", "group": "col"}, PatternError, "--group col: give one of row, matrix"),
        ({"held": -1}, LowmemError, "held=-1"),
        ({"max_ram": "much"}, LowmemError, "max_ram='much' is not a size such as 8GB"),
    ],
)
def test_words_and_numbers_that_are_none_are_refused(tiny, tmp_path, settings, error, says):
    with pytest.raises(error, match=says):
        prune(tiny("llama"), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_one_text_or_glob_needs_no_list(tiny, token_file, tmp_path):
    one = prune(tiny("llama"), tmp_path / "one", text=token_file, exclude="*v_proj*")
    many = prune(tiny("llama"), tmp_path / "many", text=[str(token_file)], exclude=["*v_proj*"])
    assert one["arguments"] == many["arguments"] and digests(tmp_path / "one") == digests(tmp_path / "many")


def hooks(model):
    """All hooks of a skeleton, and the kinds of its blocks."""
    modules = list(model.skeleton.model.modules())
    return sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in modules), [type(one) for one in modules]


def test_a_job_run_twice_in_one_process_leaves_nothing_behind(tiny, token_file, tmp_path):
    from lowmem_wanda.pruning.job import prepare
    from lowmem_wanda.pruning.prune import run

    model = opened(tiny("llama"), batch=4)
    before = hooks(model)
    job = prepare(model, text=[str(token_file)])
    for name in ("first", "second"):
        run(job, tmp_path / name)
        assert hooks(model) == before
        assert all(parameter.is_meta for parameter in model.skeleton.model.parameters())
    gc.collect()
    alive = {type(one).__name__ for one in gc.get_objects() if "lowmem_wanda.streaming" in str(type(one))}
    assert not alive & {"Decoder", "BlockBuffers", "Slot", "Stub", "Block", "Peak"}
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_reports_are_plain_json_with_a_format(tiny, token_file, tmp_path):
    text = {"text": [str(token_file)], "length": 16, "device": "cpu"}
    made = prune(tiny("llama"), tmp_path / "out", **text)
    found = [
        made,
        evaluate(tmp_path / "out", **text, report=tmp_path / "eval"),
        json.loads((tmp_path / "eval/report.json").read_text()),
        compare(tiny("llama"), tmp_path / "table", **text, methods=["magnitude"], patterns=["2:4"]),
        imatrix(tiny("llama"), tmp_path / "x.gguf", **text),
        survive(tmp_path / "out"),
    ]
    for report in found:
        assert json.loads(json.dumps(report)) == report
    assert [report.get("format") for report in found] == [1, None, 1, 1, 1, 1]
    assert not [key for report in found for key in report.get("arguments", ()) if key.startswith("--")]
    assert json.loads((tmp_path / "out/job.json").read_text())["format"] == 1


def test_a_job_of_an_older_format_is_refused_in_one_sentence(tiny, tmp_path):
    prune(tiny("llama"), tmp_path / "out", method="magnitude")
    job = json.loads((tmp_path / "out/job.json").read_text())
    del job["format"]
    (tmp_path / "out/job.json").write_text(json.dumps(job))
    with pytest.raises(OutputError, match=r"another version of lowmem-wanda.*continue it with that version, or give"):
        prune(tiny("llama"), tmp_path / "out", method="magnitude")


def test_several_checkpoints_are_evaluated_alike(tiny, token_file, tmp_path):
    np.save(tmp_path / "x.npy", np.load(token_file)[:2])
    told = []
    both = evaluate([tiny("llama"), tiny("llama_tied")], text=[str(tmp_path / "x.npy")], on_report=told.append)
    assert [one["path"] for one in both] == [str(tiny("llama")), str(tiny("llama_tied"))]
    assert [len(report["models"]) for report in told] == [1, 2] and both[0]["tokens"] == 30
