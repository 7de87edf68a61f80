"""Masks against slow loops, ties, zeros, bits."""

import numpy as np
import pytest
import torch

from lowmem_wanda.errors import NumberError, PatternError
from lowmem_wanda.sparsity import host
from lowmem_wanda.sparsity.masks import masks, prune_lowest, survey
from lowmem_wanda.sparsity.patterns import NM, Unstructured, parse
from lowmem_wanda.sparsity.selection import Scaled, kth_smallest


def slow_lowest(score, count):
    """Indices of the `count` lowest of a list, ties to the lowest index."""
    return set(sorted(range(len(score)), key=lambda index: (score[index], index))[:count])


def scores(rows, columns, values):
    """Random scores; few distinct values make many ties."""
    return torch.from_numpy(
        np.random.default_rng(rows * columns).integers(0, values, (rows, columns)).astype(np.float32)
    )


def mask_of(score, pattern, chunk):
    """The mask in torch, as for a GPU; it must be the mask on the host."""
    found = torch.cat([mask for _, mask in masks(lambda rows: score[rows], pattern, *score.shape, chunk)])
    weight = torch.ones_like(score)
    assert prune_lowest(weight, lambda rows: score[rows], pattern, chunk)[1]
    assert torch.equal(weight == 0, found)
    return found


@pytest.mark.parametrize("values", [3, 10**6])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.6, 0.99])
def test_rows_lose_exactly_their_lowest(values, sparsity):
    score = scores(7, 50, values)
    for row, pruned in zip(score.tolist(), mask_of(score, Unstructured(sparsity), 100), strict=True):
        assert set(pruned.nonzero().flatten().tolist()) == slow_lowest(row, int(50 * sparsity))


@pytest.mark.parametrize("values", [3, 10**6])
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4), (3, 4), (5, 16), (8, 32)])
def test_groups_lose_exactly_their_lowest(values, kept, of):
    score = scores(6, 96, values)
    mask = mask_of(score, NM(kept, of), 200).reshape(-1, of)
    for group, pruned in zip(score.reshape(-1, of).tolist(), mask, strict=True):
        assert set(pruned.nonzero().flatten().tolist()) == slow_lowest(group, of - kept)


@pytest.mark.parametrize("values", [3, 10**6])
def test_a_matrix_loses_all_up_to_the_papers_threshold(values):
    score = scores(9, 40, values) / 7
    threshold = score.flatten().sort().values[int(score.numel() * 0.5)]
    assert torch.equal(mask_of(score, Unstructured(0.5, "matrix"), 100), score <= threshold)


@pytest.mark.parametrize("k", [0, 1, 500, 998, 999])
def test_radix_select_is_the_sorted_value(k):
    score = torch.cat([torch.rand(900) * 1e-30, torch.rand(50) * 1e30, torch.zeros(25), torch.full((25,), 1e-45)])
    expected = score.sort().values[k]
    assert kth_smallest(lambda: iter(score.split(77)), k) == expected
    for dtype in ("uint32", "uint16"):
        keys = (score.numpy().view("uint32") >> (0 if dtype == "uint32" else 16)).astype(dtype)
        assert host.kth_key(lambda: iter(np.split(keys, 4)), k) == np.sort(keys)[k]  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(3, 16), NM(8, 32), Unstructured(0.5), Unstructured(0.6), Unstructured(0.5, "matrix")]
)
def test_scores_of_any_dtype_are_compared_as_float32(dtype, scaled, transposed, pattern):
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(64, 96, generator=generator) * 4).round().to(dtype)
    stored[:, 7], stored[3], stored[5, 9] = 1e-40, -0.0, 60000
    weight = stored[:, :64].t() if transposed else stored
    norms = torch.rand(weight.shape[1], generator=generator) if scaled else None
    score = weight.double().abs().float() * (1 if norms is None else norms)
    expected = torch.where(mask_of(score, pattern, 500), 0, weight)
    zeros, holds = prune_lowest(weight, Scaled(weight, norms), pattern, 500)
    assert torch.equal(weight, expected) and zeros == int((expected == 0).sum()) and holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.5, "matrix")])
