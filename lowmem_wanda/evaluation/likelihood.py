"""The likelihood of tokens by streaming: models are walked block by block, then their heads are applied."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowmem_wanda.errors import NonFiniteError
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.head import Head, head_bytes, head_linear
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.numbers import blamed
from lowmem_wanda.streaming.resources import Clock, Peak, add_seconds, anonymous, wait
from lowmem_wanda.streaming.walk import MicroBatches, Notify, Stream, advance, ignore, streamed
from lowmem_wanda.streaming.workload import Placement

TOKEN_BYTES = 64  # that are kept for each target: its softmax, its id, its divergence


@dataclass(frozen=True)
class Batch:
    """Token ids `tokens` (sequences, length) that are computed together, and the ids whose likelihood is wanted.

    Those ids are the `targets`. `rows` are the positions just before them, counted through all sequences. Both are
    (targets,); all three are int64.
    """

    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Likelihoods:
    """The likelihoods of all targets, in the order of the batches, under a model and under the dense one if given.

    `losses` are -log p(target) in nats, float64, and `top` the most likely ids, both (targets,). `dense_losses` and
    `dense_top` are those of the dense model, and `divergence` is KL(dense || model) in nats; without a dense model it
    is empty. `blocks` has a record of each block, with the `relative_error` ||output - dense output|| / ||dense
    output||.
    """

    losses: np.ndarray
    top: np.ndarray
    dense_losses: np.ndarray
    dense_top: np.ndarray
    divergence: np.ndarray
    blocks: list[dict[str, Any]]
    timing: dict[str, Any]
    peak: Peak


def token_likelihoods(
    model: StreamedModel,
    batches: Sequence[Batch],
    placement: Placement,
    dense: StreamedModel | None = None,
    on_block: Notify = ignore,
) -> Likelihoods:
    """The likelihoods of the batches' targets under a model, and under a `dense` one that is walked side by side.

    Raises NumberError for logits that are NaN or infinite, ModelError where logits do not come from a linear.
    """
    models = (model,) if dense is None else (dense, model)
    for one in models:
        head_linear(one.skeleton)
    with streamed(*models, batches=[batch.tokens for batch in batches], placement=placement) as stream:
        blocks = _walk(stream, on_block)
        stream.buffers.close()
        wait(model.device)  # hidden states on the host are written by copies that nothing else waits for
        softmaxes, divergence = _apply_heads(stream, batches)
        losses = [softmax.losses().cpu().double().numpy() for softmax in softmaxes]
        top = [softmax.top.cpu().numpy() for softmax in softmaxes]
        for one, values in zip(models, losses, strict=True):
            with blamed(one):
                if not np.isfinite(values).all():
                    raise NonFiniteError(f"{one.checkpoint.path}: its logits are NaN or infinite")
        apart = divergence.values(*softmaxes).cpu().double().numpy() if divergence else np.empty(0)
        return Likelihoods(losses[-1], top[-1], losses[0], top[0], apart, blocks, stream.timing(), stream.peak)


def _walk(stream: Stream, on_block: Notify) -> list[dict[str, Any]]:
    """Takes the models through all blocks, the dense one first; gives the records of the blocks."""
    device, last = stream.buffers.device, time.perf_counter()
    blocks: list[dict[str, Any]] = []

    def timed_advance(block: Block, states: MicroBatches) -> dict[str, float]:
        clock = Clock(device)
        with clock.part("onward"):
            advance(block, states)
        return clock.seconds()

    def dense_step(block: Block, states: MicroBatches) -> None:
        blocks.append({"index": block.index, "parts": timed_advance(block, states)})

    def step(block: Block, states: MicroBatches) -> None:
        nonlocal last
        if len(stream.decoders) == 1:
            dense_step(block, states)
        else:
            add_seconds(blocks[-1]["parts"], timed_advance(block, states))
            clock = Clock(device)
            with clock.part("compare"):
                blocks[-1]["relative_error"] = relative_error(states, stream.states[0], device)
            add_seconds(blocks[-1]["parts"], clock.seconds())
        seconds, last = time.perf_counter() - last, time.perf_counter()
        blocks[-1] |= {"seconds": seconds, "host_bytes": anonymous()}
        add_seconds(stream.spent, blocks[-1]["parts"])
        on_block(blocks[-1])

    stream.walk(*([dense_step, step] if len(stream.decoders) == 2 else [step]))
    return blocks


def _apply_heads(stream: Stream, batches: Sequence[Batch]) -> tuple[list["Softmax"], "Divergence | None"]:
    """The softmaxes of all models, and their divergence where there are two.

    Logits are made by slices of the vocabulary, for all models at once, so that none have to be kept.
    """
    device, nbytes = stream.buffers.device, head_bytes(stream.buffers.nbytes)
    heads = [Head(decoder, nbytes) for decoder in stream.decoders]
    targets = torch.from_numpy(np.concatenate([batch.targets for batch in batches])).to(device)
    softmaxes = [Softmax(len(targets), device) for _ in heads]
    divergence = Divergence(len(targets), device) if len(heads) == 2 else None
    clock = Clock(device)
    with clock.part("head"):
        for piece in heads[0].slices():
            for head in heads[1:]:
                head.load(piece)
            for where, hidden in _hidden_states(stream, batches, heads[0].tokens):
                logits = [head.logits(states) for head, states in zip(heads, hidden, strict=True)]
                added = [
                    softmax.add(where, made, targets[where], piece.start)
                    for softmax, made in zip(softmaxes, logits, strict=True)
                ]
                if divergence:
                    divergence.add(where, logits[0], logits[1], added[0])
    for head in heads:
        head.close()
    add_seconds(stream.spent, clock.seconds())
    return softmaxes, divergence


def _hidden_states(stream: Stream, batches: Sequence[Batch], count: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Yields a slice of at most `count` targets, and each model's hidden states (targets, width) just before them."""
    offset, device = 0, stream.buffers.device
    for number, batch in enumerate(batches):
        rows = torch.from_numpy(batch.rows)
        for start in range(0, len(rows), count):
            some = rows[start : start + count]
            states = [micro_batches[number].flatten(0, 1) for micro_batches in stream.states]
            yield (
                slice(offset + start, offset + start + len(some)),
                [flat[some.to(flat.device)].to(device) for flat in states],
            )
        offset += len(rows)


