"""Norms of the dense model's inputs from a published importance matrix, with which pruning needs no forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowmem_wanda.checkpoint.writer import sha256_of
from lowmem_wanda.errors import CalibrationError
from lowmem_wanda.llamacpp.imatrix import About, Entry, read
from lowmem_wanda.sparsity.statistics import SquaredNorm


@dataclass(frozen=True)
class Norms:
    """The `entries` of the matrices to prune, by name, and `about`, what they were computed on."""

    path: str
    sha256: str
    about: About
    entries: Mapping[str, Entry]

    def __str__(self) -> str:
        about = self.about
        measured = f", {about.chunks} sequences of {about.length} tokens" if about.length else ""
        return f"{self.path}{measured} of {', '.join(about.datasets) or 'unknown text'}"

    def inputs(self, name: str, device: torch.device) -> SquaredNorm:
        """The statistic of a matrix's inputs, as if it had been measured."""
        entry = self.entries[name]
        return SquaredNorm.known(entry.sums[0], int(entry.counts[0]), device)


def load_norms(path: str, names: Mapping[str, str], columns: Mapping[str, int]) -> Norms:
    """The entries of matrices of so many `columns`, {matrix: inputs}, whose GGUF names are `names`.

    Raises CalibrationError, naming the entry, for one that is missing, of another size, measured on nothing, or without
    sums of squares.
    """
    found, about = read(path)
    entries = {}
    for tensor, inputs in columns.items():
        entry = found.get(names[tensor])
        if entry is None:
            raise CalibrationError(
                f"{path}: has no entry {names[tensor]}, which tensor {tensor} needs: get the importance matrix of "
                "this very model, or --exclude it"
            )
        if entry.sums.shape != (1, inputs):
            raise CalibrationError(
                f"{path}: entry {names[tensor]} has {entry.sums.size} values, tensor {tensor} has {inputs} inputs: "
                "get the importance matrix of this very model"
            )
        if entry.counts[0] < 1:
            raise CalibrationError(f"{path}: entry {names[tensor]} was measured on no token: get another one")
        if not (np.isfinite(entry.sums).all() and (entry.sums >= 0).all()):
            raise CalibrationError(
                f"{path}: entry {names[tensor]} holds numbers that are no sums of squares: get another file"
            )
        entries[tensor] = entry
    return Norms(path, sha256_of(Path(path)), about, entries)
