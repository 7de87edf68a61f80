"""Pruning by norms that an importance matrix has: it is the dense order, and what does not fit is named."""

import shutil

import numpy as np
import pytest
from helpers import collected, digests, opened, save_tiny

from lowmem_wanda import prune
from lowmem_wanda.errors import CalibrationError, OutputError
from lowmem_wanda.llamacpp.collect import collect
from lowmem_wanda.llamacpp.imatrix import Entry, read, write
from lowmem_wanda.pruning.job import prepare


def test_pruning_by_norms_is_the_dense_order(tiny, token_file, tmp_path):
    """Two formats, and no forward pass."""
    same = {"text": [str(token_file)], "batch": 4, "pattern": "50%"}
    prune(tiny("llama"), tmp_path / "dense", statistics="dense", imatrix=tmp_path / "x.gguf", **same)
    collected(tiny("llama"), token_file, tmp_path / "x.dat")
    for suffix in ("gguf", "dat"):
        out = tmp_path / suffix
        report = prune(tiny("llama"), out, pattern="50%", norms=str(tmp_path / f"x.{suffix}"))
        assert report["summary"]["forward_passes_per_block"] == 0
        shards = [{key: value for key, value in digests(path).items() if key.startswith("model-")} for path in
                  (out, tmp_path / "dense")]  # fmt: skip
        assert shards[0] == shards[1]


def test_norms_and_the_pruned_models_matrix_go_together(tiny, token_file, tmp_path):
    collected(tiny("llama"), token_file, tmp_path / "x.gguf")
    settings = {"norms": tmp_path / "x.gguf", "imatrix": tmp_path / "y.gguf", "text": [str(token_file)], "batch": 4}
    prune(tiny("llama"), tmp_path / "out", **settings)
    assert collected(tmp_path / "out", token_file, tmp_path / "z.gguf") == (tmp_path / "y.gguf").read_bytes()


def test_norms_that_do_not_fit_are_named(tiny, token_file, tmp_path):
    collected(tiny("llama"), token_file, tmp_path / "x.gguf")
    entries, about = read(tmp_path / "x.gguf")
    name = "blk.1.ffn_down.weight"
    cases = {
        f"no entry {name}": {key: entry for key, entry in entries.items() if key != name},
        f"entry {name} has 5 values, tensor model.layers.1.mlp.down_proj.weight has 64": {
            **entries, name: Entry(np.ones((1, 5)), np.array([1]))},
        f"entry {name} was measured on no token": {**entries, name: Entry(np.ones((1, 64)), np.array([0]))},
        f"entry {name} holds numbers": {**entries, name: Entry(np.full((1, 64), np.nan), np.array([1]))},
    }  # fmt: skip
    for place, (says, changed) in enumerate(cases.items()):
        path = tmp_path / f"{place}.gguf"
        write(path, {key: entry.sums.shape for key, entry in changed.items()}, changed.items(), about)
        with pytest.raises(CalibrationError, match=says):
            prepare(tiny("llama"), norms=str(path))
        prepare(tiny("llama"), norms=str(path), exclude=["*layers.1.mlp.down_proj*"])
    for useless in ({"method": "magnitude"}, {"statistics": "dense"}, {"text": [str(token_file)]}):
        with pytest.raises(CalibrationError, match=f"--{[*useless][0]} .* has no use"):
            prepare(tiny("llama"), norms=str(tmp_path / "x.gguf"), **useless)


def test_a_job_by_other_norms_is_another_job(tiny, token_file, tmp_path):
    collected(tiny("llama"), token_file, tmp_path / "x.gguf")
    collected(save_tiny(tmp_path / "other", "llama", seed=1), token_file, tmp_path / "y.gguf")
    prune(tiny("llama"), tmp_path / "out", norms=str(tmp_path / "x.gguf"))
    shutil.copy(tmp_path / "y.gguf", tmp_path / "x.gguf")
    with pytest.raises(OutputError, match="--norms sha256"):
        prune(tiny("llama"), tmp_path / "out", norms=str(tmp_path / "x.gguf"))


@pytest.mark.slow
@pytest.mark.real
def test_real_models_by_published_norms_lie_between_wanda_and_magnitude(shared, tmp_path):
    from lowmem_wanda.evaluation.evaluate import windows_for
    from lowmem_wanda.evaluation.perplexity import evaluate_model

    source, stories = shared / "models/stories260K", shared / "corpora/tinystories"
    text = [str(stories / "calibration.txt")]
    work = opened(source)
    job = prepare(source, text=text, sequences=64, length=512)
    collect(work, job.calibration, tmp_path / "dense.gguf")
    prune(source, tmp_path / "norms", pattern="50%", norms=str(tmp_path / "dense.gguf"))
    prune(source, tmp_path / "wanda", pattern="50%", text=text, sequences=64, length=512)
    prune(source, tmp_path / "magnitude", pattern="50%", method="magnitude")
    windows = windows_for(work, [str(stories / "held-out.txt")], 512, windows=40)
    value = {
        name: evaluate_model(opened(tmp_path / name), windows)["perplexity"] for name in ("wanda", "norms", "magnitude")
    }
    assert value["wanda"] < value["norms"] < 1.2 * value["wanda"] < value["magnitude"]