def relative_error(states: MicroBatches, dense: MicroBatches, device: torch.device) -> float:
    """||states - dense|| / ||dense|| over all hidden states, summed in float64 where the device has it."""
    precision = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=precision, device=device)
    for part, other in zip(states, dense, strict=True):
        right = other.to(device).float()
        left = part.to(device).float()
        sums += torch.stack([(left - right).square_().sum(dtype=precision), right.square().sum(dtype=precision)])
    return float((sums[0] / sums[1]).sqrt())


class Softmax:
    """The softmax of `count` tokens over slices of logits: its normalizer, the target's logit and the highest logit."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.precision = torch.float32 if device.type == "mps" else torch.float64
        self.highest = torch.full((count,), torch.finfo(torch.float32).min, device=device)
        self.sums = torch.zeros(count, dtype=self.precision, device=device)
        self.target = torch.zeros(count, device=device)
        self.top = torch.zeros(count, dtype=torch.int64, device=device)

    def add(
        self, where: slice, logits: torch.Tensor, targets: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds float32 logits (tokens, slice) of the ids from `start` on for the tokens `where`.

        The ids that follow the tokens are `targets` (tokens,). Gives exp(logit - highest so far), float32, and the
        factor by which earlier sums were scaled.
        """
        highest, ids = logits.max(dim=1)
        before = self.highest[where]
        self.top[where] = torch.where(highest > before, ids + start, self.top[where])
        now = torch.maximum(before, highest)
        exponentials = (logits - now[:, None]).exp_()
        scale = (before - now).to(self.precision).exp_()
        self.sums[where] = self.sums[where] * scale + exponentials.sum(dim=1, dtype=self.precision)
        self.highest[where] = now
        place = targets - start
        inside = (place >= 0) & (place < logits.shape[1])
        picked = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[where] = torch.where(inside, picked, self.target[where])
        return exponentials, scale

    def normalizer(self) -> torch.Tensor:
        """The logarithm of the sum of exp(logit), (tokens,)."""
        return self.highest.to(self.precision) + self.sums.log()

    def losses(self) -> torch.Tensor:
        """-log p(target), (tokens,)."""
        return self.normalizer() - self.target


class Divergence:
    """KL(p || q) of `count` tokens from slices of the logits of p and q, which go through two `Softmax` as well."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.sums = torch.zeros_like(Softmax(count, device).sums)

    def add(
        self, where: slice, logits: torch.Tensor, others: torch.Tensor, added: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Adds logits of p and q (tokens, slice); `added` is what adding p's logits to its `Softmax` gave."""
        exponentials, scale = added
        products = (logits - others).mul_(exponentials)
        self.sums[where] = self.sums[where] * scale + products.sum(dim=1, dtype=self.sums.dtype)

    def values(self, p: Softmax, q: Softmax) -> torch.Tensor:
        """KL(p || q) in nats, (tokens,)."""
        return self.sums / p.sums - p.normalizer() + q.normalizer()
