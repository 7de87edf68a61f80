"""On a GPU: the same result wherever hidden states and blocks lie, peaks within their caps, masks of both routes; what is
asked of CUDA, from which thread and stream, and what is said where it cannot be had. Run all by: pytest tests/gpu"""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, save_tiny

from lowmem_wanda import evaluate, imatrix, prune
from lowmem_wanda.cli.main import main
from lowmem_wanda.evaluation import likelihood
from lowmem_wanda.llamacpp.imatrix import read
from lowmem_wanda.sparsity import masks
from lowmem_wanda.sparsity.methods.scores import wanda
from lowmem_wanda.sparsity.patterns import parse
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.buffers import _mark
from lowmem_wanda.streaming.resources import host_memory, limited

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
GPU = torch.device("cuda", 0)
LATENT = {"kv_lora_rank": 20, "q_lora_rank": 12, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 6,
          "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Blocks of 180 MB, and 64 sequences of 512 tokens."""
    path = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
    save_tiny(path, "llama", torch.bfloat16, shard="500MB", max_position_embeddings=512, head_dim=128, **sizes)
    np.save(path / "tokens.npy", np.random.default_rng(0).integers(3, 96, (64, 512)))
    return path


def shards(path):
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def ran(*words):
    """What a command puts out."""
    command = [sys.executable, "-m", "lowmem_wanda", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("statistics", ["block", "dense", "sequential"])
def test_no_layout_changes_a_bit(source, token_file, tmp_path, statistics):
    expected = None
    for number, limits in enumerate(
        [{}, {"states": "host"}, {"states": "file", "slots": 1}, {"slots": 2, "held": 1, "read": "mmap"}]
    ):
        out = tmp_path / str(number)
        settings = {"text": [str(token_file)], "batch": 4, "statistics": statistics, "device": "cuda"}
        report = prune(source, out, **limits, **settings)
        expected = expected or shards(out)
        assert shards(out) == expected
        assert {"upload", "download"} <= report["timing"]["parts"].keys()
        assert "host_not_locked" not in report["peak_memory"]


@pytest.mark.parametrize("statistics", ["block", "sequential"])
def test_a_cap_of_just_what_is_predicted_is_enough(wide, tmp_path, statistics):
    """In processes of their own: nothing that was left behind counts."""
    flags = ["--text", wide / "tokens.npy", "--sequences", 64, "--length", 512, "--statistics", statistics,
             "--device", "cuda", "--json"]  # fmt: skip
    need = json.loads(ran("plan", wide, *flags))["device_peak"]
    memory = json.loads(ran("prune", wide, tmp_path / "out", *flags, "--max-vram", f"{need}B"))["peak_memory"]
    assert 0 < memory["device_measured"] <= memory["device_reserved"] <= need


def test_an_earlier_cap_is_taken_away():
    total = torch.cuda.get_device_properties(GPU).total_memory
    with limited(GPU, 64 << 20, 1 << 20):
        pass
    with limited(GPU, None, 1 << 20):
        assert torch.empty(min(total // 4, 1 << 30), dtype=torch.uint8, device=GPU).numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["2:4", "4:8", "50%", "40:344"])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_pass_and_chunks_give_the_same_bits(monkeypatch, dtype, text, transposed):
    torch.manual_seed(0)
    weight = (torch.randn(256, 688, device="cuda") * 4).round().to(dtype)
    inputs = SquaredNorm(688, weight.device)
    inputs.add(torch.randn(64, 688, device="cuda"))
    weights = [weight.clone(), weight.t().contiguous().t() if transposed else weight.clone()]
    masks.prune_lowest(weights[1], wanda(weights[1], inputs), parse(text))
    assert masks.survey(weights[1], parse(text))[1]
    monkeypatch.setattr(masks, "triton_kernels", lambda: None)
    masks.prune_lowest(weights[0], wanda(weights[0], inputs), parse(text))
    assert torch.equal(weights[0], weights[1])


def test_heads_see_what_copies_to_the_host_wrote_though_no_clock_waits(wide, monkeypatch):
    settings = {"text": [str(wide / "tokens.npy")], "length": 512, "device": "cuda", "batch": 4}
    expected = evaluate(wide, states="device", **settings)["perplexity"]
    monkeypatch.setattr(likelihood.Clock, "seconds", lambda self: {})
    for states in ("host", "file"):
        assert evaluate(wide, states=states, **settings)["perplexity"] == expected


def test_a_gpu_and_a_cpu_agree(source, token_file, tmp_path):
    settings = {"text": [str(token_file)], "length": 16, "dtype": "float32"}
    values = [evaluate(source, device=device, **settings)["perplexity"] for device in ("cuda", "cpu")]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    for number, path in enumerate((source, save_tiny(tmp_path / "latent", "youtu", **LATENT))):
        for device in ("cuda", "cpu"):
            imatrix(path, tmp_path / f"{number}{device}.gguf", text=[str(token_file)], sequences=6, length=16,
                    dtype="float32", device=device)  # fmt: skip
        ours, theirs = (read(tmp_path / f"{number}{device}.gguf")[0] for device in ("cuda", "cpu"))
        assert ours.keys() == theirs.keys()
        assert all(np.allclose(ours[name].sums, theirs[name].sums, rtol=1e-2) for name in ours)


def test_who_waits_for_the_gpu_sleeps():
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    event, wall, busy = _mark(torch.cuda.current_stream()), time.perf_counter(), time.thread_time()
    event.synchronize()
    assert time.thread_time() - busy < 0.2 * (time.perf_counter() - wall)


def test_work_on_a_stream_of_the_caller_gives_the_same_bytes(source, token_file, tmp_path):
    settings = {"text": [str(token_file)], "batch": 4, "device": "cuda"}
    prune(source, tmp_path / "default", **settings)
    with torch.cuda.stream(torch.cuda.Stream()):
        prune(source, tmp_path / "side", **settings)
    assert shards(tmp_path / "side") == shards(tmp_path / "default")


def test_memory_that_cannot_be_page_locked_is_said_and_changes_nothing(source, token_file, tmp_path, monkeypatch):
    settings = {"text": [str(token_file)], "batch": 4, "device": "cuda", "states": "host"}
    prune(source, tmp_path / "locked", **settings)
    runtime = torch.cuda.cudart()
    names = (name for name in dir(runtime) if not name.startswith("_"))
    refusing = SimpleNamespace(**{name: getattr(runtime, name) for name in names} | {"cudaHostRegister": lambda *_: 2})
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    report = prune(source, tmp_path / "not", **settings)
    assert report["peak_memory"]["host_not_locked"] > 0 and shards(tmp_path / "not") == shards(tmp_path / "locked")


def test_host_memory_is_page_locked():
    with host_memory(1 << 20, GPU, pytest.fail) as memory:
        assert memory.is_pinned()
    assert not memory.is_pinned()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_another_gpu_than_the_first_leaves_the_first_alone(source, token_file, tmp_path):
    before = torch.cuda.mem_get_info(0)[0]
    prune(source, tmp_path / "second", text=[str(token_file)], batch=4, device="cuda:1")
    assert before - torch.cuda.mem_get_info(0)[0] < 100 << 20
    prune(source, tmp_path / "first", text=[str(token_file)], batch=4, device="cuda:0")
    assert shards(tmp_path / "second") == shards(tmp_path / "first")


def test_bfloat16_is_computed_where_the_gpu_has_it(source, token_file, monkeypatch):
    settings = {"text": [str(token_file)], "length": 16, "device": "cuda"}
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    assert evaluate(source, **settings)["dtype"] == ("bfloat16" if has else "float32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    said = []
    assert evaluate(source, **settings, on_start=said.append)["dtype"] == "float32"
    assert "has no bfloat16" in said[0]["device"]


def test_a_full_gpu_is_said_in_a_sentence(wide, tmp_path, capsys):
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info(0)[0] - (150 << 20), dtype=torch.uint8, device=GPU)
    arguments = ["prune", str(wide), str(tmp_path / "out"), "--device", "cuda", "--text", str(wide / "tokens.npy")]
    assert main(arguments) == 1 and taken.numel()
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and "--sequences" in shown.strip().splitlines()[-1]


def test_the_command_line_prunes_with_segments_that_grow(source, token_file, tmp_path, capsys):
    """In a process of its own, so that the allocator is set up before CUDA starts."""
    command = [sys.executable, "-m", "lowmem_wanda", "prune", source, tmp_path / "out", "--device", "cuda", "--json"]
    done = subprocess.run([*command, "--text", token_file], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_memory"]["device_reserved"] > 0 and "not supported" not in done.stderr
