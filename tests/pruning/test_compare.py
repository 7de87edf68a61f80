"""compare: which prunings there are, that each row is what prune and eval give, and how it goes on."""

import json

import numpy as np
import pytest
from helpers import opened

from lowmem_wanda import compare, prune
from lowmem_wanda.checkpoint.output import report_folder
from lowmem_wanda.data.windows import windows
from lowmem_wanda.errors import OutputError, PatternError
from lowmem_wanda.evaluation.perplexity import evaluate_model
from lowmem_wanda.pruning import compare as module
from lowmem_wanda.pruning.variants import titles_of, variants_of


def run(source, target, token_file, methods, **settings):
    """A comparison at 2:4 on the tokens that it is calibrated on."""
    given = {"patterns": ["2:4"], "calibration": [str(token_file)], "length": 16, "device": "cpu", **settings}
    return compare(source, target, text=[str(token_file)], methods=methods, **given)


def test_what_matters_not_is_no_variant():
    chosen = variants_of(
        ["magnitude", "wanda"], ["50%", "2:4"], ["row", "matrix"], ["block"], sequences=[1, 8], seeds=[0, 1]
    )
    counts = {
        (v.method, v.pattern): sum((w.method, w.pattern) == (v.method, v.pattern) for w in chosen) for v in chosen
    }
    assert counts == {
        ("magnitude", "50%"): 2, ("magnitude", "2:4"): 1, ("wanda", "50%"): 8, ("wanda", "2:4"): 4,
    }  # fmt: skip
    assert len(set(titles_of(chosen).values())) == len(chosen)
    assert list(titles_of(variants_of(["wanda", "magnitude"], ["50%"])).values()) == ["wanda 50%", "magnitude 50%"]


def test_a_row_is_what_prune_and_eval_give(tiny, token_file, tmp_path):
    report = run(tiny("llama"), tmp_path / "out", token_file, ["magnitude", "wanda"], sequences=[4])
    prune(tiny("llama"), tmp_path / "wanda", text=[str(token_file)], sequences=4)
    text = windows([str(token_file)], lambda line: [], length=16, vocabulary=96)
    alone = evaluate_model(opened(tmp_path / "wanda"), text, opened(tiny("llama")))
    row = report["rows"][1]
    assert {key: row[key] for key in module.FIGURES} == {key: alone[key] for key in module.FIGURES}
    assert [block["relative_error"] for block in row["blocks"]] == [b["relative_error"] for b in alone["blocks"]]
    assert report["dense"] == alone["dense"] and row["sparsity"] == 0.5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report))


def test_rows_that_are_there_are_not_made_again(tiny, token_file, tmp_path, monkeypatch):
    first = run(tiny("llama"), tmp_path / "out", token_file, ["wanda"])
    made, make = [], module.run
    monkeypatch.setattr(module, "run", lambda job, *rest: made.append(str(job.method)) or make(job, *rest))
    both = run(tiny("llama"), tmp_path / "out", token_file, ["magnitude", "wanda"], keep=True)
    assert made == ["magnitude", "wanda"] and both["rows"][1]["perplexity"] == first["rows"][0]["perplexity"]
    run(tiny("llama"), tmp_path / "out", token_file, ["magnitude", "wanda"], keep=True)
    assert made == ["magnitude", "wanda"]
    assert (tmp_path / "out/magnitude-2-4/config.json").exists()
    with pytest.raises(OutputError, match="--calibration"):
        run(tiny("llama"), tmp_path / "out", token_file, ["wanda"], calibration=[])


def test_rows_of_other_runs_have_names_of_their_own(tiny, token_file, tmp_path):
    run(tiny("llama"), tmp_path / "out", token_file, ["wanda"], seeds=[0])
    report = run(tiny("llama"), tmp_path / "out", token_file, ["wanda"], seeds=[1])
    assert [row["name"] for row in report["rows"]] == ["wanda 2:4 seed 0", "wanda 2:4 seed 1"]


