"""The model as lm-evaluation-harness sees it: every answer is that of the harness's own `hf` model."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
import lm_eval
from helpers import opened
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lowmem_wanda.errors import BudgetError, CalibrationError, CheckpointError, LowmemError, ModelError
from lowmem_wanda.evaluation import harness, zeroshot
from lowmem_wanda.evaluation import requests as sweeps
from lowmem_wanda.evaluation.harness import Lowmem

pytestmark = [pytest.mark.slow, pytest.mark.real]

ROOT = Path(__file__).resolve().parents[2]
LOCAL = str(ROOT / "tests" / "evaluation" / "tasks")
TASKS = [f"local_{task}" for task in
         ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")]  # fmt: skip
LIMIT = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small only wait for each other's threads, many times as long where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stories(shared):
    return str(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def hf(stories):
    return HFLM(pretrained=stories, device="cpu", dtype="float32", batch_size=8)


@pytest.fixture
def ours(stories):
    return Lowmem(stories, device="cpu")


@pytest.fixture(scope="module")
def local(shared):
    """The local tasks' manager: the harness's own tasks take 15 s to read."""
    return TaskManager(include_path=LOCAL, include_defaults=False)


@pytest.fixture
def only_local(monkeypatch):
    """Has `zeroshot` look for tasks in the folder that it is given only."""
    monkeypatch.setattr(
        zeroshot,
        "TaskManager",
        lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False),
    )


def request(*args):
    return SimpleNamespace(args=args)


def same(one, other):
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    assert [value for value, _ in one] == pytest.approx([value for value, _ in other], abs=1e-4, rel=0)


@pytest.fixture(scope="module")
def requests(local):
    made = []
    for task in local.load(TASKS)["tasks"].values():
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=LIMIT, rank=0, world_size=1)
        made += task.instances
    return made


def test_requests_of_all_tasks_are_answered_as_by_hf(hf, ours, requests, monkeypatch):
    assert len(requests) == LIMIT * (2 + 2 + 4 + 2 + 4 + 4 + 4)
    whole = ours.loglikelihood(requests, disable_tqdm=True)
    same(whole, hf.loglikelihood(requests, disable_tqdm=True))
    assert ours.sweeps == 1 and ours.truncated > 0
    monkeypatch.setattr(
        sweeps, "sweep_size", lambda work, longest, total, size=sweeps.sweep_size: (4000, size(work, longest, 4000)[1])
    )
    same(ours.loglikelihood(requests, disable_tqdm=True), whole)
    assert ours.sweeps > 10


def test_metrics_are_those_of_hf(hf, stories, local):
    seen = []
    found = zeroshot.run(opened(stories), TASKS, include_path=LOCAL, limit=LIMIT, on_block=seen.append)
    theirs = lm_eval.simple_evaluate(hf, tasks=TASKS, task_manager=local, limit=LIMIT, log_samples=False)["results"]
    assert list(found) == TASKS
    for task in TASKS:
        expected = {key.split(",")[0]: value for key, value in theirs[task].items() if "," in key}
        assert found[task] == pytest.approx(expected, abs=1e-12)
    assert found["local_hellaswag"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert [(record["index"], record["sweep"], record["sweeps"]) for record in seen] == [(n, 0, 1) for n in range(5)]


def test_texts_of_any_length_are_rolled_over_as_by_hf(hf, ours, shared):
    text = (shared / "corpora" / "tinystories" / "held-out.txt").read_text("utf-8")
    texts = [text[:4000], text[5000:5300], text[:1000], "", "a"]
    assert len(ours.tok_encode(texts[0])) > 2 * ours.max_length
    made = [request(one) for one in texts]
    values = ours.loglikelihood_rolling(made, disable_tqdm=True)
    assert values == pytest.approx(hf.loglikelihood_rolling(made, disable_tqdm=True), abs=1e-3, rel=1e-6)


def test_a_text_without_tokens_is_certain(stories):
    model = Lowmem(stories, device="cpu", add_bos_token=False)
    assert model.loglikelihood_rolling([request(""), request("a")], disable_tqdm=True)[0] == 0


ODD = [
    ("", "Once upon a time"),
    ("", "<s>"),
    ("", "<s> Once"),
    ("<s>Once upon", " a time"),
    ("Once upon a  ", "time"),
    ("Once", " upon"),
    ("Once", " upon a"),
    ("Once", " upon"),
    ("word " * 600, "and so on"),
]


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("most", [None, 32])
def test_odd_requests_are_answered_as_by_hf(stories, bos, most):
    """Without HFLM's cache of logits: with it, 0.4.13 takes those of the wrong tokens for one of two requests that
    make the same ids of other contexts, as ("", "Once upon a time") and ("<s>Once upon", " a time") do."""
    given = {"device": "cpu", "dtype": "float32", "add_bos_token": bos, "max_length": most}
    theirs, ours = HFLM(pretrained=stories, logits_cache=False, **given), Lowmem(stories, **given)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id, ours.tokenizer_name) == (
        theirs.max_length, theirs.prefix_token_id, theirs.eot_token_id, theirs.tokenizer_name)  # fmt: skip
    odd = ODD[:1] + ODD[2:] if len(theirs.tok_encode("<s>", add_special_tokens=False)) == 1 else ODD
    made = [request(*pair) for pair in odd]
    same(ours.loglikelihood(made, disable_tqdm=True), theirs.loglikelihood(made, disable_tqdm=True))


def test_greedy_is_told_as_by_hf(hf, ours):
    begin = "Once upon a time, there was a little girl named"
    tokens = torch.tensor([hf.tok_encode(begin)])
    whole = hf.tokenizer.decode(
        hf.model.generate(tokens, max_new_tokens=30, do_sample=False)[0], skip_special_tokens=True
    )
    text = whole.removeprefix(begin)
    made = [request(begin, text[:end]) for end in range(4, len(text))] + [request(begin, " Xylophone")]
    answers = ours.loglikelihood(made, disable_tqdm=True)
    same(answers, hf.loglikelihood(made, disable_tqdm=True))
    assert {greedy for _, greedy in answers} == {True, False}


def test_answers_are_kept_as_soon_as_their_sweep_is_done(ours, monkeypatch):
    """So that a killed run with --use_cache goes on from there."""
    kept = []
    monkeypatch.setattr(
        sweeps, "sweep_size", lambda work, longest, total, size=sweeps.sweep_size: (40, size(work, longest, 40)[1])
    )
    monkeypatch.setattr(ours, "cache_hook", SimpleNamespace(add_partial=lambda *given: kept.append(given)))
    made = [request("Once upon a time there", " was"), request("Once", " upon"), request("Lily", " and Tom")]
    answers = ours.loglikelihood(made, disable_tqdm=True)
    assert sorted(kept) == sorted(
        ("loglikelihood", one.args, answer) for one, answer in zip(made, answers, strict=True)
    )
    assert ours.sweeps == 2


def test_a_budget_is_kept_or_refused(stories):
    made = [request("Once upon a time there", " was")]
    with pytest.raises(BudgetError, match="--max-ram"):
        Lowmem(stories, device="cpu", max_ram="50MB").loglikelihood(made, disable_tqdm=True)
    assert Lowmem(stories, device="cpu", max_ram=3).streamed.budget.max_ram == 3 * 10**9


@pytest.mark.parametrize(
    ("given", "message"),
    [({"peft": "x"}, "peft: lowmem has no such argument"), ({"dtype": "int8"}, "--dtype int8: give one of auto, float32"),
     ({"max_ram": "much"}, "max_ram='much' is not a size")],
)  # fmt: skip
def test_arguments_that_are_not_known_are_named(stories, given, message):
    with pytest.raises(LowmemError, match=message):
        Lowmem(stories, **given)


def test_no_text_is_generated(ours):
    with pytest.raises(ModelError, match="generate_until: a model that is streamed block by block does not generate"):
        ours.generate_until([request("Once", {})])
    assert ours.loglikelihood([]) == [] and ours.loglikelihood_rolling([]) == []
    with pytest.raises(ModelError, match="give at least 1 of both"):
        ours._loglikelihood_tokens([(("a", ""), [1], [])])
    with pytest.raises(ModelError, match=r"at most 512 \(max_length\)"):
        ours._loglikelihood_tokens([(("a", "b"), [1], [5] * 513)])


def test_a_tokenizer_without_special_tokens_serves_where_none_is_needed(shared):
    model = Lowmem(str(shared / "models" / "craftgpt-5m"), device="cpu")  # HFLM cannot encode with it at all
    assert model.max_length == 64
    ((value, _),) = model.loglikelihood([request("hello", " there")], disable_tqdm=True)
    assert value < 0
    with pytest.raises(ModelError, match="give --model_args prefix_token_id=ID"):
        model.loglikelihood([request("", "hello")], disable_tqdm=True)


def test_a_folder_without_a_tokenizer_is_refused(tiny, tmp_path):
    with pytest.raises(CalibrationError, match="its tokenizer cannot be loaded"):
        Lowmem(str(tiny("llama")), device="cpu")
    with pytest.raises(CheckpointError):
        Lowmem(str(tmp_path / "nowhere"))


def test_conversations_lose_system_messages_that_their_template_has_no_place_for(ours):
    ours.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert ours.apply_chat_template(talk) == "[user]Who?[assistant]"
    assert ours.apply_chat_template(talk[1:], add_generation_prompt=False) == "[user]Who?"


TASK = """
task: {name}
output_type: {kind}
dataset_path: {path}
validation_split: validation
doc_to_text: text
doc_to_target: text
"""


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("text", "generate_until", "task text: a model that is streamed"), ("far", "loglikelihood", "task far: it or its"),
     ("nothing", "loglikelihood", "--tasks nothing: lm-evaluation-harness knows no such task")],
)  # fmt: skip
def test_tasks_that_cannot_be_run_are_named_before_any_work(
    stories, tmp_path, only_local, monkeypatch, name, kind, message
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "Once"}))
    path = (
        f"json\ndataset_kwargs: {{data_files: {{validation: {tmp_path / 'data.jsonl'}}}}}"
        if name == "text"
        else "no-such/data-set"
    )
    (tmp_path / "task.yaml").write_text(TASK.format(name="far" if name == "nothing" else name, kind=kind, path=path))
    with pytest.raises((ModelError, CalibrationError), match=message):
        zeroshot.run(opened(stories), [name], include_path=str(tmp_path))


def test_tasks_are_found_by_file_pattern_and_group(stories, only_local):
    found = zeroshot.run(opened(stories), [f"{LOCAL}/rte.yaml", "local_arc_*"], include_path=LOCAL, limit=2)
    assert list(found) == ["local_rte", "local_arc_challenge", "local_arc_easy"]
    found = zeroshot.run(opened(stories), ["local_arc"], include_path=LOCAL, limit=2)
    assert found["local_arc"]["acc"] == (found["local_arc_easy"]["acc"] + found["local_arc_challenge"]["acc"]) / 2
    with pytest.raises(CalibrationError, match="--tasks: Duplicate task 'local_arc_easy'.*; name it once"):
        zeroshot.run(opened(stories), ["local_arc", "local_arc_easy"], include_path=LOCAL, limit=2)
    with pytest.raises(CalibrationError, match="is not a folder"):
        zeroshot.run(opened(stories), ["x"], include_path="nowhere")


def test_perplexity_tasks_run_too(stories, only_local):
    found = zeroshot.run(opened(stories), ["local_tinystories"], include_path=LOCAL, limit=3)
    assert 1 < found["local_tinystories"]["byte_perplexity"] < 4


def test_the_harness_knows_it_by_name(stories):
    assert get_model("lowmem") is Lowmem is harness.Lowmem
    model = Lowmem.create_from_arg_string(f"pretrained={stories},max_ram=8GB", {"batch_size": 1, "device": "cpu"})
    assert model.streamed.budget.max_ram == 8 * 10**9 and model.device.type == "cpu" and model.rank == 0


def test_the_harness_s_own_command_line(stories, shared, tmp_path):
    command = [sys.executable, "-m", "lowmem_wanda.evaluation.zeroshot", "run", "--model", "lowmem", "--device", "cpu",
               "--model_args", f"pretrained={stories}", "--tasks", "local_rte", "--include_path", LOCAL,
               "--limit", "10", "--output_path", str(tmp_path / "out.json")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "local_rte" in done.stdout and "lowmem" in done.stdout
    (written,) = tmp_path.glob("out*.json")
    shown = json.loads(written.read_text())["results"]["local_rte"]
    assert (
        shown["acc,none"]
        == zeroshot.run(opened(stories), ["local_rte"], include_path=LOCAL, limit=10)["local_rte"]["acc"]
    )
