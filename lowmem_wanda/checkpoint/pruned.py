"""The pruned matrices of a checkpoint, as its report has them, and their values without torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.directory import FLOATS, IN_BLOCK, Checkpoint, read_json
from lowmem_wanda.checkpoint.output import REPORT
from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import CheckpointError

Rows = Callable[[int, int], np.ndarray]  # from an output to another -> their weights (rows, columns), float32


@dataclass(frozen=True)
class Linear:
    """A pruned matrix of a checkpoint: `pattern` (kept, of) where it holds one, `tiny` what pruned weights are beside
    zero (0: they are), `transposed` where the file has (inputs, outputs)."""

    tensor: Tensor
    transposed: bool = False
    pattern: tuple[int, int] | None = None
    tiny: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.tensor.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def reader(self) -> Rows:
        """What reads outputs from one to another, (rows, columns) in float32; of a transposed one it holds all."""
        tensor = self.tensor
        if self.transposed:
            whole = np.ascontiguousarray(_floats(tensor).T)
            return lambda start, stop: whole[start:stop]
        size = tensor.nbytes // tensor.shape[0]

        def rows(start: int, stop: int) -> np.ndarray:
            shape, offset = (stop - start, tensor.shape[1]), tensor.offset + start * size
            return _floats(replace(tensor, shape=shape, offset=offset, nbytes=shape[0] * size))

        return rows

    def gone(self, weight: np.ndarray) -> np.ndarray:
        """Which of some weights are pruned."""
        gone: np.ndarray = (weight == 0) | (np.abs(weight) == np.float32(self.tiny))
        return gone


def read_report(path: Path) -> dict[str, Any]:
    """report.json of a directory; nothing where there is none. Raises CheckpointError."""
    return read_json(path / REPORT) if (path / REPORT).exists() else {}


def pruned_linears(checkpoint: Checkpoint, report: Mapping[str, Any]) -> dict[str, Linear]:
    """{name: linear} of a checkpoint that was pruned, as its report has them, or without one all matrices in blocks.

    Raises CheckpointError where there are none.
    """
    tensors, path = checkpoint.tensors, checkpoint.path
    try:
        records = {name: one for block in report.get("blocks", ()) for name, one in block["linears"].items()}
        found = {name: _linear(tensors[name], record) for name, record in records.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path / REPORT}: is not what prune wrote; remove it to look at all matrices") from None
    if not report:
        found = {
            name: Linear(tensor) for name, tensor in tensors.items() if IN_BLOCK.search(name) and is_matrix(tensor)
        }
    if not found:
        raise CheckpointError(f"{path}: has no matrices in blocks; give the folder of a pruned checkpoint")
    return found


def is_matrix(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and len(tensor.shape) == 2 and tensor.numel > 0


def _linear(tensor: Tensor, record: Mapping[str, Any]) -> Linear:
    """Raises ValueError, TypeError or KeyError where the record is none of such a tensor."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", record["pattern"])
    pattern = (int(match[1]), int(match[2])) if match else None
    if not is_matrix(tensor) or (pattern and pattern[1] == 0):
        raise ValueError(tensor.name)
    return Linear(tensor, bool(record["transposed"]), pattern, float(record.get("tiny", 0)))


def _floats(tensor: Tensor) -> np.ndarray:
    """A tensor's values in float32, in its shape."""
    raw = b"".join(tensor.pieces())
    if tensor.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    kind = f"<f{FLOATS[tensor.dtype]}"
    return np.frombuffer(raw, kind).astype(np.float32).reshape(tensor.shape)
