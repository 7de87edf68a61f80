"""Verifies a checkpoint by its bytes alone: its sparsity, its patterns, and that it equals its source except for zeros.

Neither torch nor transformers is needed, so the proof does not rest on the code that made the checkpoint.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.checksum import MissingPackageError, matches
from lowmem_wanda.checkpoint.companions import REPORT, companions
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.output import require_finished
from lowmem_wanda.checkpoint.pruned import (
    IN_BLOCK,
    NO_PROMISE,
    Promise,
    as_matrix,
    differing_values,
    holds,
    is_matrix,
    keeps_bits,
    made_no_zeros,
    promises_of,
    read_report,
    recovered_in,
    shards_of,
)
from lowmem_wanda.checkpoint.reader import FLOATS, PIECE, Tensor
from lowmem_wanda.checkpoint.verify_cut import Removal, compare_cut, fewer_experts

PATTERNS = ((1, 4), (1, 2), (2, 4), (4, 8), (8, 16), (3, 4), (6, 8))  # (kept, of); the first that holds is shown
TINY = {"F64": 1 << 52, "F32": 1 << 23, "F16": 1 << 10, "BF16": 1 << 7}  # bits of the smallest normal number


@dataclass
class MatrixFindings:
    """What was found in one matrix.

    `zeros` weights are exactly zero. `filled` weights have the smallest normal magnitude, which stands for a pruned
    weight. `pattern` is the N:M pattern that both together hold along the inputs, or "". A transposed matrix (GPT-2's
    Conv1D) holds it down the columns, and its `pattern` reads "2:4 (transposed)". `kept` is False if report.json
    promises a pattern that the matrix does not hold.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    zeros: int
    pattern: str
    kept: bool = True
    filled: int = 0

    @property
    def sparsity(self) -> float:
        """The share of pruned weights."""
        return (self.zeros + self.filled) / max(1, self.shape[0] * self.shape[1])


@dataclass
class Findings:
    """What `check` found. A checkpoint is what it claims to be if there are no `problems`.

    `shards_verified` shards have the checksums in report.json. The other numbers compare with a source: `identical`
    tensors have its bytes, `masked` tensors have pruned weights, `zeroed` of them in all. In `moved` matrices kept
    weights have other values, which the report of a method that updates weights announces. Of a checkpoint without some
    of its `experts`, each layer has those that are `kept`, {layer: ids}, and `cut` tensors are the slices of the
    source's that belong to them.
    """

    matrices: list[MatrixFindings] = field(default_factory=list)
    identical: int = 0
    masked: int = 0
    zeroed: int = 0
    moved: int = 0
    shards_verified: int = 0
    cut: int = 0
    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    experts: int = 0
    problems: list[str] = field(default_factory=list)


def check(path: str | Path, against: str | Path | None = None) -> Findings:
    """What the checkpoint in a directory holds, and whether it is what it claims to be.

    Every tensor is read once, 16 MiB at a time. If prune left a report.json, the shards' checksums and each matrix's
    zeros are compared with it. If shrink did, the ids of the experts that are kept are taken from it.

    Args:
        path: the folder of any safetensors checkpoint.
        against: the folder of its source (default: no comparison). Every weight must then be the source's or zero, and
            everything else must have the same bytes. Without some experts, all that is left must have them.

    Returns:
        `Findings`. Its `problems` are empty if all is as it should be.

    Raises:
        CheckpointError: a file cannot be read at all, or the job in the directory is not done.

    Example:
        >>> from lowmem_wanda import check
        >>> check("pruned", against="source").problems
        []
    """
    path = Path(path)
    require_finished(path)
    checkpoint, findings = Checkpoint(path), Findings()
    report = read_report(path)
    shrunk = report.get("kind") == "shrink"
    promises = promises_of({} if made_no_zeros(report) else report)
    parted = {promise.tensor for promise in promises.values() if promise.tensor}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in parted and is_matrix(as_matrix(tensor)):
            findings.matrices.append(_count_zeros(as_matrix(tensor), promises.get(tensor.name, NO_PROMISE)))
    for name, promise in promises.items():
        if promise.tensor and (part := promise.part_of(checkpoint.tensors, name)):
            findings.matrices.append(_count_zeros(part, promise))
    if report:
        _compare_report(path, report, promises, findings)
    if shrunk:
        removal = Removal(report)
        findings.kept, findings.experts = removal.layers, removal.count
        if against is not None:
            source = Checkpoint(against, dequantize=not removal.quantized)
            masked = {promise.tensor or name for name, promise in promises.items()}
            found = compare_cut(checkpoint, source, removal, masked)
            findings.identical, findings.cut, findings.moved = found.identical, found.cut, found.moved
            findings.masked, findings.zeroed = found.masked, found.zeroed
            findings.problems += found.problems
    elif against is not None and not report and (fewer := fewer_experts(checkpoint, Checkpoint(against))):
        findings.problems.append(fewer)
    elif against is not None:
        of_tensors = {promise.tensor or name: promise for name, promise in promises.items()}
        moved = set() if keeps_bits(report) else of_tensors.keys() | recovered_in(report)
        dequantize = bool((report.get("arguments") or {}).get("dequantize"))
        _compare_source(checkpoint, Checkpoint(against, dequantize), of_tensors, moved, findings)
    return findings


