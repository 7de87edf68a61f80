"""Statistics of a matrix's inputs, summed up while the calibration sequences are computed."""

import numpy as np
import torch

from lowmem_wanda.errors import NonFiniteError

PIECE = 1 << 18  # inputs that are squared at a time on a CPU: at most 1 MiB, which malloc keeps and uses again


class SquaredNorm:
    """The sum of squares of each input channel of a matrix, and the number of tokens in this sum.

    The root of a sum is ||X_j||_2 of Wanda (arXiv 2306.11695, eq. 1). The paper's code keeps a running mean over
    *sequences* instead. The two differ by one constant per matrix, so they rank weights alike.

    `sums` is (columns,), float64 or on MPS float32; `tokens` is the number of tokens.

    Args:
        columns: the number of input channels.
        device: where the sums are kept.

    Raises:
        NumberError: `norms` was called and an input was NaN or infinite.

    Example:
        >>> import torch
        >>> from lowmem_wanda import SquaredNorm
        >>> inputs = SquaredNorm(2, torch.device("cpu"))
        >>> inputs.add(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))  # two tokens
        >>> inputs.norms()
        tensor([5., 1.])
    """

    def __init__(self, columns: int, device: torch.device | str) -> None:
        device = torch.device(device)
        # sums of float32 over some tokens are added up in float64, which MPS lacks
        precision = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(columns, dtype=precision, device=device)
        self.tokens = 0

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """The bytes that the sums of `columns` input channels take."""
        return 8 * columns

    @classmethod
    def known(cls, sums: np.ndarray, tokens: int, device: torch.device) -> "SquaredNorm":
        """A statistic with `sums` (columns,) over `tokens` tokens that were measured elsewhere."""
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
        """||X_j||_2 of each input channel, float32 (columns,). Raises NumberError if one is NaN or infinite."""
        norms = self.sums.sqrt().float()
        if not bool(torch.isfinite(norms).all()):
            raise NonFiniteError("the inputs measured for it hold NaN or infinity")
        return norms
