"""On a GPU: the same result wherever hidden states and blocks lie, peaks within their caps, masks of both routes."""

import pytest
import torch
from helpers import save_tiny

from lowmem_wanda import prune
from lowmem_wanda.sparsity import masks
from lowmem_wanda.sparsity.methods import wanda
from lowmem_wanda.sparsity.patterns import parse
from lowmem_wanda.sparsity.statistics import SquaredNorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


@pytest.mark.parametrize("statistics", ["block", "dense", "sequential"])
def test_no_layout_changes_a_bit(token_file, tmp_path, statistics):
    source = save_tiny(tmp_path / "source", "llama", torch.bfloat16)
    expected = None
    for number, limits in enumerate(
        [{}, {"states": "host"}, {"states": "file", "slots": 1}, {"slots": 2, "held": 1, "read": "mmap"}]
    ):
        out = tmp_path / str(number)
        settings = {"text": [str(token_file)], "batch": 4, "statistics": statistics, "device": "cuda"}
        report = prune(source, out, **limits, **settings)
        bytes_ = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
        expected = expected or bytes_
        assert bytes_ == expected
        assert {"upload", "download"} <= report["timing"]["parts"].keys()


def test_the_measured_peak_is_within_the_cap(token_file, tmp_path):
    source = save_tiny(tmp_path / "source", "llama", torch.bfloat16)
    limits = {"max_vram": 400_000_000}
    report = prune(source, tmp_path / "out", text=[str(token_file)], device="cuda", **limits)
    assert 0 < report["peak_memory"]["device_measured"] <= 400_000_000
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["2:4", "4:8", "50%"])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_pass_and_chunks_give_the_same_bits(monkeypatch, dtype, text, transposed):
    torch.manual_seed(0)
    weight = (torch.randn(256, 688, device="cuda") * 4).round().to(dtype)
    inputs = SquaredNorm(688, weight.device)
    inputs.add(torch.randn(64, 688, device="cuda"))
    weights = [weight.clone(), weight.t().contiguous().t() if transposed else weight.clone()]
    masks.prune_lowest(weights[1], wanda(weights[1], inputs), parse(text))
    monkeypatch.setattr(masks, "triton_kernels", lambda: None)
    masks.prune_lowest(weights[0], wanda(weights[0], inputs), parse(text))
    assert torch.equal(weights[0], weights[1])
