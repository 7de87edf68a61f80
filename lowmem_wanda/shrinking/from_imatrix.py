"""What experts put out, estimated from an importance matrix and weights, without a forward pass."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lowmem_wanda.checkpoint.pruned import as_floats
from lowmem_wanda.checkpoint.reader import ITEMSIZE
from lowmem_wanda.errors import CalibrationError
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.llamacpp.norms import load_norms
from lowmem_wanda.shrinking.choice import Sums
from lowmem_wanda.sparsity.experts import output_norms
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel


class Estimates(Mapping[int, Sums]):
    """{layer: the tokens and the summed norms of outputs of its experts}, each computed when it is asked for.

    The file is llama.cpp's importance matrix of this very model, `.gguf`, with counts for each expert. Raises
    CalibrationError for any other.
    """

    def __init__(self, path: Path, model: StreamedModel) -> None:
        self._tensors = model.checkpoint.tensors
        self._down = {index: found for index in range(model.depth) if (found := _down_in(model, index))}
        if not self._down:
            raise CalibrationError(f"{path}: no experts of the model are found that it could be of; leave --from out")
        names = gguf_names([matrix.name for matrix in model.skeleton.all_matrices], f"--from {path}")
        columns = {matrix.name: matrix.shape[1] for layer in self._down.values() for matrix in layer}
        self._norms = load_norms(str(path), names, columns)
        for layer in self._down:
            counts = self._counts(layer)
            if len(counts) > 1 and (counts == counts[0]).all():
                raise CalibrationError(
                    f"{path}: has the same count of {counts[0]} tokens for every expert of layer {layer}, as a file "
                    "that was converted from the older format has; make one with llama-imatrix of today"
                )

    def _counts(self, layer: int) -> np.ndarray:
        return np.array([self._norms.entries[matrix.name].counts[0] for matrix in self._down[layer]])

    def __getitem__(self, layer: int) -> Sums:
        entries = [self._norms.entries[matrix.name] for matrix in self._down[layer]]
        counts = self._counts(layer)
        squares = np.stack([np.asarray(one.sums[0], np.float64) for one in entries]) / np.maximum(counts, 1)[:, None]
        columns = np.stack([self._columns(matrix) for matrix in self._down[layer]])
        return {"tokens": [float(one) for one in counts], "norms": output_norms(counts, squares, columns).tolist()}

    def __iter__(self) -> Iterator[int]:
        return iter(self._down)

    def __len__(self) -> int:
        return len(self._down)

    def _columns(self, matrix: Matrix) -> np.ndarray:
        """The squared norms of a matrix's columns, float64 (inputs,)."""
        tensor = self._tensors[matrix.tensor]
        size, (rows, columns) = ITEMSIZE[tensor.dtype], matrix.shape
        shape = (columns, rows) if matrix.transposed else (rows, columns)
        part = replace(tensor, offset=tensor.offset + matrix.start * size, nbytes=matrix.weights * size, shape=shape)
        values = as_floats(b"".join(part.pieces()), part.dtype).reshape(shape)
        return np.asarray(np.square(values, dtype=np.float64).sum(axis=1 if matrix.transposed else 0))


def _down_in(model: StreamedModel, index: int) -> list[Matrix]:
    """The down projections of a block's experts, in their order."""
    matrices = model.skeleton.matrices[index]
    return [matrix for matrix in matrices if matrix.expert is not None and matrix.parameter == "down_proj"]
