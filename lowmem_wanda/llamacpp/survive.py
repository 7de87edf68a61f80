"""What quantization leaves of a pruned checkpoint: measured in a GGUF that was made of it, or predicted.

This needs numpy and the gguf package, but neither torch nor transformers. The tensors of a GGUF are dequantized from a
memory mapping, some rows at a time.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.output import FORMAT, require_finished
from lowmem_wanda.checkpoint.pruned import PrunedMatrix, Rows, holds, made_no_zeros, pruned_matrices, read_report
from lowmem_wanda.errors import CheckpointError, LowmemError
from lowmem_wanda.llamacpp.gguf_file import PART, mapped, part_name, read_gguf
from lowmem_wanda.llamacpp.imatrix import Entry
from lowmem_wanda.llamacpp.imatrix import read as read_imatrix
from lowmem_wanda.llamacpp.names import GATE_UP, entries_for, expert_in, gguf_names, package, split_names
from lowmem_wanda.llamacpp.quant_types import KEEPS, NO_ZEROS, ROUTER, TYPES, Survival, advice

Importance = Callable[[str], np.ndarray]  # name of a matrix -> factor of errors in its columns, (columns,) or (1,)
CHUNK = 1 << 18  # weights that are dequantized at a time
SAMPLE = 1 << 20  # weights that a prediction quantizes, in all matrices together
LOOKED_AT = 256  # matrices, each of which takes 20 ms
SEEN, COLUMNS = 64, 512  # rows and columns that are compared to find the order in which rows are stored
ALIKE = 0.5  # a row and its quantized self have at least this cosine; two different rows have about 0.05


class SurvivalReport(TypedDict, total=False):
    """What quantization leaves of a pruned checkpoint, type by type. Only a given GGUF has a `model` and `tensors`."""

    format: int
    kind: str
    path: str
    imatrix: str | None
    left_out: list[str]
    types: list[dict[str, Any]]
    advice: list[str]
    model: str
    tensors: list[dict[str, Any]]


def survive(path: str | Path, model: str | Path | None = None, imatrix: str | Path | None = None) -> SurvivalReport:
    """What quantization leaves of a pruned checkpoint.

    Args:
        path: the folder of a pruned checkpoint.
        model: a GGUF that was made of the checkpoint, which is compared tensor by tensor (default: a prediction from
            some rows, for every type that the gguf package can quantize to).
        imatrix: an importance matrix (.gguf, .dat) that weighs the errors of kept weights (default: all weigh alike).

    Returns:
        A `SurvivalReport`: shares and errors, type by type, and advice.

    Raises:
        CheckpointError: a file cannot be read or belongs to another checkpoint, or the checkpoint is not pruned.
        LowmemError: the gguf package is not installed.

    Example:
        >>> from lowmem_wanda import survive
        >>> [one["zero"] for one in survive("pruned")["types"] if one["type"] == "Q8_0"]
        [1.0]
    """
    require_finished(Path(path))
    checkpoint, told = Checkpoint(path), read_report(Path(path))
    matrices = pruned_matrices(checkpoint, told)
    names = gguf_names(list(matrices), "survive")
    split = split_names(names, str(checkpoint.config().get("model_type", "")))
    left_out = [*split, *(name for name, known in names.items() if model is not None and GATE_UP in known)]
    matrices = {name: matrix for name, matrix in matrices.items() if name not in left_out and ROUTER not in names[name]}
    importance = _importance(imatrix, matrices, names)
    tiny = any(matrix.promise.tiny for matrix in matrices.values())
    report: SurvivalReport = {"format": FORMAT, "kind": "survive", "path": str(path), "left_out": left_out,
                              "imatrix": str(imatrix) if imatrix else None}  # fmt: skip
    if model is None:
        report |= {"types": predict_types(matrices, importance), "advice": advice(tiny=tiny)}
    else:
        tensors = list(_compared(matrices, names, importance, Path(model)))
        types = _by_type(tensors)
        report |= {"model": str(model), "tensors": tensors, "types": types, "advice": advice(types, tiny)}
    if not any(one.get("pruned") for one in report["types"]):
        if not made_no_zeros(told):
            raise CheckpointError(f"{path}: has no pruned weights; give the folder that prune wrote")
        report["advice"] = [NO_ZEROS]
    return report


def _importance(
    imatrix: str | Path | None, matrices: Mapping[str, PrunedMatrix], names: Mapping[str, str]
) -> Importance:
    """{matrix: factors of errors}, as a function. Raises CheckpointError for another model's importance matrix."""
    if imatrix is None:
        return lambda name: np.ones(1)
    known = read_imatrix(imatrix)[0]

    def of(name: str) -> Entry | None:
        entry = next((known[one] for one in entries_for(names[name]) if one in known), None)
        expert = expert_in(name)
        if entry is None or expert is None:
            return entry
        return Entry(entry.sums[expert : expert + 1], entry.counts[expert : expert + 1])

    for name, matrix in matrices.items():
        entry, inputs = of(name), matrix.shape[1]
        if entry is None or entry.sums.shape != (1, inputs):
            raise CheckpointError(
                f"{imatrix}: has no entry {names[name]} of {inputs} values; get that of this very model"
            )
        if not entry.is_sound:
            raise CheckpointError(
                f"{imatrix}: entry {names[name]} holds numbers that are not sums of squares; get another file"
            )
    return lambda name: of(name).means[0]  # type: ignore[union-attr]


