"""Budgets: the fastest layout that fits, what is refused, and no bit of difference between layouts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import save_tiny

from lowmem_wanda import prune
from lowmem_wanda.cli.main import main
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.sparsity.selection import DEVICE_CHUNK
from lowmem_wanda.streaming import placement as planning
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.placement import choose, placements
from lowmem_wanda.streaming.resources import anonymous

MB = 10**6


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Blocks of 3.6 MB, and hidden states of 8 MB."""
    path = tmp_path_factory.mktemp("wide")
    save_tiny(path, "llama", hidden_size=256, intermediate_size=768, head_dim=64, shard="5MB")
    np.save(path / "tokens.npy", np.random.default_rng(0).integers(3, 96, (128, 64)))
    return path


@pytest.fixture
def still(monkeypatch):
    """This process's own memory, which changes between calls, counts for nothing, and all is free."""
    monkeypatch.setattr(planning, "anonymous", lambda: 0)
    monkeypatch.setattr(planning, "free_memory", lambda device: 10**12)


def work(path, statistics="block", **machine):
    """What pruning a folder's checkpoint on its tokens holds."""
    return prepare(path, text=[str(path / "tokens.npy")], statistics=statistics, machine=Machine.of(**machine)).workload


def test_the_fastest_comes_first_and_the_smallest_last(wide, still):
    costs = dict(reversed(pair) for pair in placements(work(wide), None))
    first, last = min(costs, key=costs.get), max(costs, key=costs.get)
    assert (first.states, first.slots, first.batch, costs[first]) == ("device", 3, 8, 0)
    assert (last.states, last.slots, last.batch) == ("file", 1, 1)


def test_a_smaller_budget_is_kept_by_a_smaller_layout(wide, still):
    free, need = choose(work(wide))
    assert (free.states, free.slots) == ("device", 3)
    chosen = []
    for less in range(0, need.host, MB):
        try:
            layout, now = choose(work(wide, max_ram=need.host - less))
        except BudgetError as error:
            least = int(str(error).split("--max-ram ")[-1].split("MB")[0])
            break
        assert now.host <= need.host - less
        chosen.append((layout.slots, layout.states))
    assert {slots for slots, _ in chosen} == {1, 2, 3} and {states for _, states in chosen} == {"device", "file"}
    assert choose(work(wide, max_ram=least * MB))[1].host <= least * MB
    with pytest.raises(BudgetError):
        choose(work(wide, max_ram=least * MB - 2 * MB))


def test_what_waits_is_what_still_fits(wide, still):
    held, need = choose(work(wide, statistics="sequential"))
    assert held.held == 16 and choose(work(wide))[0].held == 0
    fewer, less = choose(work(wide, statistics="sequential", max_ram=need.host - 15 * MB))
    assert 0 < fewer.held < 32 and less.host <= need.host - 15 * MB


def test_what_is_not_free_is_not_planned_with(wide, still, monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 50 * MB)
    assert choose(work(wide))[1].host <= 50 * MB
    assert choose(work(wide, max_ram=10**12))[1].host <= 50 * MB
    monkeypatch.setattr(planning, "free_memory", lambda device: 5 * MB)
    with pytest.raises(BudgetError, match="--max-ram: 5 MB is all that is free, .* end other programs"):
        choose(work(wide))


def test_attention_that_holds_its_scores_is_planned_with(tmp_path, still):
    path = save_tiny(tmp_path, "bloom")
    np.save(path / "tokens.npy", np.random.default_rng(0).integers(3, 96, (8, 64)))
    assert choose(work(path))[1].host > 8 * 4 * 64 * 64 * 12


def test_a_budget_is_refused_before_any_work(wide, tmp_path, capsys):
    command = ["prune", str(wide), str(tmp_path / "out"), "--text", str(wide / "tokens.npy"), "--max-ram", "20MB"]
    assert main(command) == 1
    shown = capsys.readouterr().err
    assert "error: --max-ram: 20 MB cannot be kept" in shown and "would fit with hidden states in a file" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 << 29), ("2", 2 * 10**9), ("64 kb", 64000), ("100b", 100)],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    from lowmem_wanda import byte_size

    assert byte_size(text) == expected


def test_a_limit_of_nothing_is_a_limit(wide, still):
    with pytest.raises(BudgetError, match="--max-ram: 0 MB cannot be kept, .* give --max-ram"):
        choose(work(wide, max_ram=0))
    load = work(wide, max_ram=10**12, max_vram=0)
    object.__setattr__(load.model, "device", torch.device("cuda", 0))
    with pytest.raises(BudgetError, match="--max-vram: 0 MB cannot be kept, .* give --max-vram"):
        choose(load)


