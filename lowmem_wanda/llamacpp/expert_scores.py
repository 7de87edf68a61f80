"""Scores of a GGUF's experts: from an importance matrix and weights, from weights alone, from counts, at random."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import CalibrationError, ModelError
from lowmem_wanda.llamacpp.expert_layers import IN_BLOCK, ExpertLayers
from lowmem_wanda.llamacpp.gguf_file import GGUF
from lowmem_wanda.llamacpp.imatrix import Entry, read
from lowmem_wanda.llamacpp.names import package
from lowmem_wanda.sparsity.experts import aimer, output_norms

WEIGHTS = 1 << 15  # that are dequantized at a time, in a cache; two threads are slower than one

Measure = Callable[[np.ndarray], np.ndarray]  # weights (outputs, inputs) -> sums over outputs, or over all


@dataclass(frozen=True)
class ExpertCounts:
    """What an importance matrix says of a layer.

    `counts` (experts,) are the tokens that each expert saw, `sums` (experts, width) the sums of squares of what enters
    its down projection. The sums stay in the file until they are used.
    """

    counts: np.ndarray
    sums: np.ndarray

    def squares(self, some: slice) -> np.ndarray:
        """The mean squares of `some` experts, float64 (experts, width)."""
        return np.asarray(self.sums[some].astype(np.float64) / np.maximum(self.counts[some], 1)[:, None])


def read_counts(path: str | Path, model: GGUF, experts: ExpertLayers) -> dict[int, ExpertCounts]:
    """{block: what the importance matrix says of it}, for all layers with experts that run in a forward pass.

    A layer that predicts further tokens (MTP) is left out where the file has no entry of it, because llama.cpp does not
    run it when it measures. Raises CalibrationError, which names the entry, for a file that cannot tell experts apart
    or that belongs to another model.
    """
    entries, _ = read(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise CalibrationError(
                f"{path}: is of the older format, which does not hold how many tokens each expert saw; get the .gguf, "
                "or make one with llama-imatrix of today"
            )
    stacks = experts.tensors
    for name, entry in entries.items():
        if IN_BLOCK.fullmatch(name) and "_exps." in name:
            if name not in stacks:
                raise CalibrationError(
                    f"{path}: has an entry {name}, which this model has not; get that of this very model"
                )
            if entry.sums.shape[1] != model.tensors[name].shape[-1] and len(entry.counts) == experts.count:
                raise _other_size(path, name, entry, model.tensors[name])
    found = {}
    for block in experts.layers:
        name = experts.down(block)
        if name in entries:
            found[block] = _required(path, name, entries[name], model.tensors[name], experts.count)
        elif block not in experts.predicting:
            raise CalibrationError(
                f"{path}: has no entry {name}; get the importance matrix of this very model, or one that was measured "
                "on more text"
            )
    return found


def _required(path: str | Path, name: str, entry: Entry, tensor: Tensor, count: int) -> ExpertCounts:
    """What an entry says. Raises CalibrationError if it does not say it for each expert."""
    if count > 1 and len(entry.counts) == 1:
        raise CalibrationError(
            f"{path}: entry {name} has one count of tokens for all {count} experts, as a file that was converted from "
            "the older format has; make one with llama-imatrix of today"
        )
    if entry.sums.shape != (count, tensor.shape[-1]):
        raise _other_size(path, name, entry, tensor)
    sums, counts = entry.sums, entry.counts
    if not (np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()):
        expert = int(np.argmin((np.isfinite(sums) & (sums >= 0)).all(axis=1) & (counts >= 0)))
        raise CalibrationError(
            f"{path}: entry {name} holds numbers for expert {expert} that are not sums of squares or counts (NaN, "
            "infinity, negative); get another file"
        )
    if not counts.any():
        raise CalibrationError(f"{path}: entry {name} was measured on no token; get another file")
    if count > 1 and (counts == counts[0]).all():
        raise CalibrationError(
            f"{path}: entry {name} has the same count of {counts[0]} tokens for every expert, as a file that was "
            "converted from the older format has; make one with llama-imatrix of today"
        )
    return ExpertCounts(counts, sums)


def _other_size(path: str | Path, name: str, entry: Entry, tensor: Tensor) -> CalibrationError:
    return CalibrationError(
        f"{path}: entry {name} is {list(entry.sums.shape)}, the model's has {tensor.shape[0]} experts of "
        f"{tensor.shape[-1]} inputs; get that of this very model"
    )


def score_layer(
    score: str,
    model: GGUF,
    experts: ExpertLayers,
    block: int,
    known: ExpertCounts | None,
    seed: int = 0,
    some: slice = slice(None),
) -> np.ndarray:
    """The scores of `some` of a layer's experts (default: all), float64 (experts,); the highest of a layer are kept.

    `score` is "ean", "frequency" (both need `known`), "aimer" or "random". At most one expert's matrix is in memory.
    Raises ModelError for a type that cannot be dequantized.
    """
    if score == "random":
        return np.random.default_rng([seed, block]).random(experts.count)[some]
    ids = range(experts.count)[some]
    if score == "aimer":
        sums = np.zeros((3, len(ids)))
        for name in experts.matrices(block):
            sums += np.array(list(_over_experts(model, name, _sizes, ids))).T
        return aimer(*sums)
    assert known is not None
    if score == "frequency":
        return known.counts[some].astype(np.float64)
    columns = np.array(list(_over_experts(model, experts.down(block), _column_squares, ids)))
    return output_norms(known.counts[some], known.squares(some), columns)


def _column_squares(weights: np.ndarray) -> np.ndarray:
    """The squared norms of columns, (inputs,)."""
    return np.asarray(np.einsum("oi,oi->i", weights, weights))


def _sizes(weights: np.ndarray) -> np.ndarray:
    """The sum of magnitudes, the sum of squares, and the number of weights."""
    flat = weights.reshape(-1)
    return np.array([np.abs(flat).sum(), np.einsum("i,i->", flat, flat), flat.size])


def _over_experts(model: GGUF, name: str, measure: Measure, ids: Iterable[int]) -> Iterator[np.ndarray]:
    """Yields what `measure` gives, summed over an expert's rows, for some experts of a stack in turn."""
    tensor = model.tensors[name]
    scales = _scales(model, name.removesuffix("weight") + "scale", tensor.shape[0])
    for expert in ids:
        yield _of_expert(tensor, expert, scales[expert], measure)


