"""Block recovery: what is kept of a pruned block is trained towards what the dense block put out (arXiv 2510.14444)."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.training import TrainableBlock
from lowmem_wanda.streaming.walk import MicroBatches

RATE = 0.03  # of a matrix's root mean square, about the most that a step changes a weight by
WARM = 0.1  # of the steps, in which the rate rises
HELD_OUT = 8  # one of so many micro-batches is not trained on
LOOKS = 10  # times that the held-out error is measured
SLOWER = 0.5  # times the rate after a look that found nothing better
PATIENCE = 4  # such looks in a row, after which training ends
STATE_BYTES = 16  # for each trained weight: itself, its gradient, and AdamW's two means, all float32


def recover(
    block: Block, states: MicroBatches, targets: MicroBatches, trained: Sequence[Collection[str]], steps: int
) -> dict[str, Any]:
    """Trains some weights of a pruned block, in place, towards `targets`; gives the record of it.

    `states` are the hidden states before the block, and `targets` what the dense block made of them. `trained` are the
    file tensors that are trained together, one collection after the other: pruned matrices, whose zeros are held, and
    vectors. Each gets `steps` steps of AdamW, one micro-batch each, on the mean squared error. The rate of a matrix is
    a share of the root mean square of its weights, so that it suits every block; it is halved, from the best weights so
    far, whenever the error on the held-out eighth of the micro-batches has not fallen. The weights that are best there,
    as they are stored, are kept: the pruned block's own, where training does not help.

    The record has the `steps`, the held-out error `before` and `after` as a share of the squares of the targets, and
    the `tensors` that were trained.
    """
    held = max(1, len(states) // HELD_OUT)
    pairs = list(zip(states, targets, strict=True))
    training, watched = pairs[:-held] or pairs, pairs[-held:]
    before = after = _error(block, watched)
    done = 0
    for names in trained:
        with TrainableBlock(block, names) as trainable:
            after, more = _train(trainable, training, watched, after, steps)
        done += more
    return {"steps": done, "before": before, "after": after, "tensors": sorted(n for names in trained for n in names)}


def _train(
    trainable: TrainableBlock, training: Sequence[Any], watched: Sequence[Any], best: float, steps: int
) -> tuple[float, int]:
    """Trains and stores what is best on `watched`; gives its error and the number of steps that were taken."""
    stored = trainable.block.stored
    groups = [{"params": [weight], "lr": RATE * _spread(weight)} for name, weight in trainable.weights.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=False, eps=1e-12)
    rates, scale, worse = [group["lr"] for group in optimizer.param_groups], max(best, 1e-12), 0
    look = max(1, steps // LOOKS)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, steps)
        states, target = training[step % len(training)]
        with torch.enable_grad():
            loss = _loss(trainable(states), target.to(trainable.block.device)) / scale
            loss.backward()
        for name, weight in trainable.weights.items():
            if weight.grad is not None and weight.ndim > 1:
                weight.grad.mul_(stored[name] != 0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % look == 0:
            error = _error(lambda states: trainable(states, as_stored=True), watched)
            if error < best:
                best, worse = error, 0
                trainable.store()
            elif (worse := worse + 1) == PATIENCE:
                break
            else:
                trainable.restore()
                rates = [rate * SLOWER for rate in rates]
    return best, step + 1


def _spread(weight: torch.Tensor) -> float:
    """The root mean square of what a weight keeps."""
    kept = (weight != 0).sum().clamp_min(1)
    return float((weight.detach().square().sum() / kept).sqrt())


def _schedule(step: int, steps: int) -> float:
    """The share of the rate at a step: it rises linearly, then falls as a cosine."""
    warm = max(1, int(WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.float() - target.float()).square().mean() / target.float().square().mean()


def _error(compute: Any, pairs: Iterable[Any]) -> float:
    """The squared error of outputs as a share of the squares of the targets, over some micro-batches."""
    wrong = whole = 0.0
    for states, target in pairs:
        output = compute(states).float()
        goal = target.to(output.device).float()
        wrong += float((output - goal).square().sum())
        whole += float(goal.square().sum())
    return wrong / max(whole, 1e-30)