def _count_zeros(tensor: Tensor, promise: Promise) -> MatrixFindings:
    """The findings in one matrix: its zeros, and the first pattern that all groups hold, along inputs or outputs."""
    zeros, filled, promised = 0, 0, None
    tiny = TINY[tensor.dtype] if promise.filled else 0
    candidates = [(kept, of, axis) for axis in (1, 0) for kept, of in PATTERNS]
    if promise.nm:
        promised = (*promise.nm, 0 if promise.transposed else 1)
        candidates.append(promised)
    candidates = [(kept, of, axis) for kept, of, axis in candidates if tensor.shape[axis] % of == 0]
    for bits in _rows(tensor, math.lcm(*(of for _, of, axis in candidates if axis == 0))):
        zero = (bits << 1) == 0  # the shift drops the sign
        zeros += int(zero.sum())
        if tiny:
            small = (bits << 1) == tiny << 1
            filled += int(small.sum())
            zero |= small
        candidates = [entry for entry in candidates if holds(zero, *entry)]
    pattern = next((f"{kept}:{of}" + ("" if axis else " (transposed)") for kept, of, axis in candidates), "")
    kept = promised is None or promised in candidates
    return MatrixFindings(tensor.name, tensor.dtype, (tensor.shape[0], tensor.shape[1]), zeros, pattern, kept, filled)


def _rows(tensor: Tensor, multiple: int) -> Iterator[np.ndarray]:
    """Yields the bits of about 16 MiB of rows at a time, unsigned integers (rows, columns).

    The number of rows is a multiple of `multiple`, except at the end of the tensor.
    """
    step = tensor.nbytes // tensor.shape[0] * multiple
    for piece in tensor.pieces(max(1, PIECE // step) * step):
        yield np.frombuffer(piece, f"<u{FLOATS[tensor.dtype]}").reshape(-1, tensor.shape[1])


def _compare_report(path: Path, report: Mapping[str, Any], promises: Mapping[str, Promise], findings: Findings) -> None:
    """Compares checksums, zeros and patterns with report.json; every difference becomes a problem."""
    for name, checksum in shards_of(report).items():
        file = path / Path(name).name
        try:
            same = matches(file, checksum)
        except MissingPackageError as error:  # the tensors can be counted all the same
            findings.problems.append(str(error))
            continue
        if same:
            findings.shards_verified += 1
        else:
            findings.problems.append(f"{file.name}: is not the file whose checksum {REPORT} gives")
    found = {matrix.name: matrix for matrix in findings.matrices}
    for name, promise in promises.items():
        matrix = found.get(name)
        if matrix is None or matrix.zeros != promise.zeros:
            zeros = matrix.zeros if matrix else "no"
            findings.problems.append(f"{name}: has {zeros} zeros, {REPORT} says {promise.zeros}")
        elif matrix.filled != promise.filled:
            findings.problems.append(
                f"{name}: has {matrix.filled} weights of the smallest number, {REPORT} says {promise.filled}"
            )
        elif not matrix.kept:
            findings.problems.append(f"{name}: does not hold {promise.pattern}, which {REPORT} says it does")


def _compare_source(
    pruned: Checkpoint, source: Checkpoint, promises: Mapping[str, Promise], moved: Collection[str], findings: Findings
) -> None:
    """Compares a pruned checkpoint with its source; every difference that pruning does not make becomes a problem.

    Every weight of a matrix in a block must be the source's or +0.0. All other tensors and all small files must have
    the same bytes. If report.json says so, pruned weights are the smallest normal number of either sign instead of
    +0.0. Tensors whose values were `moved`, as the report says, may have others.
    """
    for name in sorted(pruned.tensors.keys() ^ source.tensors.keys()):
        where = pruned.path if name in source.tensors else source.path
        findings.problems.append(f"{name}: is missing in {where}")
    for name in sorted(pruned.tensors.keys() & source.tensors.keys()):
        filled = bool(promises.get(name, NO_PROMISE).filled) and pruned.tensors[name].dtype in TINY
        _compare_tensor(pruned.tensors[name], source.tensors[name], filled, name in moved, findings)
    for file in source.differing(companions(source.path).files, pruned.path):
        findings.problems.append(f"{file}: is missing or differs from the source's")


def _compare_tensor(ours: Tensor, theirs: Tensor, filled: bool, moves: bool, findings: Findings) -> None:
    """Compares one tensor with the source's.

    Pruned weights must be +0.0, or the smallest normal number if they are `filled`. Kept weights must be the source's
    unless the method `moves` them.
    """
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        is_, was = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (ours, theirs))
        findings.problems.append(f"{ours.name}: is {is_}, the source's {was}")
        return
    zeroed, changed = differing_values(ours, theirs, TINY[ours.dtype] if filled else 0)
    prunable = is_matrix(as_matrix(ours)) and IN_BLOCK.search(ours.name)
    if changed and not moves:
        pruned = "the smallest number" if filled else "zero"
        findings.problems.append(f"{ours.name}: {changed} weights are neither the source's nor {pruned}")
    elif zeroed and not prunable:
        findings.problems.append(
            f"{ours.name}: {zeroed} values are zero that are not in the source, and it is not a matrix of a block"
        )
    findings.identical += not (zeroed or changed)
    findings.masked += bool(zeroed)
    findings.moved += bool(changed and moves)
    findings.zeroed += zeroed
