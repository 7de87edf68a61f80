"""Models are built without memory for their weights."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

LARGE = 1 << 26  # values; no buffer has so many
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand)
BUILDING = threading.Lock()  # `init_empty_weights` changes torch's modules for all threads meanwhile


@contextmanager
def without_memory() -> Iterator[None]:
    """Has parameters of models that are built within the context lie on `meta`; buffers have their values."""
    with BUILDING, init_empty_weights(), _LargeOnMeta():
        yield


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on `meta` at once.

    `init_empty_weights` moves parameters there when they exist, and many systems refuse an allocation that is larger
    than their memory, though it would never be touched: a layer of experts of Kimi-K2 has 23 GB in one parameter.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None and _values(args, kwargs) >= LARGE:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _values(args: Any, kwargs: Any) -> int:
    """The number of values of a tensor that is made with these arguments."""
    size = kwargs.get("size", args)
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        size = size[0]
    return math.prod(size) if all(isinstance(side, int) for side in size) else 0
