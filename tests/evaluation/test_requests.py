"""Inputs of many lengths in sweeps and batches: every answer is that of the whole model on the input alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import opened
from transformers import AutoModelForCausalLM

from lowmem_wanda.errors import BudgetError, CalibrationError
from lowmem_wanda.evaluation import requests as sweeps
from lowmem_wanda.evaluation.requests import (
    LEAST,
    Input,
    batched,
    collect_inputs,
    group_inputs,
    padded,
    sweep,
    sweep_size,
    sweep_slices,
)
from lowmem_wanda.streaming.workload import Placement

IN_MEMORY = Placement("device", 3, 1, 2, 0, 1 << 20, 1 << 20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small only wait for each other's threads, many times as long where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def questions():
    """Some of one length, some that differ in their last id only, one twice, one longer than the 64 positions."""
    draw = np.random.default_rng(0)
    made = [(draw.integers(3, 96, n).tolist(), draw.integers(3, 96, k).tolist()) for n, k in
            [(5, 3), (5, 3), (20, 1), (1, 4), (40, 9), (30, 2), (61, 4), (70, 5)]]  # fmt: skip
    context = made[2][0]
    return [*made, (context, [7]), (context, [9]), (context[:-2], [*context[-2:], 11]), made[0]]


def alone(model, context, continuation, most):
    tokens = (context + continuation)[-(most + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :].double()
    target = torch.tensor(continuation)
    value = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float(value), bool((logits.argmax(-1) == target).all())


def check(work, model, questions, made):
    answers = {}
    for number in range(len(made.slices)):
        answered = sweep(work, made, number)
        assert not answers.keys() & answered.keys()
        answers |= answered
    for number, question in enumerate(questions):
        value, greedy = alone(model, *question, 64)
        assert answers[number] == (pytest.approx(value, abs=1e-4), greedy)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bloom"])
def test_answers_are_those_of_each_input_alone(tiny, questions, family):
    work = opened(tiny(family))
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    greedy = int(model(torch.tensor([questions[0][0]])).logits[0, -1].argmax())
    questions = [*questions, (questions[0][0], [greedy])]
    made = group_inputs(work, collect_inputs(questions, 64))
    assert len(made.slices) == 1 and made.sizes == sorted(made.sizes, reverse=True) and made.sizes[0] == 64
    check(work, model, questions, made)
    pieces = list(sweep_slices(made.sizes, 70))
    assert len(pieces) > 3
    check(work, model, questions, replace(made, slices=pieces))


def test_each_input_is_given_once(questions):
    inputs = collect_inputs(questions, 64)
    assert len(inputs) == len(questions) - 4
    lengths = [len(one.tokens) for one in inputs]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 64
    assert sorted(number for one in inputs for number, _ in one.questions) == list(range(len(questions)))
    shared = next(one for one in inputs if len(one.questions) == 4)
    assert [len(continuation) for _, continuation in shared.questions] == [1, 1, 1, 3]


def test_batches_hold_one_length_and_no_more_than_they_may():
    inputs = [Input(tuple(range(3, 3 + size)), [(size, [8])]) for size in (40, 30, 29, 20, 18, 17)]
    made = list(batched(inputs, [padded(len(one.tokens), None) for one in inputs], 64))
    assert [batch.tokens.shape for batch in made] == [(1, 48), (2, 32), (2, 32), (1, 32)]
    assert made[1].rows.tolist() == [29, 32 + 28] and made[1].targets.tolist() == [8, 8]
    assert made[1].tokens[1, 29:].tolist() == [0, 0, 0]
    assert [len(batch.tokens) for batch in batched(inputs, [48] * 6, 1)] == [1] * 6


@pytest.mark.parametrize(
    ("length", "positions", "expected"),
    [(1, None, 16), (16, None, 16), (17, None, 32), (200, None, 208), (256, None, 256), (257, None, 272),
     (513, None, 544), (4000, None, 4096), (4097, None, 4352), (60, 62, 62), (2048, 2048, 2048), (70, 62, 70)],
)  # fmt: skip
def test_padded_lengths_are_few_and_within_the_positions(length, positions, expected):
    assert padded(length, positions) == expected


def test_padding_adds_little():
    assert all(padded(n, None) <= n * 17 / 16 + 16 for n in range(1, 5000))
    assert len({padded(n, None) for n in range(1, 4097)}) == 16 + 4 * 16


def test_pieces_are_full_and_hold_everything():
    assert list(sweep_slices([5, 4, 3, 2, 1], 8)) == [slice(0, 1), slice(1, 3), slice(3, 5)]
    assert list(sweep_slices([9, 9, 1], 5)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(sweep_slices([1], 5)) == [slice(0, 1)]


def planned(monkeypatch, work, fits, in_file, longest, total):
    """(tokens of a sweep, the sequences that were tried) where at most `fits` of them fit, and more than `in_file`
    only in a file."""
    tried = []

    def choose(asked):
        sequences, length = asked.sequences, asked.length
        assert length == longest
        tried.append(sequences)
        if sequences > fits:
            raise BudgetError("too many")
        return replace(IN_MEMORY, states="file" if sequences > in_file else "device"), None

    monkeypatch.setattr(sweeps, "choose", choose)
    return sweep_size(work, longest, total)[0], tried


def test_as_much_as_fits_goes_in_one_sweep(monkeypatch, tiny):
    work = opened(tiny("llama"))
    assert planned(monkeypatch, work, 10**6, 10**6, 100, 150) == (150, [2])
    assert planned(monkeypatch, work, 10**6, 10**6, 512, 10**6) == (10**6, [1954])
    assert planned(monkeypatch, work, 10**6, 600, 512, 10**6) == (250_000, [1954, 977, 489])
    assert planned(monkeypatch, work, 600, 600, 512, 10**6) == (250_000, [1954, 977, 489])
    assert planned(monkeypatch, work, 10**6, 0, 512, 10**5) == (LEAST, [196, 98, 49, 32])  # the least, in a file
    assert planned(monkeypatch, work, 2, 2, 9000, 40_000) == (LEAST, [5, 3, 2])
    with pytest.raises(BudgetError, match="too many"):
        planned(monkeypatch, work, 1, 1, 512, 10**5)


def test_an_id_that_the_model_does_not_have_is_refused(tiny):
    work = opened(tiny("llama"))
    for question in (([3, 96], [4]), ([3], [96])):
        with pytest.raises(CalibrationError, match="token id 96 is outside the model's vocabulary of 96"):
            sweep(work, group_inputs(work, collect_inputs([question], 64)), 0)