def _of_expert(tensor: Tensor, expert: int, scale: Any, measure: Measure) -> np.ndarray:
    gguf = package("scores of experts")
    size = tensor.nbytes // tensor.shape[0]
    data = np.frombuffer(b"".join(tensor.pieces(spans=[(expert * size, (expert + 1) * size)])), np.uint8)
    rows, kind = data.reshape(tensor.shape[1], -1), gguf.GGMLQuantizationType[tensor.dtype]
    total = None
    for start in range(0, len(rows), step := max(1, WEIGHTS // tensor.shape[2])):
        try:
            # as one row, because the package takes 16 rows at a time and joins them: 2.5 ns per weight for 3.7
            weights = gguf.dequantize(rows[start : start + step].reshape(1, -1), kind)
        except NotImplementedError:
            raise ModelError(
                f"{tensor.name}: is {tensor.dtype}, which the gguf package cannot read; give a --plan that says what "
                "this layer keeps, too, or choose by --score frequency where the importance matrix has the layer"
            ) from None
        weights = weights.reshape(-1, tensor.shape[2])
        part = measure(weights if scale == 1 else weights * scale).astype(np.float64)
        total = part if total is None else total + part
    if total is None or not np.isfinite(total).all():
        raise ModelError(f"{tensor.name}: expert {expert} holds NaN or infinity; download the model again")
    return total


def _scales(model: GGUF, name: str, count: int) -> np.ndarray:
    """What each expert's weights are multiplied by, float32 (experts,): of NVFP4, or Gemma 4's scale of each expert."""
    tensor = model.tensors.get(name)
    if tensor is None:
        return np.ones(count, np.float32)
    if tensor.dtype != "F32":
        raise ModelError(f"{name}: is {tensor.dtype}, where a scale is F32; not supported, choose by a --plan")
    return np.resize(np.frombuffer(b"".join(tensor.pieces()), "<f4"), count)
