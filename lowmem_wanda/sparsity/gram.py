"""The Gram matrix of a matrix's inputs, for methods that know how inputs go together."""

from collections.abc import Callable
from typing import Any

import torch

from lowmem_wanda.sparsity.selection import row_chunks
from lowmem_wanda.sparsity.statistics import SquaredNorm

TILE = 512  # columns of the triangle that are computed at a time
CHUNK = 1 << 22  # weights whose error is measured at a time
PIECE = 1 << 24  # inputs that are multiplied at a time; sums depend on it, so it is the same everywhere


class Gram(SquaredNorm):
    """X^T X of a matrix's inputs X (tokens, columns), and the sums of squares of `SquaredNorm`, which are its diagonal.

    Products are float32 and added up in float32: with float64, perplexities after `sparsegpt` and `least_squares` are
    the same within 0.1 % (two small models, 2:4). Only the tiles of the lower triangle are computed.

    Args:
        columns: the number of input channels.
        device: where the sums are kept.

    Example:
        >>> import torch
        >>> from lowmem_wanda import Gram
        >>> inputs = Gram(2, torch.device("cpu"))
        >>> inputs.add(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))  # two tokens
        >>> inputs.matrix()
        tensor([[25.,  3.],
                [ 3.,  1.]])
    """

    def __init__(self, columns: int, device: torch.device | str) -> None:
        super().__init__(columns, device)
        self._products = torch.zeros(columns, columns, device=device)
        self._whole = False
        self._made: dict[str, Any] = {}

    @classmethod
    def nbytes(cls, columns: int) -> int:
        """The bytes that the statistic of `columns` input channels takes."""
        return super().nbytes(columns) + 4 * columns * columns

    def add(self, inputs: torch.Tensor) -> None:
        """Adds inputs (..., columns) of any float dtype."""
        super().add(inputs)
        inputs, columns = inputs.reshape(-1, inputs.shape[-1]), inputs.shape[-1]
        for piece in inputs.split(max(1, PIECE // columns)):
            piece = piece.float()
            for start in range(0, columns, TILE):
                tile = self._products[start:, start : start + TILE]
                tile.addmm_(piece[:, start:].t(), piece[:, start : start + TILE])
        self._whole = False

    def matrix(self) -> torch.Tensor:
        """X^T X, float32 (columns, columns), symmetric; it is the statistic's own memory. Raises NumberError."""
        if not self._whole:
            self.norms()  # which are not finite where an input is not
            for start in range(0, len(self._products), TILE):
                stop = start + TILE
                corner = self._products[start:stop, start:stop]  # whose two halves differ in last bits on some CPUs
                corner.copy_(corner.tril() + corner.tril(-1).t())
                self._products[start:stop, stop:] = self._products[stop:, start:stop].t()
            self._whole = True
        return self._products

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes of the statistic, which is kept under a `name` for the other matrices of these inputs."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def error(self, weight: torch.Tensor, dense: torch.Tensor) -> float:
        """||(W - W0) X^T||^2 / ||W0 X^T||^2 for weights (rows, columns): the share of the output that is lost."""
        products, lost, whole = self.matrix(), 0.0, 0.0
        for rows in row_chunks(len(weight), weight.shape[1], CHUNK):
            before = dense[rows].float()
            difference = weight[rows].float() - before
            lost += float((difference @ products).mul_(difference).sum())
            whole += float((before @ products).mul_(before).sum())
        return max(0.0, lost) / whole if whole > 0 else 0.0
