"""What a model is worth on a text: its perplexity, and how far it is from the dense one, by streaming."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.data.windows import Windows, windows
from lowmem_wanda.errors import ModelError
from lowmem_wanda.evaluation.likelihood import Batch, score
from lowmem_wanda.evaluation.losses import against, perplexity
from lowmem_wanda.streaming.head import head_linear
from lowmem_wanda.streaming.model import Work, describe_device
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.resources import Peak, return_freed

Notify = Callable[[dict[str, Any]], None]


def evaluate(
    work: Work, text: Windows, dense: Work | None = None, notify: Notify = lambda record: None
) -> dict[str, Any]:
    """The figures of a model on a text, and beside a dense one the distance to it.

    `perplexity` and `perplexity_stderr` over `tokens`, scored in windows of `length`; with `dense` its own under
    "dense", and those of `losses.against`; `blocks` with each one's `relative_error`; seconds, and bytes of memory.
    Raises ModelError where the two models are not of one kind, BudgetError, NumberError.
    """
    works = [work] if dense is None else [dense, work]
    if dense is not None:
        _compare(work, dense)
    layout, need = choose(replace(work, shape=text.tokens.shape, beside=tuple(works[:-1])))
    with Peak(work.device) as peak:
        scores = score(works, batches(text, layout.batch), layout, lambda record: notify(_flat(record)))
    return_freed()
    figures = _figures(scores.losses[-1], text)
    if dense is not None:
        figures |= against(scores.losses[1], scores.losses[0], scores.divergence[0], scores.top[0] == scores.top[1])
        figures["dense"] = {"path": str(dense.checkpoint.path), **_figures(scores.losses[0], text)}
    return {
        "path": str(work.checkpoint.path),
        **figures,
        "blocks": [_flat(record) for record in scores.blocks],
        "device": describe_device(work.device),
        "dtype": work.dtype_name,
        "seconds": scores.timing["wall"],
        "timing": scores.timing,
        "layout": {**asdict(layout), "reading": work.limits.reading},
        "memory": list(peak.series),
        "peak_memory": peak.beside(need.host, need.device),
    }


def cut(
    work: Work, texts: Sequence[str], length: int, stride: int | None = None, convention: str = "windows",
    most: int | None = None,
) -> Windows:  # fmt: skip
    """`windows` of the texts by the model's own tokenizer, of no more tokens than the model has positions."""
    size = {"length": work.window(length), "vocabulary": work.hollow.vocabulary, "stride": stride, "most": most}
    return windows(texts, work.encoder(texts), convention=convention, **size)  # type: ignore[arg-type]


def batches(text: Windows, count: int) -> list[Batch]:
    """The windows, `count` at a time, and what of them is scored."""
    made, length = [], text.tokens.shape[1]
    for tokens, first in zip(in_batches(text.tokens, count), in_batches(text.first, count), strict=True):
        scored = np.arange(length) >= first[:, None]  # (sequences, length)
        rows = np.flatnonzero(scored)
        made.append(Batch(tokens, rows - 1, tokens.reshape(-1)[rows]))
    return made


def _figures(losses: np.ndarray, text: Windows) -> dict[str, Any]:
    value, error = perplexity(losses)
    length = text.tokens.shape[1]
    return {"perplexity": value, "perplexity_stderr": error, "tokens": len(losses), "length": length}


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A block's record with the one model's error that there is, if any."""
    rest = {key: value for key, value in record.items() if key != "errors"}
    return rest | ({"relative_error": record["errors"][0]} if record["errors"] else {})


def _compare(work: Work, dense: Work) -> None:
    """Raises ModelError where a model's blocks and logits have no counterpart in the dense one's."""
    if (work.device, work.dtype) != (dense.device, dense.dtype):
        raise ModelError(
            f"{work.checkpoint.path}: is computed in {work.dtype} on {work.device}, {dense.checkpoint.path} in "
            f"{dense.dtype} on {dense.device}; give --dtype"
        )
    for what, one, other in (
        ("blocks", work.depth, dense.depth),
        ("as width of its hidden states", work.hollow.width, dense.hollow.width),
        ("ids in its vocabulary", head_linear(work.hollow).out_features, head_linear(dense.hollow).out_features),
    ):
        if one != other:
            raise ModelError(
                f"{work.checkpoint.path}: has {one} {what}, {dense.checkpoint.path} {other}; "
                "give --against the model that it was made of"
            )
