"""Methods beyond a mask on whole checkpoints: proof, resume, orders, one statistic at a time, recovery, allocation."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import digests, read_tensor, save_tiny

from lowmem_wanda import Checkpoint, check, evaluate, imatrix, plan, prune
from lowmem_wanda.errors import CalibrationError, NumberError, OutputError, PatternError
from lowmem_wanda.pruning.job import prepare
from lowmem_wanda.pruning.plan import predict
from lowmem_wanda.streaming import placement
from lowmem_wanda.streaming.machine import Machine

WAYS = {
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "ria+swaps": {"method": "ria", "refine": "swaps"},
    "magnitude+lsq": {"method": "magnitude", "update": "lsq"},
    "variant": {"variant": True, "pattern": "50%"},
    "recover": {"recover": "block", "recover_steps": 10},
    "norms": {"method": "magnitude", "recover": "norms", "recover_steps": 10},
    "owl": {"allocation": "owl", "pattern": "60%"},
    "best": {"quality": "best", "recover_steps": 10},
}
KEEP_BITS = ("ria+swaps", "variant", "owl")


@pytest.fixture
def settings(token_file):
    return {"text": [str(token_file)], "batch": 2, "device": "cpu"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # bfloat16; stored as (inputs, outputs)
def test_the_proof_holds_and_a_resumed_job_has_the_same_bytes(tiny, source, settings, tmp_path, family, way):
    source = source if family == "llama" else tiny(family)
    report = prune(source, tmp_path / "out", **settings, **WAYS[way])
    assert check(tmp_path / "out", against=source).problems == []
    assert report["summary"]["keeps_bits"] == (way in KEEP_BITS)

    def stop(record):
        if record["index"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "again", **settings, **WAYS[way], on_block=stop)
    prune(source, tmp_path / "again", **settings, **WAYS[way])
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    with pytest.raises(OutputError, match="holds a job with"):
        prune(source, tmp_path / "out", **settings, method="wanda", pattern="4:8")


@pytest.mark.parametrize("statistics", ["sequential", "dense"])
@pytest.mark.parametrize("way", ["sparsegpt", "alps", "magnitude+lsq"])
def test_solvers_work_in_all_orders(source, settings, tmp_path, statistics, way):
    report = prune(source, tmp_path / "out", **settings, **WAYS[way], statistics=statistics)
    assert check(tmp_path / "out", against=source).problems == [] and report["summary"]["sparsity"] == 0.5
    errors = [one["error"] for block in report["blocks"] for one in block["linears"].values()]
    assert len(errors) == 21 and min(errors) > 0 and max(errors) < 0.5


def test_a_mask_is_the_same_with_what_comes_after_it(source, settings, tmp_path):
    for name, more in (("plain", {}), ("lsq", {"update": "lsq"})):
        prune(source, tmp_path / name, **settings, **more, include=["*layers.0.*"])
    plain, fitted = (
        {n: read_tensor(t) for n, t in Checkpoint(tmp_path / one).tensors.items()} for one in ("plain", "lsq")
    )
    assert all(torch.equal(plain[name] == 0, fitted[name] == 0) for name in plain)
    assert sum(not torch.equal(plain[name], fitted[name]) for name in plain) == 7


def chosen(monkeypatch, **changes):
    """Has jobs take a placement that is changed in some ways."""
    real = placement.choose
    monkeypatch.setattr(
        "lowmem_wanda.pruning.plan.choose", lambda *given: (replace(real(*given)[0], **changes), real(*given)[1])
    )


def test_one_statistic_at_a_time_changes_no_bit(source, settings, tmp_path, monkeypatch):
    for apart in (False, True):
        chosen(monkeypatch, apart=apart)
        report = prune(source, tmp_path / str(apart), **settings, method="alps")
        assert report["layout"]["apart"] == apart
    assert digests(tmp_path / "True") == digests(tmp_path / "False")
    assert report["summary"]["forward_passes_per_block"] > 1.9  # the dense block is computed up to each of its inputs


def test_less_memory_has_statistics_one_after_the_other(tmp_path, settings):
    source = save_tiny(tmp_path / "wide", "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    job = prepare(source, method="sparsegpt", **{"text": settings["text"]})
    work = job.workload
    assert work.statistics == 4 * (2 * 256**2 + 32**2 + 1024**2) + 8 * (
        2 * 256 + 32 + 1024
    )  # q, k, v share, gate and up share
    assert work.statistics_apart == 4 * 1024**2 + 8 * 1024
    full = predict(job)
    assert not full.layout.apart and full.flops > plan(source, text=settings["text"], device="cpu").flops
    options = list(placement.placements(work, None))
    assert {made.apart for _, made in options} == {False, True}
    sizes = placement.Sizes(work, 0)
    same = [made for _, made in options if replace(made, apart=False) == options[0][1]]
    together, apart = (sizes.need(made).host for made in sorted(same, key=lambda made: made.apart))
    assert together - apart == work.statistics - work.statistics_apart


def test_sequential_holds_one_statistic(source, settings):
    jobs = [
        prepare(source, method="alps", statistics=order, text=settings["text"]) for order in ("block", "sequential")
    ]
    assert jobs[0].workload.statistics > jobs[1].workload.statistics == jobs[0].workload.statistics_apart


@pytest.mark.parametrize("recover", ["block", "norms"])
def test_recovery_lowers_the_error_of_blocks_and_holds_the_mask(source, settings, tmp_path, recover):
    prune(source, tmp_path / "plain", **settings, include=["*layers.0.*"])
    report = prune(source, tmp_path / "out", **settings, recover=recover, recover_steps=30)
    records = [block["recovered"] for block in report["blocks"]]
    assert all(record["after"] < record["before"] and record["steps"] <= 30 for record in records)
    before, after = (
        {n: read_tensor(t) for n, t in Checkpoint(tmp_path / one).tensors.items()} for one in ("plain", "out")
    )
    first = [name for name in before if "layers.0." in name]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in first if before[name].ndim == 2)
    moved = {name for name in first if not torch.equal(before[name], after[name])}
    assert moved <= set(records[0]["tensors"]) and any("norm" in name for name in moved)
    assert any("proj" in name for name in moved) == (recover == "block")
    assert "recovered by training" in report["summary"]["also"][0]
    assert "the error" not in report["summary"]["also"][1] and "held out" in report["summary"]["also"][1]


def test_recovery_that_does_not_help_leaves_the_pruned_block(source, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_wanda.pruning.recover.RATE", 100.0)
    prune(source, tmp_path / "plain", **settings)
    report = prune(source, tmp_path / "out", **settings, recover="block", recover_steps=5)
    assert all(block["recovered"]["before"] == block["recovered"]["after"] for block in report["blocks"])
    assert "3 of 3 blocks stay as they were" in report["summary"]["also"][-1]
    for one in Checkpoint(tmp_path / "plain").tensors.values():
        assert torch.equal(read_tensor(one), read_tensor(Checkpoint(tmp_path / "out").tensors[one.name])), one.name


def test_parts_of_a_block_are_trained_one_after_the_other_and_a_resumed_job_keeps_that(
    source, settings, tmp_path, monkeypatch
):
    more = {**settings, "recover": "block", "recover_steps": 10}
    job = prepare(source, text=settings["text"], recover="block")
    assert 0 < job.workload.training_apart < job.workload.training and job.workload.targets
    chosen(monkeypatch, trained_apart=True)
    report = prune(source, tmp_path / "out", **more)
    assert report["arguments"]["trained_apart"] and report["blocks"][0]["recovered"]["steps"] > 10

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "again", **more, on_block=stop)
    monkeypatch.undo()  # by itself it would train all at once
    prune(source, tmp_path / "again", **more)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


@pytest.mark.parametrize("allocation", ["owl", "atp"])
def test_an_allocation_keeps_the_share_in_all(source, settings, tmp_path, allocation, monkeypatch):
    report = prune(source, tmp_path / "out", **settings, allocation=allocation, pattern="60%")
    shares = [sum(one["zeros"] for one in block["linears"].values()) for block in report["blocks"]]
    rows = sum(one["shape"][0] for block in report["blocks"] for one in block["linears"].values())
    assert 0 <= 0.6 * report["summary"]["weights"] - sum(shares) <= rows and len(set(shares)) == 3
    even = prune(source, tmp_path / "even", **settings, pattern="60%")["summary"]["zeros"]
    most = max(one["shape"][0] for one in report["blocks"][0]["linears"].values())
    assert 0 <= even - sum(shares) <= 4 * most  # a weight for each row of matrices that gain one together
    assert (shares == sorted(shares)) if allocation == "atp" else (tmp_path / "out/allocation.json").exists()
    if allocation == "owl":
        held = json.loads((tmp_path / "out/allocation.json").read_text())
        pairs = sorted(zip(held["outlier_ratios"], held["shares"], strict=True))
        assert [share for _, share in pairs] == sorted(held["shares"], reverse=True)
        assert max(held["shares"]) - min(held["shares"]) == pytest.approx(0.16)


def test_owl_measures_once(source, settings, tmp_path, monkeypatch):
    more = {**settings, "allocation": "owl", "pattern": "60%"}

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", **more, on_block=stop)
    monkeypatch.setattr("lowmem_wanda.pruning.allocate.outlier_ratio", None)
    prune(source, tmp_path / "out", **more)


def test_owl_measures_its_text_where_masks_are_made_by_norms(source, settings, tmp_path):
    imatrix(source, tmp_path / "norms.gguf", text=settings["text"], device="cpu")
    more = {**settings, "norms": tmp_path / "norms.gguf", "allocation": "owl", "pattern": "60%"}
    report = prune(source, tmp_path / "out", **more)
    assert (tmp_path / "out/allocation.json").exists() and report["summary"]["keeps_bits"]


def test_owl_counts_outliers(source, settings):
    from lowmem_wanda.pruning.allocate import outlier_ratio

    weights = [(torch.randn(20, 8), torch.rand(8)), (torch.randn(5, 16), torch.rand(16) * 3)]
    scores = torch.cat([(weight.abs() * norms).flatten() for weight, norms in weights])
    assert outlier_ratio(weights) == pytest.approx(float((scores > 5 * scores.mean()).double().mean()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"quality": "best", "method": "alps"}, "--quality best chooses the method"),
        ({"quality": "perfect"}, "--quality perfect: give one of fast, good, best"),
        ({"variant": True, "method": "ria"}, "--variant is of wanda"),
        ({"variant": True}, "--variant: is of a share"),
        ({"method": "sparsegpt", "group": "row", "pattern": "50%"}, "--group row: sparsegpt compares columns"),
        ({"method": "magnitude", "group": "matrix"}, "has groups of its own"),
        ({"recover": "all"}, "--recover all: give one of none, block, norms"),
        ({"recover": "block", "statistics": "dense"}, "--statistics dense"),
        ({"recover": "block", "zeros": "signed-tiny"}, "--zeros signed-tiny"),
        ({"allocation": "owl"}, "--allocation owl: divides a share"),
        ({"allocation": "even", "pattern": "50%"}, "--allocation even: give one of"),
        ({"allocation": "atp", "pattern": "95%"}, "is not within 1% and 99%"),
        ({"recover_steps": 5}, "--recover-steps: nothing is trained without --recover"),
        ({"method": "wanda+recover+lsq"}, "recover is none of swaps and lsq .[+]recover comes last."),
        ({"method": "alps+recover", "recover": "norms"}, "--recover norms: alps[+]recover recovers the block"),
    ],
)
def test_what_does_not_go_together_is_refused(source, settings, words, says):
    with pytest.raises(PatternError, match=says):
        prepare(source, text=settings["text"], **words)


def test_recovery_needs_two_sequences(source, settings):
    with pytest.raises(CalibrationError, match="2 sequences at least"):
        prepare(source, text=settings["text"], recover="block", sequences=1)
    with pytest.raises(CalibrationError, match="--batch 6 makes one micro-batch of 6 sequences, .* give --batch 1"):
        prepare(source, text=settings["text"], recover="block", machine=Machine.of(device="cpu", batch=6))


def test_too_few_tokens_for_x_t_x_are_warned_of(source, settings):
    few = prepare(source, text=settings["text"], method="sparsegpt", sequences=2).calibration.warnings
    assert few == ("32 tokens are fewer than the 64 inputs of a matrix, so sparsegpt fits weights to them alone; give more "
                   "--sequences, or a larger --length",)  # fmt: skip
    assert not prepare(source, text=settings["text"], method="sparsegpt").calibration.warnings
    assert not prepare(source, text=settings["text"], sequences=2).calibration.warnings


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "wanda+lsq", "wanda-variant"])
def test_what_is_no_number_in_the_source_is_named_as_that(tmp_path, settings, method):
    from safetensors.torch import load_file, save_file

    source = save_tiny(tmp_path / "source", "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    file = Checkpoint(source).tensors[name].file
    tensors = load_file(file)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumberError, match=f"tensor {name} holds NaN or infinity; download it again"):
        prune(source, tmp_path / "out", **settings, method=method, pattern="50%")


@pytest.mark.real
@pytest.mark.slow
def test_the_best_is_better_than_wanda_on_a_real_model(shared, tmp_path):
    source, calibration = shared / "models/craftgpt-5m", shared / "corpora/craftgpt-calib.npy"
    text = [str(shared / "corpora/craftgpt-eval.npy")]
    made = {}
    for method in ("wanda", "sparsegpt", "alps", "alps+recover"):
        more = {"recover_steps": 25} if "recover" in method else {}
        prune(source, tmp_path / method, method=method, text=[str(calibration)], length=64, **more)
        made[method] = evaluate(tmp_path / method, text=text, length=64, windows=48)["perplexity"]
    dense = evaluate(source, text=text, length=64, windows=48)["perplexity"]
    left = {method: (perplexity - dense) / (made["wanda"] - dense) for method, perplexity in made.items()}
    assert left["sparsegpt"] < 0.6 and left["alps"] < 0.35 and left["alps+recover"] < 0.28
