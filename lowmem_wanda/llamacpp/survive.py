"""What of a pruned checkpoint is left in a GGUF that was quantized from it, or would be.

Needs numpy and the gguf package, neither torch nor transformers. A GGUF's tensors are dequantized some rows at a time
out of a memory mapping.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.output import refuse_unfinished
from lowmem_wanda.checkpoint.pruned import Linear, Rows, pruned_linears, read_report
from lowmem_wanda.errors import CheckpointError, LowmemError
from lowmem_wanda.llamacpp.imatrix import open_gguf
from lowmem_wanda.llamacpp.imatrix import read as read_imatrix
from lowmem_wanda.llamacpp.names import gguf_names, package
from lowmem_wanda.llamacpp.quant_types import KEEPS, TYPES, Remains, advice

Importance = Callable[[str], np.ndarray]  # name of a linear -> what errors in its columns weigh, (columns,) or (1,)
CHUNK = 1 << 18  # weights that are dequantized at a time
SAMPLE = 1 << 20  # weights of all linears together that a prediction quantizes
SEEN, COLUMNS = 64, 512  # rows and columns that tell in which order rows are stored
ALIKE = 0.5  # cosine of a row and its quantized self, at least; of two different rows it is about 0.05


def survive(path: str | Path, model: str | Path | None = None, imatrix: str | Path | None = None) -> dict[str, Any]:
    """What quantization leaves of a pruned checkpoint: in the GGUF `model`, tensor by tensor, or as it is predicted
    on some rows for every type that the gguf package can quantize to.

    Errors on kept weights are weighted by an `imatrix`, if there is one. Raises CheckpointError, LowmemError.
    """
    refuse_unfinished(Path(path))
    linears = pruned_linears(Checkpoint(path), read_report(Path(path)))
    names = gguf_names(list(linears), "survive")
    known = read_imatrix(imatrix)[0] if imatrix else {}
    for name, linear in linears.items():
        entry, inputs = known.get(names[name]), linear.shape[1]
        if known and (entry is None or entry.sums.shape != (1, inputs)):
            raise CheckpointError(
                f"{imatrix}: has no entry {names[name]} of {inputs} values; get that of this very model"
            )

    def importance(name: str) -> np.ndarray:
        return known[names[name]].means[0] if known else np.ones(1)

    report: dict[str, Any] = {"path": str(path), "imatrix": str(imatrix) if imatrix else None}
    tiny = any(linear.tiny for linear in linears.values())
    if model is None:
        report |= {"types": predict(linears, importance), "advice": advice(tiny=tiny)}
    else:
        tensors = list(_compared(linears, names, importance, Path(model)))
        types = _by_type(tensors)
        report |= {"model": str(model), "tensors": tensors, "types": types, "advice": advice(types, tiny)}
    if not any(one.get("pruned") for one in report["types"]):
        raise CheckpointError(f"{path}: has no pruned weights; give the folder that prune wrote")
    return report


def outlook(checkpoint: Checkpoint, report: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction for a checkpoint that was just pruned; without the gguf package the rules alone."""
    linears = pruned_linears(checkpoint, report)
    try:
        types = predict(linears, lambda name: np.ones(1))
    except LowmemError:
        types = [{"type": kind, "bits": known.bits, "grid": known.grid} for kind, known in TYPES.items()]
    return {"types": types, "advice": advice(tiny=any(linear.tiny for linear in linears.values()))}


