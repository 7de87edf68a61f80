"""What a checkpoint is, read from its bytes alone: sparsity, patterns, and whether it is its source but for zeros.

Needs neither torch nor transformers, so that the proof does not rest on what made the checkpoint.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.directory import FLOATS, IN_BLOCK, Checkpoint
from lowmem_wanda.checkpoint.output import REPORT, refuse_unfinished
from lowmem_wanda.checkpoint.pruned import read_report
from lowmem_wanda.checkpoint.reader import PIECE, Tensor
from lowmem_wanda.checkpoint.writer import differing, sha256_of, small_files
from lowmem_wanda.errors import CheckpointError

PATTERNS = ((1, 4), (1, 2), (2, 4), (4, 8), (8, 16), (3, 4), (6, 8))  # kept, of; what holds the first holds more
TINY = {"F64": 1 << 52, "F32": 1 << 23, "F16": 1 << 10, "BF16": 1 << 7}  # bits of the smallest normal number


@dataclass
class Matrix:
    """A matrix's zeros, what report.json has in their place (`filled`: the smallest number, of either sign), and the
    N:M pattern that both hold along its inputs ("" for none).

    Transposed weights (GPT-2's Conv1D) hold theirs down the columns, which "2:4 (transposed)" says.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    zeros: int
    pattern: str
    kept: bool = True  # a pattern that report.json promises of it
    filled: int = 0

    @property
    def sparsity(self) -> float:
        return (self.zeros + self.filled) / max(1, self.shape[0] * self.shape[1])


@dataclass
class Findings:
    """What `check` found; a checkpoint is what it says when there are no `problems`."""

    matrices: list[Matrix] = field(default_factory=list)
    identical: int = 0
    masked: int = 0
    zeroed: int = 0
    shards_verified: int = 0
    problems: list[str] = field(default_factory=list)


def check(path: str | Path, against: str | Path | None = None) -> Findings:
    """Reads every tensor of `path` once, 16 MiB at a time, and `against`, its source, beside it.

    With a report.json the shards' checksums and each linear's zeros are held against it. Raises
    CheckpointError where something cannot be read at all.
    """
    path = Path(path)
    refuse_unfinished(path)
    checkpoint, findings = Checkpoint(path), Findings()
    report = read_report(path)
    promises = _promises(report)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.numel:
            findings.matrices.append(_examine(tensor, promises.get(tensor.name)))
    if report:
        _compare_report(path, report, promises, findings)
    if against is not None:
        _compare_source(checkpoint, Checkpoint(against), promises, findings)
    return findings


def _examine(tensor: Tensor, promise: dict[str, Any] | None) -> Matrix:
    """Counts zeros, and keeps the patterns that no group of either direction breaks."""
    zeros, filled, promised = 0, 0, None
    tiny = TINY[tensor.dtype] if promise and promise.get("filled") else 0
    candidates = [(kept, of, axis) for axis in (1, 0) for kept, of in PATTERNS]
    if promise and (match := re.fullmatch(r"(\d+):(\d+)", str(promise.get("pattern")))):
        promised = (int(match[1]), max(1, int(match[2])), 0 if promise.get("transposed") else 1)
        candidates.append(promised)
    candidates = [(kept, of, axis) for kept, of, axis in candidates if tensor.shape[axis] % of == 0]
    for bits in _rows(tensor, math.lcm(*(of for _, of, axis in candidates if axis == 0))):
        zero = (bits << 1) == 0  # without the sign
        zeros += int(zero.sum())
        if tiny:
            small = (bits << 1) == tiny << 1
            filled += int(small.sum())
            zero |= small
        candidates = [entry for entry in candidates if _holds(zero, *entry)]
    pattern = next((f"{kept}:{of}" + ("" if axis else " (transposed)") for kept, of, axis in candidates), "")
    kept = promised is None or promised in candidates
    return Matrix(tensor.name, tensor.dtype, (tensor.shape[0], tensor.shape[1]), zeros, pattern, kept, filled)


def _holds(zero: np.ndarray, kept: int, of: int, axis: int) -> bool:
    groups = zero.reshape(len(zero), -1, of).sum(axis=2) if axis else zero.reshape(-1, of, zero.shape[1]).sum(axis=1)
    return bool((groups >= of - kept).all())


def _rows(tensor: Tensor, multiple: int) -> Iterator[np.ndarray]:
    """Bits of about 16 MiB of whole rows, a multiple of so many, at a time, as unsigned integers (rows, columns)."""
    step = tensor.nbytes // tensor.shape[0] * multiple
    for piece in tensor.pieces(max(1, PIECE // step) * step):
        yield np.frombuffer(piece, f"<u{FLOATS[tensor.dtype]}").reshape(-1, tensor.shape[1])


def _promises(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{tensor: what report.json says of it}. Raises CheckpointError for a report that says nothing of any."""
    try:
        promises = {name: linear for block in report.get("blocks", ()) for name, linear in block["linears"].items()}
        kept = all(isinstance(linear, dict) and "zeros" in linear for linear in promises.values())
        if report and not (promises and kept and report["shards"] and isinstance(report["shards"], list)):
            raise KeyError("blocks")
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{REPORT}: is not what prune wrote; remove it to check the tensors alone") from None
    return promises


def _compare_report(
    path: Path, report: dict[str, Any], promises: dict[str, dict[str, Any]], findings: Findings
) -> None:
    """Holds checksums, zeros and patterns against what report.json says of them."""
    for shard in report["shards"]:
        file = path / Path(shard["name"]).name
        if file.exists() and sha256_of(file) == shard["sha256"]:
            findings.shards_verified += 1
        else:
            findings.problems.append(f"{file.name}: is not the file that {REPORT} has the checksum of")
    found = {matrix.name: matrix for matrix in findings.matrices}
    for name, linear in promises.items():
        matrix = found.get(name)
        if matrix is None or matrix.zeros != linear["zeros"]:
            zeros = matrix.zeros if matrix else "no"
            findings.problems.append(f"{name}: has {zeros} zeros, {REPORT} says {linear['zeros']}")
        elif matrix.filled != linear.get("filled", 0):
            findings.problems.append(
                f"{name}: has {matrix.filled} of the smallest number, {REPORT} says {linear['filled']}"
            )
        elif not matrix.kept:
            findings.problems.append(f"{name}: does not hold {linear['pattern']}, which {REPORT} says it does")


def _compare_source(
    pruned: Checkpoint, source: Checkpoint, promises: dict[str, dict[str, Any]], findings: Findings
) -> None:
    """Every weight of a block's matrix must be the source's or +0.0, or where report.json says so the smallest number
    of either sign; all else and every small file the same bytes."""
    for name in sorted(pruned.tensors.keys() ^ source.tensors.keys()):
        where = pruned.path if name in source.tensors else source.path
        findings.problems.append(f"{name}: is missing in {where}")
    for name in sorted(pruned.tensors.keys() & source.tensors.keys()):
        filled = bool(promises.get(name, {}).get("filled")) and pruned.tensors[name].dtype in TINY
        _compare_tensor(pruned.tensors[name], source.tensors[name], filled, findings)
    for file in differing(small_files(source.path), source.path, pruned.path):
        findings.problems.append(f"{file}: is missing or differs from the source's")


def _compare_tensor(ours: Tensor, theirs: Tensor, filled: bool, findings: Findings) -> None:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        is_, was = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (ours, theirs))
        findings.problems.append(f"{ours.name}: is {is_}, the source's {was}")
        return
    zeroed = changed = 0
    for mine, source in zip(ours.pieces(), theirs.pieces(), strict=True):
        if mine != source:
            kind = f"<u{FLOATS.get(ours.dtype, 1)}"
            mine_bits, source_bits = np.frombuffer(mine, kind), np.frombuffer(source, kind)
            differs = mine_bits != source_bits
            gone = mine_bits << 1 == TINY[ours.dtype] << 1 if filled else mine_bits == 0
            zeroed += int((differs & gone).sum())
            changed += int((differs & ~gone).sum())
    prunable = ours.dtype in FLOATS and len(ours.shape) == 2 and IN_BLOCK.search(ours.name)
    if changed:
        findings.problems.append(f"{ours.name}: {changed} weights are neither the source's nor zero")
    elif zeroed and not prunable:
        findings.problems.append(
            f"{ours.name}: {zeroed} values are zero that are not in the source, and it is no matrix of a block"
        )
    findings.identical += not (zeroed or changed)
    findings.masked += bool(zeroed)
    findings.zeroed += zeroed
