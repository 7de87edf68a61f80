"""Who is to blame for a NaN: a tensor of the file, or the computing."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from lowmem_wanda.checkpoint.reader import Tensor, nonfinite
from lowmem_wanda.errors import ModelError, NonFiniteError, NumberError
from lowmem_wanda.streaming.model import StreamedModel


@contextmanager
def blamed(model: StreamedModel, index: int | None = None) -> Iterator[None]:
    """Names the tensor of the file that holds NaN or infinity, where that is why a number is not finite.

    Looked at is what lies outside the blocks, and the blocks up to `index` (default: all). Where all of it is finite,
    the error says what else may help. Raises NumberError.
    """
    try:
        yield
    except NonFiniteError as error:
        last = model.depth - 1 if index is None else index
        _blame(model, last)
        move = "try another text" if model.dtype in (torch.float32, torch.float64) else "try --dtype float32"
        raise NumberError(f"{error}, though all tensors are finite: {move}") from None


def require_known(model: StreamedModel, values: Iterable[torch.Tensor]) -> None:
    """Raises NumberError or ModelError where what the first block is called with is NaN.

    Either a tensor of the file is, or the model computes with a weight whose module it does not call, which is not
    loaded.
    """
    if any(value.is_floating_point() and bool(value.isnan().any()) for value in values):
        _blame(model, -1)
        raise ModelError(
            f"{type(model.skeleton.model).__name__}: computes with a weight outside its blocks without a call of its "
            "module, which is not supported yet"
        )


def _blame(model: StreamedModel, last: int) -> None:
    """Raises NumberError where a tensor that the model computes with, up to the block `last`, is not finite."""
    for tensor in _used(model, last):
        if any(nonfinite(piece, tensor.dtype) for piece in tensor.pieces()):
            raise NumberError(
                f"{tensor.file.name}: tensor {tensor.name} holds NaN or infinity; download it again"
            ) from None


def _used(model: StreamedModel, last: int) -> Iterator[Tensor]:
    """Yields the file tensors that the model computes with, up to the block `last`."""
    for name in dict.fromkeys(name for view in model.skeleton.outside().values() for name in view.tensors):
        yield model.checkpoint.tensors[name]
    for index in range(last + 1):
        yield from model.block_tensors(index)
