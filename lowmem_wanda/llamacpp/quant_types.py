"""How each quantization type of a GGUF treats pruned weights: a rule for every type, figures, and advice.

The rules were measured with llama.cpp's own quantization (benchmarks/quants.py). MXFP4 was measured with the gguf
package's quantization, and the rule of NVFP4 follows from its grid. A type keeps every zero if its grid has a zero in
the same place in every block. An offset moves zeros, and a codebook may lack a zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

KEEPS, OFFSET, CODEBOOK = "keeps", "offset", "codebook"
RUINED = ("IQ2_S", "IQ2_XS", "IQ2_XXS")  # codebooks that make all or most zeros positive
WEIGHED = ("IQ3_S", "IQ3_XXS")  # codebooks in which an importance matrix keeps what becomes of zeros small


@dataclass(frozen=True)
class Type:
    """A type of a GGUF: its `bits` per weight, scales included, and its `grid`, which is KEEPS, OFFSET or CODEBOOK."""

    bits: float
    grid: str


TYPES = {
    "F32": Type(32, KEEPS), "BF16": Type(16, KEEPS), "F16": Type(16, KEEPS), "Q8_0": Type(8.5, KEEPS),
    "Q6_K": Type(6.5625, KEEPS), "Q5_1": Type(6, OFFSET), "Q5_K": Type(5.5, OFFSET), "Q5_0": Type(5.5, KEEPS),
    "Q4_1": Type(5, OFFSET), "Q4_K": Type(4.5, OFFSET), "Q4_0": Type(4.5, KEEPS), "IQ4_NL": Type(4.5, CODEBOOK),
    "NVFP4": Type(4.5, KEEPS), "IQ4_XS": Type(4.25, CODEBOOK), "MXFP4": Type(4.25, KEEPS),
    "Q3_K": Type(3.4375, KEEPS), "IQ3_S": Type(3.4375, CODEBOOK), "IQ3_XXS": Type(3.0625, CODEBOOK),
    "Q2_K": Type(2.625, OFFSET), "IQ2_S": Type(2.5625, CODEBOOK), "IQ2_XS": Type(2.3125, CODEBOOK),
    "IQ2_XXS": Type(2.0625, CODEBOOK), "TQ2_0": Type(2.0625, KEEPS), "IQ1_M": Type(1.75, CODEBOOK),
    "TQ1_0": Type(1.6875, KEEPS), "IQ1_S": Type(1.5625, CODEBOOK),
}  # fmt: skip
ADVICE = (
    "Quantize a pruned model to Q8_0, Q6_K, Q5_K, Q4_K or Q3_K: they cost it about what they cost the dense model.",
    "Not to IQ2: zeros become weights of one sign there, which ruins the model; nor to IQ3 without the pruned model's "
    "own importance matrix (--imatrix).",
    "For IQ2, or IQ3 without a matrix, prune with --zeros signed-tiny, and convert with --outtype bf16 or f32.",
    "Zeros make no GGUF smaller or faster, and a dense model at fewer bits can be better than a pruned one at more.",
)
SIGNED = "convert with --outtype bf16 or f32, and quantize that."


NO_ZEROS = "It was made smaller without zeros, so there are none to lose: the errors are those of quantization alone."
ROUTER = "ffn_gate_inp"  # in llama.cpp's names of routers, which are not quantized


def advice(types: Sequence[Mapping[str, Any]] = (), tiny: bool = False) -> list[str]:
    """Sentences that say how to quantize a pruned model; those about the `types` of a given GGUF come first.

    `tiny` says that pruned weights have the smallest normal magnitude and random signs instead of being zero.
    """
    first = []
    for one in types:
        what = f"{one['linears']} linears are {one['type']}"
        if one["type"] in RUINED + WEIGHED and tiny and one["signs"] < 0.9:
            first.append(f"{what}, in which the signs of pruned weights are lost: {SIGNED}")
        elif one["type"] in RUINED and not tiny:
            first.append(f"{what}, whose zeros became weights of one sign: quantize again.")
        elif one["type"] in WEIGHED and not tiny:
            first.append(f"{what}: good only if it was made with the pruned model's own importance matrix.")
    if types and all(one["zero"] == 1 for one in types):
        lost = f", so that an IQ2 or IQ3 of it would be ruined: {SIGNED}" if tiny else "."
        first = [f"Every pruned weight is zero in this GGUF{lost}"]
    return [*first, *((ADVICE[0], f"For IQ2, or IQ3 without a matrix, {SIGNED}", ADVICE[-1]) if tiny else ADVICE)]


@dataclass
class Survival:
    """Sums over the weights of one or more tensors, from which the figures of a quantization are computed."""

    pruned: int = 0  # number of weights that are pruned in the checkpoint
    zero: int = 0  # number of pruned weights that are exactly zero in the GGUF
    signed: int = 0  # number of pruned weights that have the same sign in the GGUF as in the checkpoint
    kept: int = 0  # number of weights that are kept in the checkpoint
    leaked: float = 0.0  # sum of the squares that pruned weights have in the GGUF
    kept_squares: float = 0.0  # sum of the squares of kept weights
    squares: float = 0.0  # sum of the squares of kept weights, weighted by the importance matrix
    errors: float = 0.0  # sum of the squares of kept weights' errors, weighted by the importance matrix

    def add(self, weight: np.ndarray, gone: np.ndarray, stored: np.ndarray, importance: np.ndarray) -> None:
        """Adds some rows of the checkpoint, `weight`, and the same rows dequantized, `stored`, both (rows, columns).

        `gone` is the mask of the pruned weights. `importance` is the factor of errors in each column, (columns,), or
        (1,) if all columns have the same.
        """
        left = ~gone
        self.pruned += int(gone.sum())
        self.zero += int((gone & (stored == 0)).sum())
        self.signed += int((gone & (np.sign(stored) == np.sign(weight))).sum())
        self.kept += int(left.sum())
        self.leaked += float(np.square(stored, where=gone, out=np.zeros_like(stored)).sum(dtype=np.float64))
        squares = np.where(left, weight, 0) ** 2
        self.kept_squares += float(squares.sum(dtype=np.float64))
        self.squares += float((squares.sum(axis=0, dtype=np.float64) * importance).sum())
        errors = np.where(left, weight - stored, 0) ** 2
        self.errors += float((errors.sum(axis=0, dtype=np.float64) * importance).sum())

    def merge(self, other: "Survival") -> None:
        """Adds the sums of another."""
        for name in (field.name for field in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, Any]:
        """The figures: how many weights are `pruned`, which share of these is `zero`, and which keeps its `signs`.

        `leak` is the root mean square of the pruned weights in the GGUF, divided by that of the kept weights. `error`
        is the root mean square of the kept weights' errors, divided by that of the kept weights; the importance matrix
        weighs both.
        """
        leak = (self.leaked / max(1, self.pruned)) / max(self.kept_squares / max(1, self.kept), 1e-300)
        return {
            "pruned": self.pruned,
            "zero": self.zero / max(1, self.pruned),
            "signs": self.signed / max(1, self.pruned),
            "leak": leak**0.5,
            "error": (self.errors / max(self.squares, 1e-300)) ** 0.5,
        }
