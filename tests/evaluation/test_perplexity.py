"""Perplexity, divergence and damage by streaming == those of whole models; the conventions; what is refused."""

import math

import numpy as np
import pytest
import torch
from helpers import FAMILIES, opened, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_wanda import prune
from lowmem_wanda.data.windows import windows
from lowmem_wanda.errors import BudgetError, CalibrationError, ModelError, NumberError
from lowmem_wanda.evaluation.perplexity import evaluate_model, perplexity
from lowmem_wanda.streaming import head


def ids(text):
    """A token for each byte, and 1 before them."""
    return [1, *(byte % 96 for byte in text.encode())]


def rows(path, length=16, **settings):
    return windows([str(path)], ids, length=length, vocabulary=96, **settings)


def whole(path, tokens):
    """All logits (sequences, length, vocabulary) of a model in memory, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.double()


def whole_losses(path, tokens):
    """-log p of every token but the first of each sequence, (sequences, length - 1)."""
    scores = whole(path, tokens)[:, :-1].log_softmax(-1)
    return -scores.gather(-1, torch.from_numpy(tokens)[:, 1:, None])[..., 0].numpy()


@pytest.fixture
def narrow(monkeypatch):
    """Slices of 29 of 96 ids, and 7 tokens at a time, where the width is 32."""
    monkeypatch.setattr(head, "LEAST", 15000)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_transformers_own(tiny, token_file, narrow, family):
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.load(token_file))
    with torch.no_grad():
        expected = math.exp(float(model(input_ids=tokens, labels=tokens).loss))
    result = evaluate_model(opened(tiny(family), batch=4), rows(token_file))
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (result["tokens"], result["length"], len(result["blocks"])) == (6 * 15, 16, 3)


def test_figures_against_the_dense_model_are_the_direct_ones(tiny, token_file, tmp_path, narrow):
    source, tokens = tiny("llama"), np.load(token_file)
    prune(source, tmp_path / "out", text=[str(token_file)])
    dense, pruned = whole(source, tokens)[:, :-1], whole(tmp_path / "out", tokens)[:, :-1]
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).reshape(-1).numpy()
    change = (whole_losses(tmp_path / "out", tokens) - whole_losses(source, tokens)).reshape(-1)
    works = [opened(path, batch=4) for path in (tmp_path / "out", source)]
    result = evaluate_model(works[0], rows(token_file), works[1])
    same = (dense.argmax(-1) == pruned.argmax(-1)).double().mean()
    assert result["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-5)
    assert result["kl_p99"] == pytest.approx(np.percentile(divergence, 99), rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(float(same)) and same < 1
    assert result["perplexity_ratio"] == pytest.approx(math.exp(change.mean()), rel=1e-6)
    ratio_error = math.exp(change.mean()) * change.std(ddof=1) / math.sqrt(len(change))
    assert result["perplexity_ratio_stderr"] == pytest.approx(ratio_error, rel=1e-5)
    assert result["perplexity"] / result["dense"]["perplexity"] == pytest.approx(result["perplexity_ratio"])


def test_damage_is_the_relative_error_of_each_blocks_output(tiny, token_file, tmp_path):
    source, tokens = tiny("qwen3"), torch.from_numpy(np.load(token_file))
    prune(source, tmp_path / "out", text=[str(token_file)])
    outputs = []
    for path in (source, tmp_path / "out"):
        model, kept = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, given, output, kept=kept: kept.append(output.double()))
        with torch.no_grad():
            model(tokens, use_cache=False)
        outputs.append(kept)
    result = evaluate_model(opened(tmp_path / "out"), rows(token_file), opened(source))
    expected = [float((one - other).norm() / other.norm()) for other, one in zip(*outputs, strict=True)]
    assert [block["relative_error"] for block in result["blocks"]] == pytest.approx(expected, rel=1e-5)


def test_a_model_against_itself(tiny, token_file):
    result = evaluate_model(*(opened(tiny("llama")), rows(token_file), opened(tiny("llama"))))
    assert abs(result["kl_max"]) < 1e-6 and result["perplexity_ratio"] == result["top1_agreement"] == 1
    assert [block["relative_error"] for block in result["blocks"]] == [0, 0, 0]


@pytest.mark.parametrize("limits", [{"states": "file"}, {"slots": 1}, {"slots": 2, "read": "mmap"}])
def test_no_layout_changes_a_figure(tiny, token_file, limits):
    dense, keys = tiny("llama"), ("perplexity", "kl_mean", "kl_p99", "top1_agreement")
    results = [
        evaluate_model(
            opened(tiny("llama_tied"), batch=4, **limit),
            rows(token_file),
            opened(dense, **limit),
        )
        for limit in (limits, {})
    ]
    assert [results[0][key] for key in keys] == [results[1][key] for key in keys]


def test_strides_score_each_token_once_with_more_before_it(tiny, tmp_path):
    tokens = np.random.default_rng(0).integers(3, 96, 50)
    np.save(tmp_path / "ids.npy", tokens)
    text = rows(tmp_path / "ids.npy", stride=6)
    losses = whole_losses(tiny("llama"), text.tokens)
    expected = np.concatenate([losses[0], *(row[-6:] for row in losses[1:])])
    result = evaluate_model(opened(tiny("llama")), text)
    assert text.tokens.shape == (6, 16) and text.evaluated == result["tokens"] == 15 + 5 * 6
    assert np.array_equal(text.tokens[1], tokens[6:22])
    assert result["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def test_llama_cpps_convention(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("It is a truth universally acknowledged, that a single man")
    text = rows(tmp_path / "a.txt", convention="llama.cpp")
    plain = rows(tmp_path / "a.txt")
    assert (text.tokens[:, 0] == 1).all() and np.array_equal(text.tokens[:, 1:], plain.tokens[:, 1:])
    expected = whole_losses(tiny("llama"), text.tokens)[:, 8:]  # tokens 9 to 15: n_ctx - n_ctx / 2 - 1
    result = evaluate_model(opened(tiny("llama")), text)
    assert result["tokens"] == 3 * 7
    assert result["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    error = expected.std(ddof=1) / math.sqrt(expected.size) * result["perplexity"]
    assert result["perplexity_stderr"] == pytest.approx(error, rel=1e-5)


def test_a_text_is_taken_as_it_stands_and_documents_without_the_space_between(tmp_path):
    (tmp_path / "a.txt").write_text(" \n one two \n")
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert rows(tmp_path / "a.txt", 13).tokens.tolist() == [ids(" \n one two \n")]
    assert rows(tmp_path / "b.txt", 8).tokens.tolist() == [ids("one") + ids("two")]


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_data_sets_are_joined_as_in_the_papers_code(monkeypatch, name):
    import sys
    import types

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        return [{"text": "ab"}, {"text": "cd"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    joined = "ab\n\ncd" if name == "wikitext2" else "ab cd"
    assert windows([name], ids, length=6, vocabulary=96).tokens.tolist() == [ids(joined)[:6]]
    assert asked[0][1] == {"wikitext2": "test", "c4": "validation"}[name]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"length": 900}, "900"),
        ({"stride": 16}, "--stride 16"),
        ({"stride": 4, "convention": "llama.cpp"}, "--stride 4"),
        ({"length": 1}, "--length 1 leaves"),
        ({"most": 0}, "--windows 0"),
        ({"convention": "mine"}, "--convention mine: give one of windows, llama.cpp"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path, settings, says):
    (tmp_path / "a.txt").write_text("some words of no great length")
    with pytest.raises(CalibrationError, match=says):
        rows(tmp_path / "a.txt", **settings)


def test_models_of_another_kind_are_refused(tiny, token_file, tmp_path):
    other = save_tiny(tmp_path / "deep", "llama", num_hidden_layers=4)
    with pytest.raises(ModelError, match="has 3 blocks, .*deep 4"):
        evaluate_model(opened(tiny("llama")), rows(token_file), opened(other))


def test_a_budget_is_kept_or_refused(tiny, token_file):
    with pytest.raises(BudgetError, match="--max-ram"):
        evaluate_model(opened(tiny("llama"), max_ram=1 << 20), rows(token_file))


def test_logits_that_are_no_numbers_are_an_error(token_file, tmp_path):
    path = save_tiny(tmp_path, "llama", shard="1GB")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.lm_head.weight.data[3, 3] = float("nan")
    model.save_pretrained(path)
    with pytest.raises(NumberError, match="NaN"):
        evaluate_model(opened(path), rows(token_file))


def test_the_error_of_a_perplexity_is_that_of_a_mean():
    values = np.array([1.0, 2.0, 4.0])
    mean, error = perplexity(values)
    assert mean == pytest.approx(math.exp(7 / 3))
    assert error == pytest.approx(mean * values.std(ddof=1) / math.sqrt(3))


@pytest.mark.slow
@pytest.mark.real
def test_real_text_in_one_piece(shared):
    """WikiText-2 is tokenized whole, as by the paper's code: no special token and no cut within it."""
    path = shared / "models/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = shared / "corpora/wikitext-2/wiki.test.raw"
    text = windows([str(file)], lambda line: tokenizer(line)["input_ids"], length=512, vocabulary=512)
    expected = tokenizer(file.read_text("utf-8"))["input_ids"]
    assert np.array_equal(text.tokens.reshape(-1), expected[: text.tokens.size])