def test_kept_weights_keep_their_bits_and_zeros_are_positive(dtype, transposed, pattern):
    stored = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, before = (stored.t(), stored.t().clone()) if transposed else (stored, stored.clone())
    prune_lowest(weight, lambda rows: weight[rows].float().abs(), pattern, chunk=100)  # several chunks
    pruned = weight == 0
    assert torch.equal(weight[~pruned], before[~pruned])
    assert not torch.signbit(weight[pruned]).any()
    zeros, holds = survey(weight, pattern, chunk=100)
    assert holds and zeros == int(pruned.sum()) >= weight.numel() // 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.5, "matrix")])
def test_nan_and_infinity_stop(bad, dtype, pattern):
    for norms in (None, torch.ones(8)):
        weight = torch.ones(4, 8, dtype=dtype)
        weight[2, 3] = bad
        for score in (Scaled(weight, norms), lambda rows: weight[rows].float().abs()):  # noqa: B023
            with pytest.raises(NumberError):
                prune_lowest(weight, score, pattern)
            weight[2, 3] = bad
    weight = torch.full((4, 8), 3e4, dtype=dtype)
    with pytest.raises(NumberError):  # the product is more than float32 holds
        prune_lowest(weight, Scaled(weight, torch.full((8,), 1e35)), pattern)


def test_survey_sees_a_missing_zero():
    weight = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 1]])
    assert survey(weight, NM(2, 4)) == (3, False)
    assert survey(weight, Unstructured(0.5)) == (3, False)
    assert survey(weight, Unstructured(0.5, "matrix")) == (3, False)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("4:8", NM(4, 8)),
        ("0.5", Unstructured(0.5)),
        ("60%", Unstructured(0.6)),
        (".5", Unstructured(0.5)),
    ],
)
def test_parse(text, pattern):
    assert parse(text) == pattern
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2:", "50", "0", "1.0", "100%", "-0.5", "nan", "2:4:8", ""])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(PatternError, match="pattern"):
        parse(text)


def test_nm_takes_no_group():
    with pytest.raises(PatternError, match="groups of its own"):
        parse("2:4", "matrix")


def test_columns_must_divide():
    with pytest.raises(PatternError, match=r"down_proj.*172 inputs.*--exclude"):
        NM(4, 8).require_shape("down_proj", 64, 172)
    with pytest.raises(PatternError, match="less than one weight"):
        Unstructured(0.01).require_shape("q", 64, 64)


@pytest.mark.parametrize(("kept", "of"), [(1, 257), (1, 256), (255, 256), (40, 344), (200, 300), (300, 700)])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_any_size_hold(kept, of, transposed):
    torch.manual_seed(0)
    weight = torch.randn(4, 2 * of) + 0.1
    weight = weight.t().contiguous().t() if transposed else weight
    prune_lowest(weight, lambda rows: weight[rows].abs(), NM(kept, of))
    assert survey(weight, NM(kept, of)) == (8 * (of - kept), True)
    weight[1, weight[1].nonzero()[0]] = 0
    assert survey(weight, NM(kept, of)) == (8 * (of - kept) + 1, True)
    weight[2] = 1
    assert not survey(weight, NM(kept, of))[1]
    assert survey(torch.zeros(4, 2 * of), NM(kept, of)) == (8 * of, True)


@pytest.mark.parametrize("text", ["2:" + "9" * 5000, "0." + "9" * 5000, "9" * 5000 + "%", "²:4", "٢:٤"])
def test_patterns_of_many_or_strange_digits_are_refused_in_a_short_line(text):
    with pytest.raises(PatternError) as error:
        parse(text)
    assert len(str(error.value)) < 200