@pytest.mark.parametrize(
    "size", [-1, float("nan"), float("inf"), 1e40, "9" * 5000, "0." + "1" * 5000, "1" * 30 + "GB", "٣GB"]
)
def test_sizes_that_are_none_are_named_in_a_short_line(size):
    from lowmem_wanda import byte_size

    with pytest.raises(BudgetError) as error:
        byte_size(size)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("text", ["much", "1e3GB", "8XB", "GB", "9" * 5000])
def test_what_is_no_size_is_usage(text, capsys):
    with pytest.raises(SystemExit) as error:
        main(["plan", "x", "--max-ram", text])
    assert error.value.code == 2 and "not a size such as 8GB" in capsys.readouterr().err


def hollow_llama(path, width, hidden, blocks, kv_heads, vocab):
    """A checkpoint of true size that takes no disk: headers, and holes for the weights."""
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for block in (f"model.layers.{index}." for index in range(blocks)):
        heads = {"q_proj": width, "k_proj": kv_heads * 128, "v_proj": kv_heads * 128, "o_proj": width}
        shapes |= {f"{block}self_attn.{name}": (rows, width) for name, rows in heads.items()}
        shapes |= {f"{block}mlp.{name}_proj": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj": (width, hidden)}
        shapes |= {f"{block}{name}_layernorm": (width,) for name in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": vocab,
              "intermediate_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": width // 128,
              "num_key_value_heads": kv_heads, "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    np.save(path / "tokens.npy", np.zeros((128, 2048), np.int64))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "cap", "states"),
    [
        ((8192, 28672, 80, 8, 32000), 12, "device"),  # Llama-2-70B
        ((8192, 28672, 80, 8, 32000), 8, "device"),
        ((8192, 28672, 80, 8, 32000), 4, "host"),
        ((16384, 53248, 126, 8, 128256), 24, "device"),  # Llama-3.1-405B
    ],
)
def test_the_largest_models_are_planned_for_small_cards(tmp_path, still, shape, cap, states):
    path = hollow_llama(tmp_path, *shape)
    limits = {"dtype": "bfloat16", "max_vram": cap * 10**9, "max_ram": 10**12}
    planned = work(path, **limits)
    on_gpu = replace(planned.model, device=torch.device("cuda"))
    layout, need = choose(replace(planned, models=(on_gpu,), chunk=DEVICE_CHUNK))
    assert (layout.states, layout.slots) == (states, 3) and 0 < need.device <= cap * 10**9
    assert need.host < 3.2 * shape[0] * (4 * shape[0] + 3 * shape[1]) * 2 + 5e9 * (states == "host")


def shards(path):
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


@pytest.mark.parametrize("statistics", ["block", "sequential"])
def test_no_layout_changes_a_bit(source, token_file, tmp_path, statistics):
    expected = None
    for number, limits in enumerate(
        [{}, {"states": "file"}, {"slots": 1}, {"slots": 2, "read": "mmap", "states": "file", "held": 1}]
    ):
        out = tmp_path / str(number)
        report = prune(source, out, text=[str(token_file)], batch=4, statistics=statistics, **limits)
        expected = expected or shards(out)
        assert shards(out) == expected
        assert report["layout"]["slots"] == limits.get("slots", 3)
        assert report["layout"]["states"] == limits.get("states", "device")
        assert not list(out.glob(".*"))


def test_a_job_goes_on_with_the_batch_it_began_with(source, token_file, tmp_path, monkeypatch):
    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", text=[str(token_file)], on_block=stop)
    monkeypatch.setattr(planning, "CPU_TOKENS", 16)  # from now on one sequence would be as many as fit
    assert choose(prepare(source, text=[str(token_file)]).workload)[0].batch == 1
    prune(source, tmp_path / "out", text=[str(token_file)])
    assert json.loads((tmp_path / "out/job.json").read_bytes())["batch"] == 6


def test_the_report_has_the_peak_beside_the_plan_and_the_times(source, token_file, tmp_path):
    report = prune(source, tmp_path / "out", text=[str(token_file)])
    memory, timing = report["peak_memory"], report["timing"]
    assert anonymous() * 0.5 < memory["host_measured"] < 1.1 * memory["host_predicted"]
    assert {"embed", "measure", "prune", "onward", "read", "write", "copy"} == timing["parts"].keys()
    assert timing["serial"] == pytest.approx(sum(timing["parts"].values()))
    assert 0 < timing["compute_busy"] <= 1 and timing["serial_over_wall"] == pytest.approx(
        timing["serial"] / timing["wall"]
    )
    assert report["blocks"][0]["parts"].keys() == {"measure", "prune", "onward", "read", "write"}
