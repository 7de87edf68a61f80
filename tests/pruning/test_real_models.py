"""Trained models that nobody here made: wanda must beat magnitude, by transformers' own perplexity."""

import math

import numpy as np
import pytest
import torch
from helpers import opened
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_wanda import check, prune
from lowmem_wanda.data.windows import windows as rows
from lowmem_wanda.evaluation.perplexity import evaluate_model


def perplexity(path, windows):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [
            float(model(input_ids=part, labels=part).loss) * len(part)
            for part in torch.from_numpy(windows).split(64 if windows.shape[1] < 100 else 4)
        ]
    return math.exp(sum(losses) / len(windows))


def craftgpt(shared):
    windows = np.load(shared / "corpora/craftgpt-eval.npy").astype(np.int64)[::2]
    return shared / "models/craftgpt-5m", shared / "corpora/craftgpt-calib.npy", 64, windows


def stories(shared):
    path = shared / "models/stories260K"
    documents = (shared / "corpora/tinystories/held-out.txt").read_text("utf-8")[-60_000:].split("<|endoftext|>")[1:]
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = np.array([token for story in documents for token in tokenizer(story.strip())["input_ids"]])
    return path, shared / "corpora/tinystories/calibration.txt", 512, ids[: len(ids) // 512 * 512].reshape(-1, 512)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    ("model", "pattern", "dense", "wanda"),
    [
        (craftgpt, "50%", 10.98, 17.8),
        (craftgpt, "2:4", 10.98, 29.0),
        (stories, "50%", 4.78, 22.7),
        (stories, "2:4", 4.78, 67.7),
    ],
)
def test_wanda_beats_magnitude_on_a_trained_model(shared, tmp_path, model, pattern, dense, wanda):
    path, text, length, windows = model(shared)
    settings = {"pattern": pattern, "text": [str(text)], "length": length, "sequences": 128 if length == 64 else 64}
    for method in ("wanda", "magnitude"):
        prune(path, tmp_path / method, method=method, **settings)
        assert check(tmp_path / method, path).problems == []
    np.save(tmp_path / "windows.npy", windows)
    given = rows([str(tmp_path / "windows.npy")], list, length=length, vocabulary=1 << 20)
    measured = {}
    for name, folder in (("wanda", tmp_path / "wanda"), ("magnitude", tmp_path / "magnitude"), ("dense", path)):
        measured[name] = evaluate_model(opened(folder, batch=4096 // length), given)["perplexity"]
        assert measured[name] == pytest.approx(perplexity(folder, windows), rel=1e-5)  # transformers' own
    assert measured["dense"] == pytest.approx(dense, rel=0.05)
    assert measured["wanda"] == pytest.approx(wanda, rel=0.08)  # shared/README.md; stories on other windows
    assert measured["wanda"] < 0.8 * measured["magnitude"]
