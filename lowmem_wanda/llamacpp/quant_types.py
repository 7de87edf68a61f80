"""What quantization of a GGUF makes of pruned weights: a rule for every type, and advice.

Measured with llama.cpp's own quantization (benchmarks/quants.py; MXFP4 with the gguf package's, NVFP4 by its grid): a
type keeps every zero where its grid has one in the same place in every block; an offset moves it, and a codebook may
have none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

KEEPS, OFFSET, CODEBOOK = "keeps", "offset", "codebook"
RULES = {KEEPS: "zeros stay", OFFSET: "an offset moves zeros", CODEBOOK: "no zero in codebook"}
RUINED = ("IQ2_S", "IQ2_XS", "IQ2_XXS")  # codebooks that make all or most zeros positive
WEIGHED = ("IQ3_S", "IQ3_XXS")  # and those where an importance matrix keeps them small


@dataclass(frozen=True)
class Type:
    """`bits` per weight, scales included; `grid` one of RULES."""

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


def advice(types: Sequence[Mapping[str, Any]] = (), tiny: bool = False) -> list[str]:
    """What to do; first of all about the types that a GGUF has. `tiny`: pruned weights were given random signs."""
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
class Remains:
    """Sums over the weights of one or many tensors.

    `pruned` weights, of which `zero` are still exactly zero and `signed` have their sign; squares of what they became
    and of the weights that were kept, and of these, weighted by the importance matrix, the squares and those of the
    errors.
    """

    pruned: int = 0
    zero: int = 0
    signed: int = 0
    kept: int = 0
    leaked: float = 0.0
    kept_squares: float = 0.0
    squares: float = 0.0
    errors: float = 0.0

    def add(self, weight: np.ndarray, gone: np.ndarray, stored: np.ndarray, importance: np.ndarray) -> None:
        """Rows of the checkpoint, which of their weights are pruned, the same rows dequantized, all (rows, columns);
        and what errors in each column weigh (columns,) or all alike (1,)."""
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

    def merge(self, other: "Remains") -> None:
        for name in (field.name for field in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, Any]:
        """Shares: of the pruned weights that are `zero`, or have their `signs`; `leak`, their size (root mean square)
        beside that of the kept ones; `error` of the kept ones relative to them."""
        leak = (self.leaked / max(1, self.pruned)) / max(self.kept_squares / max(1, self.kept), 1e-300)
        return {
            "pruned": self.pruned,
            "zero": self.zero / max(1, self.pruned),
            "signs": self.signed / max(1, self.pruned),
            "leak": leak**0.5,
            "error": (self.errors / max(self.squares, 1e-300)) ** 0.5,
        }
