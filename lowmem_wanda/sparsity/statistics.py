"""What is remembered of a linear's inputs while the calibration sequences pass it."""

import numpy as np
import torch

from lowmem_wanda.errors import NumberError

PIECE = 1 << 18  # inputs whose squares are held at a time on a CPU: less than 1 MiB, which malloc keeps and gives again


class SquaredNorm:
    """Sum of squares per input channel, and how many tokens it is the sum of.

    Its root is ||X_j||_2 of Wanda (arXiv 2306.11695, eq. 1). The paper's code keeps a running mean over
    *sequences* instead; the two differ by one constant per linear, so they rank weights alike.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        # sums of float32 over some tokens are added up in float64 (MPS has none)
        precision = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(columns, dtype=precision, device=device)
        self.tokens = 0

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """The bytes that the sums of so many input channels take."""
        return 8 * columns

    @classmethod
    def known(cls, sums: np.ndarray, tokens: int, device: torch.device) -> "SquaredNorm":
        """One of `sums` (columns,) that were measured elsewhere."""
        made = cls(len(sums), device)
        made.sums.copy_(torch.from_numpy(np.array(sums, dtype=np.float64)).to(made.sums.dtype))
        made.tokens = tokens
        return made

    def add(self, inputs: torch.Tensor) -> None:
        """Adds inputs (..., columns) of any float dtype."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(inputs)
        if inputs.is_cpu:  # a norm down the columns takes 10 times as long as squares and their sum
            for piece in inputs.split(max(1, PIECE // inputs.shape[1])):
                self.sums += piece.to(torch.float32).square().sum(dim=0)
        else:
            self.sums += torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).to(self.sums.dtype).square_()

    def norms(self) -> torch.Tensor:
        """||X_j||_2 per input channel, float32 (columns,). Raises NumberError if one is NaN or infinite."""
        norms = self.sums.sqrt().float()
        if not bool(torch.isfinite(norms).all()):
            raise NumberError(
                "the inputs measured for it hold NaN or infinity: try --dtype float32 or other calibration text"
            )
        return norms
