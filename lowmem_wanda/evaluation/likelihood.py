"""Tokens scored by streaming: models walked block by block, side by side, then their heads on what was asked."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import NumberError
from lowmem_wanda.evaluation.losses import Divergence, Softmax
from lowmem_wanda.streaming.buffers import Ring
from lowmem_wanda.streaming.clock import Clock, add, timing
from lowmem_wanda.streaming.decoder import Block, Decoder
from lowmem_wanda.streaming.head import Head, budget_of, head_linear
from lowmem_wanda.streaming.model import Work
from lowmem_wanda.streaming.placement import Layout
from lowmem_wanda.streaming.resources import anonymous, limit_vram, map_blocks_from
from lowmem_wanda.streaming.states import hidden_states
from lowmem_wanda.streaming.walk import Parts, Stream, advance, walk

Notify = Callable[[dict[str, Any]], None]  # called with each block's record when all models are through it


@dataclass(frozen=True)
class Batch:
    """Token ids `tokens` (sequences, length), computed together. The ids that come after the positions `rows` of
    them, counted through all sequences, are scored: they are `targets`, both (scored,); all are int64."""

    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Scores:
    """`losses` -log p(target) in float64 and `top`, the most likely id, both (models, scored), in the order of the
    batches; `divergence` KL(first model || other one), (models - 1, scored), float64. `blocks` has a record of each
    block, with `errors`, for each other model ||output - the first one's|| / ||the first one's||."""

    losses: np.ndarray
    top: np.ndarray
    divergence: np.ndarray
    blocks: list[dict[str, Any]]
    timing: dict[str, Any]


def score(
    works: Sequence[Work], batches: Sequence[Batch], layout: Layout, notify: Notify = lambda record: None
) -> Scores:
    """Scores the batches under every model. Raises NumberError for logits that are NaN or infinite."""
    for work in works:
        head_linear(work.hollow)
    limit_vram(works[0].device, works[0].limits.max_vram)
    map_blocks_from(layout.mapped)
    with torch.no_grad():
        return _Run(works, batches, layout, notify).do()


class _Run:
    """One walk of all models, and their heads after it."""

    def __init__(self, works: Sequence[Work], batches: Sequence[Batch], layout: Layout, notify: Notify) -> None:
        self.works, self.batches, self.layout, self.notify = works, batches, layout, notify
        self.device = works[0].device
        self.decoders = [Decoder(work.hollow, work.checkpoint.tensors, work.device, work.dtype) for work in works]
        self.states: list[Parts] = []
        self.blocks: list[dict[str, Any]] = []
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def do(self) -> Scores:
        start = time.perf_counter()
        with ExitStack() as stack:
            for decoder in self.decoders:
                stack.callback(decoder.close)
            self._embed(stack)
            self._walk()
            softmaxes, divergences = self._apply_heads()
        losses = np.stack([softmax.losses().cpu().double().numpy() for softmax in softmaxes])
        if not np.isfinite(losses).all():
            raise NumberError("logits are NaN or infinite: try --dtype float32")
        pairs = zip(divergences, softmaxes[1:], strict=True)
        scored = [divergence.values(softmaxes[0], other) for divergence, other in pairs]
        return Scores(
            losses,
            np.stack([softmax.top.cpu().numpy() for softmax in softmaxes]),
            np.stack([values.cpu().double().numpy() for values in scored]) if scored else losses[:0],
            self.blocks,
            timing(time.perf_counter() - start, self.spent),
        )

    def _embed(self, stack: ExitStack) -> None:
        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowmem-wanda-")))
            return stack.enter_context(hidden_states(self.layout.states, shape, dtype, self.device, folder))

        clock = Clock(self.device)
        with clock.part("embed"):
            self.states += [
                decoder.embed([batch.tokens for batch in self.batches], allocate) for decoder in self.decoders
            ]
        add(self.spent, clock.seconds())

    def _walk(self) -> None:
        layout, size = self.layout, max(work.block_bytes for work in self.works)
        models = enumerate(zip(self.works, self.decoders, self.states, strict=True))
        streams = [
            Stream(decoder, parts, work.block_tensors, partial(self._step, number))
            for number, (work, decoder, parts) in models
        ]
        with Ring(self.device, size, layout.slots, layout.arriving, self.works[0].limits.reading) as ring:
            walk(streams, ring, range(self.works[0].depth))
            add(self.spent, ring.spent)
        for decoder in self.decoders:
            decoder.empty()

    def _step(self, number: int, block: Block, parts: Parts) -> None:
        """One model's block; the last model's closes the record of that block."""
        clock = Clock(self.device)
        with clock.part("onward"):
            advance(block, parts)
        if number == 0:
            self.blocks.append({"index": block.index, "parts": {}, "errors": []})
        record = self.blocks[-1]
        if number:
            with clock.part("compare"):
                record["errors"].append(relative_error(parts, self.states[0], self.device))
        add(record["parts"], clock.seconds())
        if number == len(self.works) - 1:
            now = time.perf_counter()
            record |= {"seconds": now - self.last, "host_bytes": anonymous()}
            self.last = now
            add(self.spent, record["parts"])
            self.notify(record)

    def _apply_heads(self) -> tuple[list[Softmax], list[Divergence]]:
        """Logits by slices of the vocabulary: of all models at once, so that none has to be kept."""
        budget = budget_of(max(work.block_bytes for work in self.works))
        heads = [Head(decoder, budget) for decoder in self.decoders]
        targets = torch.from_numpy(np.concatenate([batch.targets for batch in self.batches])).to(self.device)
        softmaxes = [Softmax(len(targets), self.device) for _ in heads]
        divergences = [Divergence(len(targets), self.device) for _ in heads[1:]]
        clock = Clock(self.device)
        with clock.part("head"):
            for piece in heads[0].slices():
                for head in heads[1:]:
                    head.load(piece)
                for where, hidden in self._scored(heads[0].tokens):
                    logits = [head.logits(states) for head, states in zip(heads, hidden, strict=True)]
                    added = [
                        softmax.add(where, made, targets[where], piece.start)
                        for softmax, made in zip(softmaxes, logits, strict=True)
                    ]
                    for divergence, other in zip(divergences, logits[1:], strict=True):
                        divergence.add(where, logits[0], other, added[0])
        for head in heads:
            head.close()
        add(self.spent, clock.seconds())
        return softmaxes, divergences

    def _scored(self, count: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """At most `count` scored tokens at a time: which they are, and each model's hidden states (tokens, width)."""
        offset = 0
        for number, batch in enumerate(self.batches):
            rows = torch.from_numpy(batch.rows)
            for start in range(0, len(rows), count):
                some = rows[start : start + count]
                states = [parts[number].flatten(0, 1) for parts in self.states]
                yield (
                    slice(offset + start, offset + start + len(some)),
                    [flat[some.to(flat.device)].to(self.device) for flat in states],
                )
            offset += len(rows)


def relative_error(parts: Parts, dense: Parts, device: torch.device) -> float:
    """||parts - dense|| / ||dense|| over all hidden states, sums in float64 where the device has it."""
    precision = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=precision, device=device)
    for part, other in zip(parts, dense, strict=True):
        right = other.to(device).float()
        left = part.to(device).float()
        sums += torch.stack([(left - right).square_().sum(dtype=precision), right.square().sum(dtype=precision)])
    return float((sums[0] / sums[1]).sqrt())