def predict(linears: Mapping[str, Linear], importance: Importance) -> list[dict[str, Any]]:
    """For each type of a GGUF what is left of some rows of all linears; for those that gguf cannot quantize to, the
    rule alone, and likewise where no linear has inputs that its blocks divide."""
    gguf, share = package("a prediction"), SAMPLE // max(1, len(linears))
    known = {kind.name: kind for kind in gguf.GGMLQuantizationType}
    kinds = [known[name] for name in TYPES if name in known and _can_quantize(gguf, known[name])]
    sums, fitting = {kind.name: Remains() for kind in kinds}, dict.fromkeys((kind.name for kind in kinds), 0)
    for name, linear in linears.items():
        rows, columns = linear.shape
        count = min(rows, max(1, share // columns))
        weight = linear.reader()((rows - count) // 2, (rows - count) // 2 + count)
        for kind in kinds:
            if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                with np.errstate(all="ignore"):  # of blocks that are all zeros, or nearly
                    stored = gguf.dequantize(gguf.quantize(weight, kind), kind).reshape(weight.shape)
                sums[kind.name].add(weight, linear.gone(weight), stored, importance(name))
                fitting[kind.name] += 1
    records = []
    for kind, type_ in TYPES.items():
        figures = {"linears": fitting[kind]} if kind in sums else {}
        figures |= sums[kind].figures() if fitting.get(kind) else {}
        records.append({"type": kind, "bits": type_.bits, "grid": type_.grid, **figures})
    return records


def _can_quantize(gguf: Any, kind: Any) -> bool:
    """Whether the package can quantize to a type, and not only from it."""
    try:
        gguf.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def _compared(
    linears: Mapping[str, Linear], names: Mapping[str, str], importance: Importance, model: Path
) -> Iterator[dict[str, Any]]:
    """A record for each linear. Raises CheckpointError for one that the GGUF does not hold as it is here."""
    stored = {tensor.name: tensor for path in _parts(model) for tensor in open_gguf(path).tensors}
    for name, linear in linears.items():
        tensor = stored.get(names[name])
        if tensor is None or tuple(int(size) for size in tensor.shape[::-1]) != linear.shape:
            shape = "no such tensor" if tensor is None else f"{[int(size) for size in tensor.shape[::-1]]}"
            raise CheckpointError(
                f"{model}: {names[name]} should be {list(linear.shape)}, it has {shape}: give the GGUF that was made "
                "of this very checkpoint"
            )
        yield {"name": name, "tensor": tensor.name, **_examine(linear, tensor, importance(name), model)}


def _parts(model: Path) -> list[Path]:
    """All files of a GGUF that is split in several."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", model.name)
    if not match:
        return [model]
    return [model.with_name(f"{match[1]}-{part + 1:05d}-of-{match[2]}.gguf") for part in range(int(match[2]))]


def _examine(linear: Linear, tensor: Any, importance: np.ndarray, model: Path) -> dict[str, Any]:
    """What is left of one tensor, all of it."""
    rows, columns = linear.shape
    read, remains = linear.reader(), Remains()
    order = _order(linear, read, tensor, model)
    holds = linear.pattern is not None and columns % linear.pattern[1] == 0
    for start in range(0, rows, step := max(1, CHUNK // columns)):
        weight = read(start, min(start + step, rows))
        stored = _dequantized(tensor, slice(start, start + step) if order is None else order[start : start + step])
        remains.add(weight, linear.gone(weight), stored, importance)
        if linear.pattern and holds:
            kept, of = linear.pattern
            holds = bool(((stored == 0).reshape(len(stored), -1, of).sum(axis=2) >= of - kept).all())
    pattern = ":".join(map(str, linear.pattern)) if linear.pattern else ""
    figures, kind = remains.figures(), tensor.tensor_type.name
    if not linear.tiny and figures["pruned"] and figures["zero"] < 0.5 and kind in TYPES and TYPES[kind].grid == KEEPS:
        raise CheckpointError(
            f"{model}: {tensor.name} is {kind}, which keeps zeros, and has none where {linear.tensor.name} has: it was "
            "made of another checkpoint, perhaps the dense one"
        )
    return {"type": kind, "pattern": pattern, "holds": holds, **figures, "remains": remains}


def _dequantized(tensor: Any, rows: Any) -> np.ndarray:
    """Some rows of a GGUF's tensor, float32 (rows, columns). Raises CheckpointError for a type that is not known."""
    data = np.ascontiguousarray(tensor.data[rows])
    try:
        values: np.ndarray = package("survive").dequantize(data, tensor.tensor_type)
    except NotImplementedError:
        raise CheckpointError(
            f"{tensor.name}: is {tensor.tensor_type.name}, which the gguf package cannot read; take another type"
        ) from None
    return values.reshape(len(data), -1).astype(np.float32, copy=False)


def _order(linear: Linear, read: Rows, tensor: Any, model: Path) -> np.ndarray | None:
    """Which row of the GGUF each row of the checkpoint is; None where that is the same one.

    The converter reorders rows of some families, as Llama's q and k for its rotary embedding. The order is found from
    the values: rows that are alike; those of which nothing was kept take what is left. Raises CheckpointError where
    these are no rows of the checkpoint.
    """
    rows, columns = linear.shape
    some = np.unique(np.linspace(0, rows - 1, SEEN).astype(int))
    here = np.concatenate([read(row, row + 1) for row in some])
    alive = ~linear.gone(here).all(axis=1)
    if (_cosines(here[alive], _dequantized(tensor, some)[alive]) > ALIKE).sum() >= 0.9 * alive.sum():
        return None
    step = max(1, CHUNK // columns)
    starts = range(0, rows, step)
    mine = np.concatenate([read(at, min(at + step, rows))[:, :COLUMNS].copy() for at in starts])
    theirs = _unit(np.concatenate([_dequantized(tensor, slice(at, at + step))[:, :COLUMNS].copy() for at in starts]))
    alive = ~linear.gone(mine).all(axis=1)
    order = np.concatenate([(_unit(mine[at : at + step]) @ theirs.T).argmax(axis=1) for at in starts])
    found = np.unique(order[alive])
    if min(len(found), (_cosines(mine, theirs[order])[alive] > ALIKE).sum()) < 0.9 * alive.sum():
        raise CheckpointError(f"{model}: {tensor.name} does not hold the weights of {linear.tensor.name}, in any order")
    order[~alive] = np.resize(np.setdiff1d(np.arange(rows), found), rows - alive.sum())
    return order


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each row of one and the same row of the other."""
    return (_unit(one) * _unit(other)).sum(axis=1)  # type: ignore[no-any-return]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)  # type: ignore[no-any-return]


def _by_type(tensors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors' figures summed up, type by type, in the order of TYPES; takes the sums out of them."""
    sums: dict[str, Remains] = {}
    for tensor in tensors:
        sums.setdefault(tensor["type"], Remains()).merge(tensor.pop("remains"))
    made = []
    for kind in sorted(sums, key=lambda kind: [*TYPES, kind].index(kind)):
        own = [tensor for tensor in tensors if tensor["type"] == kind]
        patterned = [tensor["holds"] for tensor in own if tensor["pattern"]]
        known = {"bits": TYPES[kind].bits, "grid": TYPES[kind].grid} if kind in TYPES else {}
        counts = {"linears": len(own), "patterned": len(patterned), "holding": sum(patterned)}
        made.append({"type": kind, **known, **counts, **sums[kind].figures()})
    return made
