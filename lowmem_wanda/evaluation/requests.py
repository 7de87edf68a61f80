"""Questions about what follows many short inputs, answered in as few walks through the model as memory allows.

A walk reads the whole model, so all inputs share it. Equal inputs are computed once, inputs of one length together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from lowmem_wanda.data.token_ids import require_ids
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.evaluation.likelihood import TOKEN_BYTES, Batch, token_likelihoods
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import Notify, ignore
from lowmem_wanda.streaming.workload import Placement, Workload

LEAST = 16384  # tokens of a sweep: with fewer, reading the model takes longer than computing with it

Answer = tuple[float, bool]  # log p of a continuation in nats, and whether greedy decoding would give it


@dataclass(frozen=True)
class Input:
    """The ids that the model is given, and the questions about them, each (its number, ids of its continuation).

    The last id of a continuation is not given. The ids before it are the last ones of `tokens`.
    """

    tokens: tuple[int, ...]
    questions: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Sweeps:
    """Inputs, the longest first, the `sizes` that they are padded to, and the `slices` that make a sweep each."""

    inputs: list[Input]
    sizes: list[int]
    slices: list[slice]
    placement: Placement


def collect_inputs(questions: Sequence[tuple[list[int], list[int]]], most: int) -> list[Input]:
    """The distinct inputs of (context, continuation) pairs of ids, the longest first.

    An input longer than `most` tokens loses its beginning.
    """
    found: dict[tuple[int, ...], Input] = {}
    for number, (context, continuation) in enumerate(questions):
        kept = (context + continuation)[-(most + 1) :]
        tokens = tuple(kept[:-1])  # the last id is never given
        found.setdefault(tokens, Input(tokens, [])).questions.append((number, continuation))
    return sorted(found.values(), key=lambda one: (-len(one.tokens), one.tokens))


def group_inputs(model: StreamedModel, inputs: list[Input]) -> Sweeps:
    """The sweeps in which the inputs go through a model, and their placement. Raises BudgetError where none fits."""
    sizes = [padded(len(one.tokens), model.skeleton.positions) for one in inputs]
    most, placement = sweep_size(model, sizes[0], sum(sizes))
    return Sweeps(inputs, sizes, list(sweep_slices(sizes, most)), placement)


def sweep(model: StreamedModel, sweeps: Sweeps, number: int, on_block: Notify = ignore) -> dict[int, Answer]:
    """The answers of one sweep, by the numbers of the questions.

    Raises CalibrationError for an id that the model does not have, NumberError for logits that are NaN or infinite.
    """
    part = sweeps.slices[number]
    batches = list(batched(sweeps.inputs[part], sweeps.sizes[part], sweeps.placement.batch * sweeps.sizes[0]))
    targets = np.concatenate([batch.targets for batch in batches])
    for ids in (targets, *(batch.tokens for batch in batches)):
        require_ids(ids, model.skeleton.vocabulary, f"{model.checkpoint.path}: its tokenizer", made=True)
    found = token_likelihoods(model, batches, sweeps.placement, on_block=on_block)
    losses, hits = found.losses, found.top == targets
    answers, start = {}, 0
    for question, continuation in (pair for one in sweeps.inputs[part] for pair in one.questions):
        end = start + len(continuation)
        answers[question] = (-float(losses[start:end].sum()), bool(hits[start:end].all()))
        start = end
    return answers


def padded(length: int, positions: int | None) -> int:
    """The length that an input is padded to, so that few lengths occur.

    It is at most a sixteenth longer (up to 256, the next multiple of 16), and not beyond the model's positions.
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 5))
    rounded = -(-length // step) * step
    return rounded if positions is None else min(rounded, max(length, positions))


def sweep_size(model: StreamedModel, longest: int, total: int) -> tuple[int, Placement]:
    """The number of tokens that go through the model in one sweep, and the sweep's placement.

    There are `total` tokens, in inputs of at most `longest`. They go all at once, or else half as many, and so on,
    until hidden states do not have to lie in a file, but at least `LEAST`. Raises BudgetError where `LEAST` do not fit.
    """
    tokens = total
    while True:
        try:
            work = Workload((model,), -(-tokens // longest), longest, token_bytes=TOKEN_BYTES, needs_logits=True)
            placement, _ = choose(work)
            if placement.states != "file" or tokens <= LEAST:
                return tokens, placement
        except BudgetError:
            if tokens <= LEAST:
                raise
        tokens = max(LEAST, -(-tokens // 2))


def sweep_slices(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Yields consecutive slices of the inputs, each of at most `most` tokens or of one input."""
    start = total = 0
    for index, size in enumerate(sizes):
        if total + size > most and index > start:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))


def batched(inputs: Sequence[Input], sizes: Sequence[int], tokens: int) -> Iterator[Batch]:
    """Yields batches of inputs of one padded size, as many inputs as make at most `tokens` tokens, or one.

    Padding comes last and changes nothing before it.
    """
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
        for _, continuation in one.questions:
            rows.append(np.arange(end - len(continuation), end))
            targets.append(np.array(continuation, dtype=np.int64))
    return Batch(tokens, np.concatenate(rows), np.concatenate(targets))
