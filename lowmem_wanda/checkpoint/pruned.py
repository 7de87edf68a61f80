"""The pruned matrices of a checkpoint: what its report promises of them, and their values, read without torch."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.checksum import checksum_in
from lowmem_wanda.checkpoint.companions import REPORT
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.reader import FLOATS, ITEMSIZE, Tensor, read_json
from lowmem_wanda.errors import CheckpointError

IN_BLOCK = re.compile(r"(^|\.)\d+\.")  # found in the name of every tensor that lies in a block
Rows = Callable[[int, int], np.ndarray]  # (first output, last output + 1) -> their weights, float32 (rows, columns)


@dataclass(frozen=True)
class Promise:
    """What a report says of one pruned matrix.

    `zeros` weights are exactly zero. `filled` weights have the magnitude `tiny` and stand for pruned ones; `tiny` is 0
    where pruned weights are zeros. `pattern` is the pattern as text, such as "2:4" or "50%". A `transposed` matrix lies
    in its file as (inputs, outputs). One of several in a file tensor, such as an expert's, is of `shape` (outputs,
    inputs) and lies in `tensor` from the value `start` on; of any other `tensor` is "".
    """

    zeros: int = 0
    filled: int = 0
    tiny: float = 0.0
    pattern: str = ""
    transposed: bool = False
    tensor: str = ""
    start: int = 0
    shape: tuple[int, ...] = ()

    def part_of(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The matrix `name` as a file tensor of its own; None where the tensors hold no such matrix."""
        whole = tensors.get(self.tensor or name)
        if whole is None or not self.tensor:
            return whole if whole is not None and is_matrix(whole) else None
        size = ITEMSIZE[whole.dtype]
        shape = self.shape[::-1] if self.transposed else self.shape
        part = replace(
            whole, name=name, shape=shape, offset=whole.offset + self.start * size, nbytes=math.prod(shape) * size
        )
        return part if is_matrix(part) and 0 <= self.start <= whole.numel - part.numel else None

    @property
    def nm(self) -> tuple[int, int] | None:
        """(kept, of) of an N:M pattern; None for any other pattern."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.pattern)
        return (int(match[1]), max(1, int(match[2]))) if match else None


NO_PROMISE = Promise()


@dataclass(frozen=True)
class PrunedMatrix:
    """A matrix of a checkpoint and what its report promises of it."""

    tensor: Tensor
    promise: Promise = NO_PROMISE

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.tensor.shape
        return (columns, rows) if self.promise.transposed else (rows, columns)

    def reader(self) -> Rows:
        """A function that reads some outputs, float32 (rows, columns); for a transposed matrix it holds all of it."""
        tensor = self.tensor
        if self.promise.transposed:
            whole = np.ascontiguousarray(_floats(tensor).T)
            return lambda start, stop: whole[start:stop]
        size = tensor.nbytes // tensor.shape[0]

        def rows(start: int, stop: int) -> np.ndarray:
            shape, offset = (stop - start, tensor.shape[1]), tensor.offset + start * size
            return _floats(replace(tensor, shape=shape, offset=offset, nbytes=shape[0] * size))

        return rows

    def gone(self, weight: np.ndarray) -> np.ndarray:
        """The mask of the weights that are pruned: those that are zero or have the magnitude `tiny`."""
        gone: np.ndarray = (weight == 0) | (np.abs(weight) == np.float32(self.promise.tiny))
        return gone


def read_report(path: Path) -> dict[str, Any]:
    """The content of report.json in a directory; {} if the file is missing. Raises CheckpointError."""
    return read_json(path / REPORT) if (path / REPORT).exists() else {}


def promises_of(report: Mapping[str, Any]) -> dict[str, Promise]:
    """{tensor: promise} of the report of a pruning; {} for an empty report. Raises CheckpointError for any other."""
    try:
        found = {name: _promise(one) for block in report.get("blocks", ()) for name, one in block["linears"].items()}
        if report and not (found and shards_of(report)):
            raise KeyError("blocks")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{REPORT}: is not what prune wrote; remove it to look at the tensors alone") from None
    return found


def shards_of(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """{file name: its checksum} of the shards in a pruning's report. Raises KeyError, TypeError or ValueError."""
    shards = {shard["name"]: checksum_in(shard) for shard in report["shards"]}
    if not all(isinstance(name, str) and "\0" not in name for name in shards):
        raise ValueError("shards")
    return shards


def recovered_in(report: Mapping[str, Any]) -> set[str]:
    """The names of the tensors that were trained, by the report of a pruning. Raises CheckpointError."""
    try:
        records = [block["recovered"] for block in report.get("blocks", ()) if "recovered" in block]
        records += [report["fine_tuning"]] if "fine_tuning" in report else []
        return {str(name) for record in records for name in record["tensors"]}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{REPORT}: is not what prune wrote; remove it to look at the tensors alone") from None


