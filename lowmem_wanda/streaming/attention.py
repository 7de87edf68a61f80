"""What attention is computed of: queries, keys and values, watched while a block runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Again = Callable[[torch.Tensor], torch.Tensor]  # other values (sequences, heads, length, width) -> what attention gives
Attended = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, Again], None]  # module, query, key, value


@contextmanager
def attention_watched(arrived: Attended) -> Iterator[None]:
    """Calls `arrived` before each attention that a model computes through transformers' table of functions.

    Attention that a model computes by its own code ("eager") is not seen.
    """
    before = {name: function for name, function in ALL_ATTENTION_FUNCTIONS.items() if name == "sdpa"}
    overridden = "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping

    def watching(function: Any) -> Any:
        def watched(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
        ) -> Any:
            arrived(module, query, key, value, lambda other: function(module, query, key, other, *rest, **named)[0])
            return function(module, query, key, value, *rest, **named)

        return watched

    for name, function in before.items():
        ALL_ATTENTION_FUNCTIONS[name] = watching(function)
    try:
        yield
    finally:
        for name, function in before.items():
            if overridden:
                ALL_ATTENTION_FUNCTIONS[name] = function
            else:
                del ALL_ATTENTION_FUNCTIONS[name]
