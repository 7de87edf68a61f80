"""Norms of the dense model's inputs, taken from a published importance matrix; pruning then needs no forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.errors import CalibrationError
from lowmem_wanda.llamacpp.imatrix import About, Entry, read
from lowmem_wanda.llamacpp.names import entries_for, expert_in
from lowmem_wanda.sparsity.statistics import SquaredNorm


@dataclass(frozen=True)
class Norms:
    """The norms of the inputs of all matrices to prune, from an importance matrix.

    `entries` are by the matrices' names, of one expert each; `about` says what they were computed on. `sha256` is that
    of the file.
    """

    path: str
    sha256: str
    about: About
    entries: Mapping[str, Entry]

    def __str__(self) -> str:
        about = self.about
        measured = f", {about.chunks} sequences of {about.length} tokens" if about.length else ""
        return f"{self.path}{measured} of {', '.join(about.datasets) or 'unknown text'}"

    def inputs(self, name: str, device: torch.device) -> SquaredNorm:
        """The statistic of a matrix's inputs, as if it had been measured on the device.

        That of an expert which saw no token has the same norm for every input.
        """
        entry = self.entries[name]
        sums = entry.sums[0] if entry.counts[0] else np.ones(entry.sums.shape[1])
        return SquaredNorm.known(sums, int(entry.counts[0]), device)

    def notes(self, name: str) -> dict[str, Any]:
        """What the record of a matrix says of what it is scored by; {} of one that is no expert's."""
        if (expert := expert_in(name)) is None:
            return {}
        tokens = int(self.entries[name].counts[0])
        return {"expert": expert, "tokens": tokens, **({} if tokens else {"scored_by": "magnitude"})}


def load_norms(path: str, names: Mapping[str, str], columns: Mapping[str, int]) -> Norms:
    """The norms for matrices, {matrix: inputs} in `columns`, whose GGUF names are in `names`.

    Raises CalibrationError, which names the entry, if an entry is missing, has another size, was measured on no token,
    or does not hold sums of squares.
    """
    found, about = read(path)
    entries = {}
    for tensor, inputs in columns.items():
        entry = next((found[name] for name in entries_for(names[tensor]) if name in found), None)
        if entry is None and names[tensor].replace("kv_b", "v_b") in found:
            raise CalibrationError(
                f"{path}: llama.cpp splits tensor {tensor} in two and measures each part on other inputs than the "
                "tensor's own, so its norms are not known: --exclude it"
            )
        if entry is None:
            raise CalibrationError(
                f"{path}: has no entry {names[tensor]}, which tensor {tensor} needs: get the importance matrix of "
                "this very model, or --exclude it"
            )
        expert = expert_in(tensor)
        held, width = entry.sums.shape
        if width != inputs or (held != 1 if expert is None else held <= expert):
            raise CalibrationError(
                f"{path}: entry {names[tensor]} has {entry.sums.size} values, tensor {tensor} has {inputs} inputs: "
                "get the importance matrix of this very model"
            )
        if expert is not None:
            entry = Entry(entry.sums[expert : expert + 1], entry.counts[expert : expert + 1])
        elif entry.counts[0] < 1:
            raise CalibrationError(f"{path}: entry {names[tensor]} was measured on no token: get another one")
        if not entry.is_sound:
            raise CalibrationError(
                f"{path}: entry {names[tensor]} holds numbers that are not sums of squares: get another file"
            )
        entries[tensor] = entry
    return Norms(path, sha256_of(Path(path)), about, entries)
