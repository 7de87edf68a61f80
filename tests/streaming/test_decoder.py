"""Streamed == whole model, bit for bit, and pruned == a straightforward whole-model Wanda."""

import numpy as np
import pytest
import torch
from helpers import EXPERTS, FAMILIES, opened
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowmem_wanda import prune
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.streaming.head import Head
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import advance, streamed
from lowmem_wanda.streaming.workload import Workload

BATCH = 4  # does not divide the six sequences


def whole_model_wanda(model, blocks, tokens, kept=2, of=4):
    """The paper's procedure on a model in memory: dense block measured, pruned block fed on."""
    inputs, outputs, sums = {}, {}, {}
    for block in blocks:
        linears = {
            name: module for name, module in block.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))
        }
        for module in linears.values():
            sums[module] = 0
            hook = module.register_forward_pre_hook(
                lambda module, given: sums.__setitem__(
                    module, sums[module] + given[0].reshape(-1, given[0].shape[-1]).double().square().sum(0)
                )
            )
            inputs[module] = hook
        for start in range(0, len(tokens), BATCH):
            model(tokens[start : start + BATCH], use_cache=False)
        for module in linears.values():
            inputs[module].remove()
            weight = module.weight.data if isinstance(module, torch.nn.Linear) else module.weight.data.t()
            score = (weight.abs() * sums[module].sqrt().float()).reshape(-1, of)
            order = torch.sort(score, dim=1, stable=True).indices[:, : of - kept]
            mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True).reshape(weight.shape)
            weight[mask] = 0
    return outputs


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_streamed_logits_are_the_whole_models(tiny, token_file, family):
    path, tokens = tiny(family), np.load(token_file)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    streamed_model = opened(path, batch=BATCH)
    placement, _ = choose(Workload((streamed_model,), *tokens.shape))
    with streamed(streamed_model, batches=in_batches(tokens, BATCH), placement=placement) as stream:
        stream.walk(advance)
        (decoder,), (parts,) = stream.decoders, stream.states
        head = Head(decoder, 1 << 20)
        head.load(slice(0, head.rows))
        for ids, part in zip(in_batches(tokens, BATCH), parts, strict=True):
            expected = model(torch.from_numpy(ids), use_cache=False).logits
            assert torch.equal(decoder.finish(part).view_as(expected), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_weights_are_a_whole_model_wandas(tiny, token_file, tmp_path, family):
    path = tiny(family)
    prune(path, tmp_path / "out", text=[str(token_file)], batch=BATCH)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    blocks = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    with torch.no_grad():
        whole_model_wanda(model, blocks, torch.from_numpy(np.load(token_file)))
    expected = model.state_dict()
    for name, weight in pruned.state_dict().items():
        assert torch.equal(weight, expected[name]), name