def outlook(checkpoint: Checkpoint, report: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction for a checkpoint that was just pruned, from a quarter of the rows that `survive` takes.

    Of many matrices `LOOKED_AT` are taken. Without the gguf package it has only the rules of the types.
    """
    matrices = pruned_matrices(checkpoint, report)
    some = set(random.Random(0).sample(list(matrices), min(len(matrices), LOOKED_AT)))
    try:
        seen = {name: matrix for name, matrix in matrices.items() if name in some}
        types = predict_types(seen, lambda name: np.ones(1), SAMPLE // 4)
    except LowmemError:
        types = [{"type": kind, "bits": known.bits, "grid": known.grid} for kind, known in TYPES.items()]
    return {"types": types, "advice": advice(tiny=any(matrix.promise.tiny for matrix in matrices.values()))}


def predict_types(
    matrices: Mapping[str, PrunedMatrix], importance: Importance, sample: int = SAMPLE
) -> list[dict[str, Any]]:
    """A record for each type of a GGUF: what it leaves of some rows of all matrices, of about `sample` weights.

    The record holds only the rule if the gguf package cannot quantize to the type, or if the type's blocks do not
    divide the inputs of any matrix.
    """
    gguf, share = package("a prediction"), sample // max(1, len(matrices))
    known = {kind.name: kind for kind in gguf.GGMLQuantizationType}
    kinds = [known[name] for name in TYPES if name in known and _can_quantize(gguf, known[name])]
    sums, fitting = {kind.name: Survival() for kind in kinds}, dict.fromkeys((kind.name for kind in kinds), 0)
    for name, matrix in matrices.items():
        rows, columns = matrix.shape
        count = min(rows, max(1, share // columns))
        weight = matrix.reader()((rows - count) // 2, (rows - count) // 2 + count)
        if not np.isfinite(weight).all():
            raise CheckpointError(
                f"{matrix.tensor.file}: tensor {name} holds NaN or infinity; prune again, or get the file again"
            )
        for kind in kinds:
            if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                with np.errstate(all="ignore"):  # for blocks that are all zeros, or nearly
                    stored = gguf.dequantize(gguf.quantize(weight, kind), kind).reshape(weight.shape)
                sums[kind.name].add(weight, matrix.gone(weight), stored, importance(name))
                fitting[kind.name] += 1
    records = []
    for kind, type_ in TYPES.items():
        figures = {"linears": fitting[kind]} if kind in sums else {}
        figures |= sums[kind].figures() if fitting.get(kind) else {}
        records.append({"type": kind, "bits": type_.bits, "grid": type_.grid, **figures})
    return records


def _can_quantize(gguf: Any, kind: Any) -> bool:
    """Whether the gguf package can quantize to a type; some types it can only read."""
    try:
        gguf.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def _compared(
    matrices: Mapping[str, PrunedMatrix], names: Mapping[str, str], importance: Importance, model: Path
) -> Iterator[dict[str, Any]]:
    """Yields a record for each matrix. Raises CheckpointError if the GGUF does not hold a matrix in its shape."""
    match = PART.fullmatch(model.name)  # any part stands for the whole
    stored = read_gguf(model.with_name(part_name(model, 0, int(match[3]))) if match else model).tensors
    for name, matrix in matrices.items():
        tensor = _expert_of(stored.get(names[name]), expert_in(name))
        if tensor is None or tensor.shape != matrix.shape:
            shape = "no such tensor" if tensor is None else f"{list(tensor.shape)}"
            raise CheckpointError(
                f"{model}: {names[name]} should be {list(matrix.shape)}, it has {shape}: give the GGUF that was made "
                "of this very checkpoint"
            )
        yield {"name": name, "tensor": tensor.name, **_survival_of(matrix, tensor, importance(name), model)}


def _expert_of(tensor: Any, expert: int | None) -> Any:
    """One expert's part of a GGUF's tensor (experts, rows, columns), as a tensor of its own."""
    if tensor is None or expert is None or len(tensor.shape) != 3 or expert >= tensor.shape[0]:
        return tensor
    nbytes = tensor.nbytes // tensor.shape[0]
    return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * nbytes, nbytes=nbytes)


def _survival_of(matrix: PrunedMatrix, tensor: Any, importance: np.ndarray, model: Path) -> dict[str, Any]:
    """A record of what is left of one matrix, in all its rows.

    Raises CheckpointError if the GGUF was not made of this checkpoint, or if its type cannot be read.
    """
    rows, columns = matrix.shape
    read, survival = matrix.reader(), Survival()
    order = _order(matrix, read, tensor, model)
    nm = matrix.promise.nm
    held = nm is not None and columns % nm[1] == 0
    for start in range(0, rows, step := max(1, CHUNK // columns)):
        weight = read(start, min(start + step, rows))
        stored = _dequantized(tensor, slice(start, start + step) if order is None else order[start : start + step])
        survival.add(weight, matrix.gone(weight), stored, importance)
        held = held and nm is not None and holds(stored == 0, *nm)
    pattern = matrix.promise.pattern if nm else ""
    figures, kind = survival.figures(), tensor.dtype
    if (
        not matrix.promise.tiny
        and figures["pruned"]
        and figures["zero"] < 0.5
        and kind in TYPES
        and TYPES[kind].grid == KEEPS
    ):
        raise CheckpointError(
            f"{model}: {tensor.name} is {kind}, which keeps zeros, and has none where {matrix.tensor.name} has: it was "
            "made of another checkpoint, perhaps the dense one"
        )
    return {"type": kind, "pattern": pattern, "holds": held, **figures, "survival": survival}


def _dequantized(tensor: Any, rows: Any) -> np.ndarray:
    """Some rows of a GGUF's tensor, float32 (rows, columns).

    Raises CheckpointError if its type cannot be read, or if it holds NaN or infinity.
    """
    gguf, data = package("survive"), np.ascontiguousarray(mapped(tensor)[rows])
    try:
        with np.errstate(all="ignore"):  # for scales that are NaN or infinite
            values: np.ndarray = gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.dtype])
    except NotImplementedError:
        raise CheckpointError(
            f"{tensor.name}: is {tensor.dtype}, which the gguf package cannot read; take another type"
        ) from None
    if not np.isfinite(values).all():
        raise CheckpointError(f"{tensor.file}: {tensor.name} holds NaN or infinity; convert or quantize it again")
    return values.reshape(len(data), -1).astype(np.float32, copy=False)


def _order(matrix: PrunedMatrix, read: Rows, tensor: Any, model: Path) -> np.ndarray | None:
    """For each row of the checkpoint its row in the GGUF; None if all rows are in the same order.

    The converter reorders the rows of some families, such as Llama's q and k for its rotary embedding. The order is
    found from the values, by the cosines of rows. Rows of which no weight was kept take the places that are left.
    Raises CheckpointError if the rows are not those of the checkpoint.
    """
    rows, columns = matrix.shape
    some = np.unique(np.linspace(0, rows - 1, SEEN).astype(int))
    here = np.concatenate([read(row, row + 1) for row in some])
    alive = ~matrix.gone(here).all(axis=1)
    if (_cosines(here[alive], _dequantized(tensor, some)[alive]) > ALIKE).sum() >= 0.9 * alive.sum():
        return None
    step = max(1, CHUNK // columns)
    starts = range(0, rows, step)
    mine = np.concatenate([read(at, min(at + step, rows))[:, :COLUMNS].copy() for at in starts])
    theirs = _unit(np.concatenate([_dequantized(tensor, slice(at, at + step))[:, :COLUMNS].copy() for at in starts]))
    alive = ~matrix.gone(mine).all(axis=1)
    order = np.concatenate([(_unit(mine[at : at + step]) @ theirs.T).argmax(axis=1) for at in starts])
    found = np.unique(order[alive])
    if min(len(found), (_cosines(mine, theirs[order])[alive] > ALIKE).sum()) < 0.9 * alive.sum():
        raise CheckpointError(f"{model}: {tensor.name} does not hold the weights of {matrix.tensor.name}, in any order")
    order[~alive] = np.resize(np.setdiff1d(np.arange(rows), found), rows - alive.sum())
    return order


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosine of each row of `one` with the same row of `other`."""
    return (_unit(one) * _unit(other)).sum(axis=1)  # type: ignore[no-any-return]


def _unit(rows: np.ndarray) -> np.ndarray:
    """The rows, each divided by its norm."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)  # type: ignore[no-any-return]


def _by_type(tensors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of the tensors by type, in the order of TYPES. The sums are removed from the tensors' records."""
    sums: dict[str, Survival] = {}
    for tensor in tensors:
        sums.setdefault(tensor["type"], Survival()).merge(tensor.pop("survival"))
    made = []
    for kind in sorted(sums, key=lambda kind: [*TYPES, kind].index(kind)):
        own = [tensor for tensor in tensors if tensor["type"] == kind]
        patterned = [tensor["holds"] for tensor in own if tensor["pattern"]]
        known = {"bits": TYPES[kind].bits, "grid": TYPES[kind].grid} if kind in TYPES else {}
        counts = {"linears": len(own), "patterned": len(patterned), "holding": sum(patterned)}
        made.append({"type": kind, **known, **counts, **sums[kind].figures()})
    return made
