"""Quantized checkpoints, read as bfloat16: the values are those of transformers, bit for bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import digests, read_tensor, save_tiny
from quantizing import BLOCK, FP8, MXFP4, edit, fp8, to_fp8, to_mxfp4
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lowmem_wanda import check, evaluate, imatrix, plan, prune
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.reader import read_header
from lowmem_wanda.errors import CheckpointError
from lowmem_wanda.streaming.parts import slice_of


def by_transformers(tensors):
    """What transformers makes of quantized tensors."""
    made = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            scales = tensors[f"{name}_scale_inv"]
            made[name] = Fp8Dequantize(None)._dequantize_one(tensor, scales, torch.bfloat16)
        elif name.endswith("_blocks"):
            made[name[:-7]] = convert_moe_packed_tensors(tensor, tensors[f"{name[:-7]}_scales"]).contiguous()
        elif not name.endswith(("_scale_inv", "_scales")):
            made[name] = tensor
    return made


KINDS = {
    "fp8": ("deepseek_v3", to_fp8, FP8, {"kv_lora_rank": 8}),
    "mxfp4": ("gpt_oss", to_mxfp4, MXFP4, {"intermediate_size": 64, "hidden_size": 32}),
}


@pytest.fixture(scope="module", params=KINDS)
def sources(request, tmp_path_factory):
    """A quantized checkpoint, and the one in bfloat16 that transformers makes of it."""
    family, change, config, sizes = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "quantized", family, torch.bfloat16, **sizes)
    edit(folder / "quantized", change, {"quantization_config": config})
    shutil.copytree(folder / "quantized", folder / "bf16")
    edit(folder / "bf16", by_transformers, {"quantization_config": None})
    return folder / "quantized", folder / "bf16"


def test_values_are_those_of_transformers(sources):
    quantized, reference = sources
    made, expected = Checkpoint(quantized, dequantize=True), Checkpoint(reference)
    assert made.dequantized and made.tensors.keys() == expected.tensors.keys()
    for name, tensor in made.tensors.items():
        assert read_tensor(tensor).equal(read_tensor(expected.tensors[name])), name


def test_transformers_loads_the_same(sources):
    quantized, reference = sources
    loaded = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16).state_dict()
    if "quantization_config" in json.loads((quantized / "config.json").read_text()):
        from transformers import FineGrainedFP8Config, Mxfp4Config

        kind = json.loads((quantized / "config.json").read_text())["quantization_config"]["quant_method"]
        asked = FineGrainedFP8Config(dequantize=True) if kind == "fp8" else Mxfp4Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16, quantization_config=asked)
        for name, value in model.state_dict().items():
            assert value.equal(loaded[name]), name


def test_all_numbers_and_scales(tmp_path):
    numbers = torch.arange(256, dtype=torch.uint8)
    eight = numbers.view(torch.float8_e4m3fn).view(16, 16).repeat(1, 2)
    grid = torch.tensor([[0.37, 3e-5]])
    four = numbers.view(1, 16, 1, 16).repeat(1, 1, 14, 1)
    powers = torch.arange(16 * 14, dtype=torch.uint8).view(1, 16, 14) + 16
    of_fp8, of_fp4 = {"a": eight, "a_scale_inv": grid}, {"b_blocks": four, "b_scales": powers}
    for kind, name, tensors in ((FP8, "a", of_fp8), (MXFP4, "b", of_fp4)):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": kind}))
        made = read_tensor(Checkpoint(tmp_path, dequantize=True).tensors[name])
        expected = by_transformers(tensors)[name]
        assert made.isnan().equal(expected.isnan())
        assert made.nan_to_num().view(torch.int16).equal(expected.nan_to_num().view(torch.int16))


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_blocks_may_be_cut_off_at_the_end(tmp_path, scales):
    weight, grid = fp8(torch.randn(40, 25, generator=torch.Generator().manual_seed(0)), scales)
    save_file({"x": weight, "x_scale_inv": grid}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    each = grid.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:40, :25]
    made = Checkpoint(tmp_path, dequantize=True).tensors["x"]
    assert read_tensor(made).equal((weight.float() * each).bfloat16())


def test_parts_are_parts_of_the_whole(sources):
    for tensor in Checkpoint(sources[0], dequantize=True).tensors.values():
        whole = b"".join(tensor.pieces())
        assert whole == b"".join(tensor.pieces(7)) and {len(piece) for piece in tensor.pieces(7)} <= {7, len(whole) % 7}
        assert b"".join(tensor.pieces(spans=[(1, 6), (2, 8)])) == whole[1:6] + whole[2:8]
        rows = tensor.shape[0]
        part = slice_of(tensor, rows // 2, rows)
        assert b"".join(part.pieces()) == whole[len(whole) // rows * (rows // 2) :]


@pytest.mark.parametrize("way", [{}, {"statistics": "sequential"}, {"method": "magnitude"}], ids=str)
def test_pruned_as_the_bf16_checkpoint(sources, token_file, tmp_path, way):
    quantized, reference = sources
    report = prune(quantized, tmp_path / "out", text=[token_file], dequantize=True, **way)
    prune(reference, tmp_path / "expected", text=[token_file], **way)
    made, expected = digests(tmp_path / "out"), digests(tmp_path / "expected")
    assert {name: made[name] for name in made if "model" in name} == {
        name: expected[name] for name in expected if "model" in name
    }
    assert report["arguments"]["dequantize"] is True
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    found = check(tmp_path / "out", against=quantized)
    assert not found.problems and found.masked
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert prune(quantized, tmp_path / "out", text=[token_file], dequantize=True, **way) == report  # finished


def test_every_command_takes_it(sources, token_file, tmp_path):
    quantized, reference = sources
    settings = {"text": [token_file], "length": 16}
    one, other = (evaluate(path, **settings, dequantize=True)["perplexity"] for path in sources)
    assert one == other
    imatrix(quantized, tmp_path / "one.gguf", **settings, dequantize=True)
    imatrix(reference, tmp_path / "other.gguf", **settings)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
    assert plan(quantized, **settings, dequantize=True).disk > sum(one.nbytes for one in shards(reference).values())


def shards(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in read_header(file).items()}


def test_without_the_flag_it_is_named(sources):
    with pytest.raises(CheckpointError, match=r"quantization_config says (fp8|mxfp4); give --dequantize to read"):
        plan(sources[0])


@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq", "awq"])
def test_other_kinds_are_refused(source, tmp_path, kind):
    shutil.copytree(source, tmp_path / "x")
    content = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": kind}}
    (tmp_path / "x/config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{kind}; --dequantize reads fp8 .*get or make the bf16 checkpoint"):
        plan(tmp_path / "x", dequantize=True)
    with pytest.raises(CheckpointError, match=f"says {kind}; prune the unquantized"):
        plan(tmp_path / "x")


def test_what_has_no_scales_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "x")
    edit(tmp_path / "x", lambda tensors: {k: v for k, v in to_fp8(tensors).items() if "up_proj.weight_s" not in k}, {})
    edit(tmp_path / "x", dict, {"quantization_config": FP8})
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight is F8_E4M3, and no tensor .*up_proj.weight_scale_inv has"
    ):
        plan(tmp_path / "x", dequantize=True)
    edit(tmp_path / "x", dict, {"quantization_config": "fp8"})
    with pytest.raises(CheckpointError, match=r"not a scale for each block \(None\)"):
        plan(tmp_path / "x", dequantize=True)


def test_what_has_two_meanings_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    source = edit(save_tiny(tmp_path / "fp8", "qwen3_moe"), to_fp8, {"quantization_config": FP8})
    edit(source, lambda tensors: {one: t.bfloat16() if one == name else t for one, t in tensors.items()}, {})
    with pytest.raises(CheckpointError, match=f"tensor {name} is BF16, and {name}_scale_inv has scales for it"):
        Checkpoint(source, dequantize=True)
    source = edit(save_tiny(tmp_path / "fp4", "gpt_oss"), to_mxfp4, {"quantization_config": MXFP4})
    stack = "model.layers.0.mlp.experts.down_proj"
    edit(source, lambda tensors: tensors | ({stack: torch.zeros(2)} if f"{stack}_blocks" in tensors else {}), {})
    with pytest.raises(CheckpointError, match=f"tensor {stack} stands beside its own blocks"):
        Checkpoint(source, dequantize=True)


def test_scales_of_another_grid_are_refused(tmp_path):
    weight, grid = fp8(torch.randn(32, 32))
    save_file({"x": weight, "x_scale_inv": grid[:1]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    with pytest.raises(
        CheckpointError, match=r"x_scale_inv is F32 \[1, 2\], not a scale for each block \(\[16, 16\]\)"
    ):
        Checkpoint(tmp_path, dequantize=True)


def test_an_unquantized_checkpoint_is_what_it_is(source):
    assert not Checkpoint(source, dequantize=True).dequantized
    assert np.all([type(one).__name__ == "Tensor" for one in Checkpoint(source, dequantize=True).tensors.values()])