def keeps_bits(report: Mapping[str, Any]) -> bool:
    """Whether kept weights are the source's, as they are unless the report says that its method updates them."""
    summary = report.get("summary")
    return not isinstance(summary, Mapping) or summary.get("keeps_bits", True) is not False


def made_no_zeros(report: Mapping[str, Any]) -> bool:
    """Whether a report is that of experts which were removed, with nothing pruned of what is left."""
    return report.get("kind") == "shrink" and "blocks" not in report


def pruned_matrices(checkpoint: Checkpoint, report: Mapping[str, Any]) -> dict[str, PrunedMatrix]:
    """{name: matrix} of a pruned checkpoint: the matrices in its report, or all matrices in blocks where it names none.

    Raises CheckpointError if there are none, or if the report belongs to another checkpoint.
    """
    tensors, found = checkpoint.tensors, {}
    report = {} if made_no_zeros(report) else report
    for name, promise in promises_of(report).items():
        if (part := promise.part_of(tensors, name)) is None:
            raise CheckpointError(f"{checkpoint.path / REPORT}: is not what prune wrote: {name} is not a matrix here")
        found[name] = PrunedMatrix(part, promise)
    if not report:
        found = {one.name: PrunedMatrix(one) for one in map(as_matrix, tensors.values()) if IN_BLOCK.search(one.name)}
        found = {name: one for name, one in found.items() if is_matrix(one.tensor)}
    if not found:
        raise CheckpointError(f"{checkpoint.path}: has no matrices in blocks; give the folder of a pruned checkpoint")
    return found


def as_matrix(tensor: Tensor) -> Tensor:
    """A stack of matrices in a block, such as experts, as one matrix of all their rows; any other tensor as it is."""
    if len(tensor.shape) != 3 or tensor.dtype not in FLOATS or not IN_BLOCK.search(tensor.name):
        return tensor
    return replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))


def is_matrix(tensor: Tensor) -> bool:
    """Whether a file tensor is a matrix of floating-point numbers."""
    return tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.numel > 0


def differing_values(ours: Tensor, theirs: Tensor, tiny: int = 0) -> tuple[int, int]:
    """(weights that are pruned in `ours` alone, other values that differ) of two tensors of one dtype and shape.

    Pruned weights are +0.0, or of the bits `tiny` with either sign where those are given.
    """
    zeroed = changed = 0
    for mine, its in zip(ours.pieces(), theirs.pieces(), strict=True):
        if mine != its:
            bits, before = (np.frombuffer(piece, f"<u{FLOATS.get(ours.dtype, 1)}") for piece in (mine, its))
            differs, gone = bits != before, bits << 1 == tiny << 1 if tiny else bits == 0
            zeroed += int((differs & gone).sum())
            changed += int((differs & ~gone).sum())
    return zeroed, changed


def holds(zero: np.ndarray, kept: int, of: int, axis: int = 1) -> bool:
    """Whether at most `kept` of each `of` consecutive values are not zero, along an axis (1: within rows).

    `zero` is the mask of the zeros, bool (rows, columns).
    """
    groups = zero.reshape(len(zero), -1, of).sum(axis=2) if axis else zero.reshape(-1, of, zero.shape[1]).sum(axis=1)
    return bool((groups >= of - kept).all())


def _promise(record: Mapping[str, Any]) -> Promise:
    """The promise in a record. Raises KeyError, TypeError, AttributeError or ValueError if it is not of a matrix."""
    pattern, transposed = record.get("pattern", ""), record.get("transposed", False)
    if not isinstance(pattern, str) or re.fullmatch(r"\d+:0+", pattern) or not isinstance(transposed, bool):
        raise ValueError(pattern)
    counts = (record["zeros"], record.get("filled", 0), record.get("start", 0))
    shape, tensor = tuple(record.get("shape", ())), record.get("tensor", "")
    if not all(isinstance(count, int) for count in (*counts, *shape)) or not isinstance(tensor, str):
        raise ValueError(counts)
    return Promise(*counts[:2], float(record.get("tiny", 0)), pattern, transposed, tensor, counts[2], shape)


def _floats(tensor: Tensor) -> np.ndarray:
    """The values of a tensor, float32 in its shape."""
    return as_floats(b"".join(tensor.pieces()), tensor.dtype).reshape(tensor.shape)


def as_floats(raw: bytes | bytearray, dtype: str) -> np.ndarray:
    """Whole values of a floating-point dtype, as bytes, in float32 (values,)."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, f"<f{FLOATS[dtype]}").astype(np.float32)