def test_a_row_says_how_many_sequences_there_were(tiny, token_file, tmp_path):
    report = run(tiny("llama"), tmp_path / "out", token_file, ["wanda"], sequences=[6, 64, 128])
    assert [row["sequences"] for row in report["rows"]] == [6]


def test_rows_of_another_model_or_format_are_refused(tiny, token_file, tmp_path):
    run(tiny("llama"), tmp_path / "out", token_file, ["magnitude"])
    with pytest.raises(OutputError, match="source fingerprint"):
        run(tiny("mistral"), tmp_path / "out", token_file, ["magnitude"])
    with pytest.raises(OutputError, match="holds no report of compare"):
        report_folder(tiny("llama"), "compare")
    report = json.loads((tmp_path / "out/report.json").read_text())
    (tmp_path / "out/report.json").write_text(json.dumps({**report, "format": 0}))
    with pytest.raises(OutputError, match="another version"):
        run(tiny("llama"), tmp_path / "out", token_file, ["magnitude"])


def test_fewer_sequences_are_the_first_of_more_and_seeds_are_spread(tiny, tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 96, 500))
    np.save(tmp_path / "rows.npy", np.random.default_rng(1).integers(3, 96, (4, 16)))
    chosen = variants_of(["wanda"], ["50%"], sequences=[2, 1], seeds=[0, 1])
    samples = module.samples_of(opened(tiny("llama")), chosen, [str(tmp_path / "ids.npy")], 16)
    assert np.array_equal(samples[1, 0].tokens, samples[2, 0].tokens[:1])
    assert not np.array_equal(samples[1, 0].tokens, samples[1, 1].tokens)
    report = run(
        tiny("llama"), tmp_path / "out", tmp_path / "rows.npy", ["wanda"], patterns=["50%"], sequences=[2, 1],
        seeds=[0, 1], calibration=[str(tmp_path / "ids.npy")],
    )  # fmt: skip
    spread = {entry["name"]: entry for entry in report["spread"]}
    values = [row["perplexity"] for row in report["rows"] if row["sequences"] == 2]
    assert (
        spread["wanda 50% 2 sequences"]["perplexity_sd"] == pytest.approx(np.std(values, ddof=1)) and len(spread) == 2
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": ["best"], "patterns": ["2:4"]}, "--methods best"),
        ({"methods": ["wanda+best"], "patterns": ["2:4"]}, "best is none of swaps and lsq"),
        ({"methods": ["wanda-variant"], "patterns": ["2:4"]}, "--methods wanda-variant: is of a share"),
        ({"methods": ["wanda"], "patterns": ["2:4"], "groups": ["column"]}, "--groups column"),
        ({"methods": ["wanda"], "patterns": ["half"]}, "half"),
        ({"methods": ["wanda"], "patterns": ["2:4"], "sequences": [0]}, "--sequences 0"),
    ],
)
def test_words_that_are_none_are_refused(settings, says):
    with pytest.raises(PatternError, match=says):
        variants_of(**settings)


def test_better_methods_stand_in_a_table_with_their_names(source, token_file, tmp_path):
    methods = ["sparsegpt", "ria+swaps", "wanda+lsq", "wanda+recover", "wanda-variant"]
    settings = {
        "text": [str(token_file)],
        "calibration": [str(token_file)],
        "patterns": ["50%"],
        "groups": [None, "row"],
    }
    report = compare(source, tmp_path / "out", methods=methods, windows=2, device="cpu", length=16, **settings)
    assert [row["name"] for row in report["rows"]] == [f"{method} 50%" for method in methods]
    again = compare(source, tmp_path / "out", methods=methods[:1], windows=2, device="cpu", length=16, **settings)
    assert [row["perplexity"] for row in again["rows"]] == [
        row["perplexity"] for row in report["rows"][1:] + report["rows"][:1]
    ]
