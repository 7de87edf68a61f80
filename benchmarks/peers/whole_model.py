"""Wanda 2:4 of a whole Llama in memory, plainly: `python whole_model.py SOURCE TOKENS.npy TARGET`.

This is the yardstick of speed.py. It does what the paper's code (locuslab/wanda, `prune_wanda`) does, in float32 and
without our package. Each block is run twice, one sequence at a time: dense to be measured, and pruned to move the
hidden states on. Its statistic is the running mean over sequences. The mask is a stable sort of all groups at once,
where the paper's code takes a top-k of each four columns in a Python loop.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM


class MeanSquare:
    """||X_j||_2^2 of each input channel, as the mean over sequences (`WrappedGPT` of the paper's code)."""

    def __init__(self, columns: int) -> None:
        self.scaler_row, self.sequences = torch.zeros(columns), 0

    def add(self, inputs: torch.Tensor) -> None:
        """Adds inputs (sequences, length, columns)."""
        added = len(inputs)
        self.scaler_row *= self.sequences / (self.sequences + added)
        self.sequences += added
        self.scaler_row += torch.norm(inputs.flatten(0, 1), p=2, dim=0) ** 2 / self.sequences


def prune_2_4(weight: torch.Tensor, scaler_row: torch.Tensor) -> None:
    """Zeros the two lowest |W_ij| * ||X_j||_2 of each four inputs, in place."""
    metric = weight.abs() * scaler_row.sqrt()
    lowest = metric.reshape(-1, 4).sort(dim=1, stable=True).indices[:, :2]
    mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, lowest, True)
    weight[mask.reshape(weight.shape)] = 0


@contextmanager
def measuring(block: nn.Module) -> Iterator[dict[nn.Linear, MeanSquare]]:
    """Gives {linear of the block: the statistic of its inputs within the context}."""
    found = {module: MeanSquare(module.in_features) for module in block.modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(lambda module, given: found[module].add(given[0])) for module in found]
    yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def prune(model: nn.Module, tokens: torch.Tensor) -> None:
    """Prunes all blocks in order, on tokens (sequences, length)."""
    decoder = model.model
    hidden = decoder.embed_tokens(tokens)
    rotary = decoder.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])

    def run(block: nn.Module) -> list[torch.Tensor]:
        return [block(part, position_embeddings=rotary) for part in hidden.split(1)]  # without a mask: causal

    for block in decoder.layers:
        with measuring(block) as found:
            run(block)
        for linear, inputs in found.items():
            prune_2_4(linear.weight, inputs.scaler_row)
        hidden = torch.cat(run(block))


def main(source: str, tokens: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    prune(model, torch.from_numpy(np.load(tokens)))
    model.to(torch.bfloat16).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
