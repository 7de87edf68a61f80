"""Which experts of a checkpoint are kept: by a plan, by sums of what they put out, or by their weights."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.cut import cut
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.pruned import as_floats
from lowmem_wanda.checkpoint.reader import FLOATS, PIECE, Tensor, read_json
from lowmem_wanda.errors import CalibrationError, CheckpointError, PatternError
from lowmem_wanda.llamacpp.expert_choice import LayerChoice
from lowmem_wanda.sparsity import CHECKPOINT_SCORES, MEASURED
from lowmem_wanda.sparsity.expert_sums import SUMS
from lowmem_wanda.sparsity.experts import aimer, highest, measured
from lowmem_wanda.streaming.expert_layout import ExpertLayout

Sums = Mapping[str, list[float]]  # {name of `expert_sums.SUMS`: a number for each expert} of a layer
ESTIMATED = ("ean", "frequency")  # scores that an importance matrix tells
FORMAT, KIND = 1, "expert-scores"


def chosen_score(score: str | None, plan: Any, scores_from: Any) -> str:
    """The score that decides, "plan" where a plan does. Raises PatternError if the flags do not go together."""
    if plan and scores_from:
        raise PatternError("--plan says which experts are kept, so --from has no place beside it; leave one out")
    if plan is not None:
        if score is not None:
            raise PatternError("--plan says which experts are kept, so --score has no place beside it; leave one out")
        return "plan"
    estimated = str(scores_from or "").endswith(".gguf")
    score = score or (ESTIMATED[0] if estimated else MEASURED[0])
    if score not in CHECKPOINT_SCORES:
        raise PatternError(f"--score {score}: give one of {', '.join(CHECKPOINT_SCORES)}")
    if scores_from and score not in (ESTIMATED if estimated else MEASURED):
        known = ", ".join(ESTIMATED if estimated else MEASURED)
        raise PatternError(
            f"--score {score}: is not known from {scores_from}; give one of {known}, or leave --from out"
        )
    return score


def choose(
    layout: ExpertLayout,
    layer: int,
    keep: int,
    score: str,
    sums: Sums | None,
    source: Checkpoint,
    seed: int,
    protected: Sequence[int] = (),
) -> LayerChoice:
    """The choice of a layer: the highest scores, of `sums` where the score is of what experts put out.

    Those of `protected` ids come first. A layer that predicts further tokens is not measured, and chosen by its
    weights.
    """
    if score in MEASURED and sums is not None:
        scores, by = measured(sums, score), score
    elif score == "random":
        scores, by = np.random.default_rng([seed, layer]).random(layout.count), score
    else:
        scores, by = by_weights(layout, layer, source), "aimer"
    first = scores.copy()
    first[list(protected)] = np.inf
    return LayerChoice(highest(first, keep, layout.groups), by, scores)


def by_weights(layout: ExpertLayout, layer: int, source: Checkpoint) -> np.ndarray:
    """The scores of a layer by the weights of its experts alone, float64 (experts,); see `aimer`.

    `source` has the weights as floating-point numbers.
    """
    totals = np.zeros((3, layout.count))
    for expert, tensor in _weights(layout, layer, source):
        for piece in tensor.pieces(PIECE):
            values = as_floats(piece, tensor.dtype)
            totals[:, expert] += np.abs(values).sum(dtype=np.float64), np.dot(values, values), values.size
    return aimer(*totals)


def _weights(layout: ExpertLayout, layer: int, source: Checkpoint) -> Iterator[tuple[int, Tensor]]:
    """Yields (expert, a file tensor or a part of one) for the matrices of a layer's experts."""
    for tensor in source.tensors.values():
        place, rows = layout.members.get(tensor.name), layout.rows.get(tensor.name)
        if place is not None and place[0] == layer and place[1] < layout.count and len(tensor.shape) > 1:
            yield place[1], _floating(tensor)
        elif rows is not None and rows.layer == layer and len(tensor.shape) > 2 and not rows.axis:
            for expert in range(layout.count):
                yield expert, cut(_floating(tensor), 0, range(expert * rows.each, (expert + 1) * rows.each))


def _floating(tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype}, whose values are not read; give --plan, or "
            "--from scores.json of the unquantized checkpoint"
        )
    return tensor


def scores_text(layout: ExpertLayout, layers: Mapping[int, Sums], about: Mapping[str, Any]) -> str:
    """The JSON of the sums of all layers, from which any score and any number of experts can be chosen again."""
    sums = {str(layer): dict(values) for layer, values in sorted(layers.items())}
    content = {"format": FORMAT, "kind": KIND, "experts": layout.count, **about, "layers": sums}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_scores(path: Path, layout: ExpertLayout) -> dict[int, Sums]:
    """The sums in a file of `scores_text`. Raises CalibrationError for those of another model."""
    content = read_json(path)
    if content.get("kind") != KIND or content.get("format") != FORMAT:
        raise CalibrationError(f"{path}: holds no scores of experts; make them with shrink --record")
    found = content.get("layers")
    wanted = {str(layer) for layer in layout.running}
    if not isinstance(found, dict) or found.keys() != wanted or content.get("experts") != layout.count:
        named = ", ".join(map(str, found))[:200] if isinstance(found, dict) else "none"
        raise CalibrationError(
            f"{path}: is of {content.get('experts')} experts in the layers {named}, and this model has "
            f"{layout.count} in {', '.join(map(str, layout.running))[:200]}; get the scores of this very model"
        )
    layers = {int(layer): values for layer, values in found.items()}
    for layer, values in layers.items():
        right = isinstance(values, dict) and values.keys() == set(SUMS)
        if not right or not all(_numbers(one, layout.count) for one in values.values()) or not sum(values["tokens"]):
            raise CalibrationError(f"{path}: the sums of layer {layer} are damaged; make them again")
    return layers


def _numbers(values: Any, count: int) -> bool:
    good = isinstance(values, list) and len(values) == count and all(type(one) in (int, float) for one in values)
    return good and bool(np.isfinite(values).all()) and min(values) >= 0
