"""Questions about what follows in many short inputs, answered in as few walks through the model as memory allows.

A walk reads the whole model, so all inputs go along, each but once; those of one length are computed together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from lowmem_wanda.data.calibration import check_ids
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.evaluation.likelihood import Batch, Notify, score
from lowmem_wanda.streaming.model import Work
from lowmem_wanda.streaming.placement import Layout, choose

LEAST = 16384  # tokens of a sweep: with fewer, reading the model takes longer than computing with it

Answer = tuple[float, bool]  # log p of a continuation in nats, whether greedy decoding would give it


@dataclass(frozen=True)
class Input:
    """Ids that the model is given, and what is asked of them: (question's number, ids of its continuation). The last
    id of a continuation is not given any more, those before it are the last ones of `tokens`."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Sweeps:
    """Inputs, the longest first, the lengths that they are padded to, and which of them go through the model
    together."""

    inputs: list[Input]
    sizes: list[int]
    parts: list[slice]
    layout: Layout


def collect(questions: Sequence[tuple[list[int], list[int]]], most: int) -> list[Input]:
    """The inputs of (context, continuation) pairs of ids, each but once, the longest first; of those longer than
    `most` tokens the end."""
    found: dict[tuple[int, ...], Input] = {}
    for number, (context, continuation) in enumerate(questions):
        tokens = tuple((context + continuation)[-(most + 1) :][:-1])
        found.setdefault(tokens, Input(tokens, [])).asked.append((number, continuation))
    return sorted(found.values(), key=lambda one: (-len(one.tokens), one.tokens))


def lay_out(work: Work, inputs: list[Input]) -> Sweeps:
    """In which sweeps, and how, the inputs go through a model. Raises BudgetError."""
    sizes = [padded(len(one.tokens), work.hollow.positions) for one in inputs]
    most, layout = plan(work, sizes[0], sum(sizes))
    return Sweeps(inputs, sizes, list(cut(sizes, most)), layout)


def sweep(work: Work, sweeps: Sweeps, number: int, notify: Notify = lambda record: None) -> dict[int, Answer]:
    """Answers of one sweep, by the questions' numbers. Raises CalibrationError for an id that the model does not have,
    NumberError."""
    part = sweeps.parts[number]
    batches = list(in_batches(sweeps.inputs[part], sweeps.sizes[part], sweeps.layout.batch * sweeps.sizes[0]))
    targets = np.concatenate([batch.targets for batch in batches])
    for ids in (targets, *(batch.tokens for batch in batches)):
        check_ids(ids, work.hollow.vocabulary, f"{work.checkpoint.path}: its tokenizer")
    scores = score([work], batches, sweeps.layout, notify)
    losses, hits = scores.losses[0], scores.top[0] == targets
    answers, start = {}, 0
    for question, continuation in (asked for one in sweeps.inputs[part] for asked in one.asked):
        end = start + len(continuation)
        answers[question] = (-float(losses[start:end].sum()), bool(hits[start:end].all()))
        start = end
    return answers


def padded(length: int, positions: int | None) -> int:
    """The length that an input is padded to: few different ones, each at most a sixteenth longer (up to 256, the next
    multiple of 16), and none beyond the model's positions."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 5))
    rounded = -(-length // step) * step
    return rounded if positions is None else min(rounded, max(length, positions))


def plan(work: Work, longest: int, total: int) -> tuple[int, Layout]:
    """How many of `total` tokens, in inputs of at most `longest`, go through the model in one sweep, and the layout.

    All, or half as many until their hidden states need not lie in a file, but not below `LEAST`. Raises BudgetError.
    """
    tokens = total
    while True:
        try:
            layout, _ = choose(replace(work, shape=(-(-tokens // longest), longest)))
            if layout.states != "file" or tokens <= LEAST:
                return tokens, layout
        except BudgetError:
            if tokens <= LEAST:
                raise
        tokens = max(LEAST, -(-tokens // 2))


def cut(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Consecutive pieces, each of at most `most` tokens, or of one input."""
    start = total = 0
    for index, size in enumerate(sizes):
        if total + size > most and index > start:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))


def in_batches(inputs: Sequence[Input], sizes: Sequence[int], tokens: int) -> Iterator[Batch]:
    """Inputs of one padded size together, as many as make `tokens`; what follows an input changes nothing in it."""
    for size, group in groupby(zip(sizes, inputs, strict=True), key=lambda pair: pair[0]):
        same = [one for _, one in group]
        count = max(1, tokens // size)
        for start in range(0, len(same), count):
            yield _batch(same[start : start + count], size)


def _batch(inputs: Sequence[Input], size: int) -> Batch:
    tokens = np.zeros((len(inputs), size), dtype=np.int64)
    rows, targets = [], []
    for index, one in enumerate(inputs):
        end = index * size + len(one.tokens)
        tokens[index, : len(one.tokens)] = one.tokens
        for _, continuation in one.asked:
            rows.append(np.arange(end - len(continuation), end))
            targets.append(np.array(continuation, dtype=np.int64))
    return Batch(tokens, np.concatenate(rows), np.concatenate(targets))
