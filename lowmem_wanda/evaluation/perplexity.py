"""What a model is worth on a text: its perplexity, and how far it is from the dense model, by streaming.

Errors are standard errors of a mean that take tokens as independent, as llama.cpp's `perplexity` gives them.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.data.windows import Windows
from lowmem_wanda.errors import ModelError
from lowmem_wanda.evaluation.likelihood import TOKEN_BYTES, Batch, token_likelihoods
from lowmem_wanda.streaming.head import head_linear
from lowmem_wanda.streaming.model import StreamedModel, describe_device
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.resources import return_freed
from lowmem_wanda.streaming.walk import Notify, ignore
from lowmem_wanda.streaming.workload import Workload


def evaluate_model(
    model: StreamedModel, text: Windows, dense: StreamedModel | None = None, on_block: Notify = ignore
) -> dict[str, Any]:
    """The figures of a model on a text, and its distance to the dense model if one is given.

    These are `perplexity` and `perplexity_stderr` over `tokens`, in windows of `length`; `blocks`, seconds, and bytes
    of memory. A dense model adds the figures of `distance`, its own under "dense", and the `relative_error` of each
    block. Raises ModelError where the two models cannot be compared, BudgetError, NumberError.
    """
    if dense is not None:
        _require_alike(model, dense)
    models = (model,) if dense is None else (dense, model)
    count, length = text.tokens.shape
    placement, need = choose(Workload(models, count, length, token_bytes=TOKEN_BYTES, needs_logits=True))
    found = token_likelihoods(model, batches(text, placement.batch), placement, dense, on_block)
    return_freed()
    figures = _figures(found.losses, text)
    if dense is not None:
        figures |= distance(found.losses, found.dense_losses, found.divergence, found.top == found.dense_top)
        figures["dense"] = {"path": str(dense.checkpoint.path), **_figures(found.dense_losses, text)}
    return {
        "path": str(model.checkpoint.path),
        **figures,
        "blocks": found.blocks,
        "device": describe_device(model.device),
        "dtype": model.dtype_name,
        "seconds": found.timing["wall"],
        "timing": found.timing,
        "layout": {**asdict(placement), "reading": found.timing["reading"]},
        "memory": list(found.peak.series),
        "peak_memory": found.peak.beside(need.host, need.device),
    }


def batches(text: Windows, count: int) -> list[Batch]:
    """The windows, `count` to a batch, with those of their tokens that are evaluated as targets."""
    made, length = [], text.tokens.shape[1]
    for tokens, first in zip(in_batches(text.tokens, count), in_batches(text.first, count), strict=True):
        evaluated = np.arange(length) >= first[:, None]  # (sequences, length)
        rows = np.flatnonzero(evaluated)
        made.append(Batch(tokens, rows - 1, tokens.reshape(-1)[rows]))
    return made


def perplexity(losses: np.ndarray) -> tuple[float, float]:
    """The exponential of the mean of -log p (tokens,), and its standard error."""
    mean, error = _mean(losses)
    return float(np.exp(mean)), float(np.exp(mean) * error)


def distance(losses: np.ndarray, dense: np.ndarray, divergence: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    """The distance of a model to the dense one, in the figures of llama.cpp's `--kl-divergence`.

    `losses` are those of the model and `dense` those of the dense one, `divergence` is KL(dense || model), and `same`
    says whether both find the same id most likely. Each is (tokens,).
    """
    ratio, ratio_error = perplexity(losses - dense)
    kl, kl_error = _mean(divergence)
    agreement, agreement_error = _mean(same.astype(np.float64))
    change = np.exp(-losses) - np.exp(-dense)
    return {
        "kl_mean": kl,
        "kl_mean_stderr": kl_error,
        "kl_median": float(np.median(divergence)),
        "kl_p99": float(np.percentile(divergence, 99)),
        "kl_max": float(divergence.max()),
        "top1_agreement": agreement,
        "top1_agreement_stderr": agreement_error,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio_error,
        "target_probability_change_mean": float(change.mean()),
        "target_probability_change_rms": float(np.sqrt(np.square(change).mean())),
    }


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of values, and its standard error."""
    return float(values.mean()), float(values.std() / np.sqrt(max(1, len(values) - 1)))


def _figures(losses: np.ndarray, text: Windows) -> dict[str, Any]:
    value, error = perplexity(losses)
    length = text.tokens.shape[1]
    return {"perplexity": value, "perplexity_stderr": error, "tokens": len(losses), "length": length}


def _require_alike(model: StreamedModel, dense: StreamedModel) -> None:
    """Raises ModelError where a model's blocks and logits cannot be compared with those of the dense one."""
    paths = model.checkpoint.path, dense.checkpoint.path
    if (model.device, model.dtype) != (dense.device, dense.dtype):
        raise ModelError(
            f"{paths[0]}: is computed in {model.dtype} on {model.device}, {paths[1]} in "
            f"{dense.dtype} on {dense.device}; give --dtype"
        )
    ids = [head_linear(one.skeleton).out_features for one in (model, dense)]
    for what, one, other in (
        ("blocks", model.depth, dense.depth),
        ("as width of its hidden states", model.skeleton.width, dense.skeleton.width),
        ("ids in its vocabulary", *ids),
    ):
        if one != other:
            raise ModelError(
                f"{paths[0]}: has {one} {what}, {paths[1]} {other}; give --against the model that it was made of"
            )
