"""The choice of experts: counts, ranks, groups, scores, and plans in the forms that people publish."""

import numpy as np
import pytest

from lowmem_wanda.errors import PatternError
from lowmem_wanda.sparsity.expert_plan import kept_experts
from lowmem_wanda.sparsity.experts import aimer, highest, kept_count, output_norms


@pytest.mark.parametrize(
    ("count", "drop", "kept"),
    [(128, "25%", 96), (128, "20%", 103), (64, 0.5, 32), (64, "0.29", 46), (100, "29%", 71), (64, "12", 52), (64, 1, 63), (8, "12.5 %", None)],
)  # fmt: skip
def test_a_share_is_rounded_down_to_whole_experts(count, drop, kept):
    if kept is None:
        with pytest.raises(PatternError, match="neither a share"):
            kept_count(count, drop)
    else:
        assert kept_count(count, drop) == kept


@pytest.mark.parametrize(
    ("drop", "keep", "message"),
    [
        (None, None, "one of both"), ("25%", 12, "one of both"), ("110%", None, "between 0 and 1"), ("1.0", None, "between"),
        ("-3", None, "neither a share"), ("many", None, "neither a share"), ("16", None, "none would be kept"),
        ("5%", None, "none is removed"), ("0", None, "none is removed"), (None, 16, "none is removed"), (None, 0, "none would"),
        (None, 4.9, "give a whole number"), (None, True, "give a whole number"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(drop, keep, message):
    with pytest.raises(PatternError, match=message):
        kept_count(16, drop, keep)


def test_the_highest_scores_are_kept_and_ties_go_to_the_lower_id():
    assert highest(np.array([1.0, 3.0, 2.0, 3.0]), 2) == (1, 3)
    assert highest(np.array([1.0, 1.0, 1.0, 1.0]), 2) == (0, 1)
    assert highest(np.array([-np.inf, 0.0, 5.0, 1.0]), 3) == (1, 2, 3)


def test_each_group_keeps_as_many():
    assert highest(np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 4, groups=2) == (0, 1, 4, 5)


def test_output_norms_are_those_of_uncorrelated_inputs():
    random = np.random.default_rng(0)
    weight, inputs = random.standard_normal((40, 6)), random.standard_normal((200_000, 6)) * [1, 2, 3, 1, 2, 3]
    estimate = output_norms(np.array([200_000]), np.square(inputs).mean(0)[None], np.square(weight).sum(0)[None])
    assert estimate[0] == pytest.approx(200_000 * np.sqrt(np.square(inputs @ weight.T).sum(1).mean()), rel=0.01)


def test_aimer_is_mean_over_root_mean_square():
    weights = np.array([[1.0, -1.0, 1.0, -1.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = aimer(np.abs(weights).sum(1), np.square(weights).sum(1), np.full(3, 4.0))
    assert scores.tolist() == [-1.0, -0.5, -np.inf]  # the highest ratio is dropped, before it what is all zeros


KEPT = {1: (0, 2, 3), 2: (1, 2, 5)}
FORMS = {
    "ids": {"1": [0, 2, 3], "2": [5, 2, 1]},
    "names of layers": {"model.layers.1.mlp": [0, 2, 3], "model.layers.2.mlp": [1, 2, 5]},
    "under a key": {"retained_experts": {"1": [0, 2, 3], "2": [1, 2, 5]}, "num_experts": 6, "pruned_share": 0.5},
    "by layer": {"old_num_experts": 6, "model_moe_layers": [1, 2], "kept_by_layer": {"1": [0, 2, 3], "2": [1, 2, 5]}},
    "records": {
        "layers": {"1": {"kept_experts": [0, 2, 3]}, "2": {"kept_experts": [1, 2, 5], "ranked_scores": [0.1] * 6}}
    },
    "a list of records": [{"layer": 1, "kept": [0, 2, 3]}, {"layer": 2, "kept": [1, 2, 5]}],
    "records in a list": {"selection": [{"layer": 1, "kept": [0, 2, 3]}, {"layer": 2, "kept": [1, 2, 5]}]},
    "lists of layers with experts": [[0, 2, 3], [1, 2, 5]],
    "lists of all blocks": [[], [0, 2, 3], [1, 2, 5]],
    "lists with null": {"kept_experts": [None, [0, 2, 3], [1, 2, 5], None]},
    "what is dropped": {"pruned_experts": {"1": [1, 4, 5], "2": [0, 3, 4]}},
    "both": {"kept_experts": {"1": [0, 2, 3], "2": [1, 2, 5]}, "pruned_experts": {"1": [1, 4, 5], "2": [0, 3, 4]}},
    "both in records": {"1": {"kept": [0, 2, 3], "dropped": [1, 4, 5]}, "2": {"experts_to_prune": [0, 3, 4]}},
}


@pytest.mark.parametrize("content", FORMS.values(), ids=list(FORMS))
def test_published_forms_of_a_plan_are_read(content):
    assert kept_experts(content, [1, 2], 6) == KEPT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metric": "reap"}, "no ids of experts"), ([1, 2, 3], "no ids of experts"), ("text", "no ids of experts"),
        ({"1": [0, 0, 2]}, "layer 1: an expert stands in it twice"), ({"1": [0, 6]}, "names expert 6, the model has 0 to 5"),
        ({"1": [0, -1]}, "names expert -1"), ({"7": [0, 1]}, "names layer 7, which has no experts in this model"),
        ([[0, 1]] * 5, "has 5 lists, the model has 2 layers with experts"), ([[0, 1], [1], [2]], "has 3 lists"),
        ([{"kept": [1]}], "does not say its layer"), ([{"layer": 1, "kept": [0]}, {"layer": 1, "kept": [1]}], "its layer"),
        ({"kept": {"1": [0, 1]}, "pruned": {"1": [2, 3]}}, "are not all of its 6 experts"),
        ({"a": 1, "kept": {"1": [0, 1], "layer_1": [0, 2]}}, "two lists of ids, which differ"),
        ({"1": [0.5, 0.2]}, "no ids of experts"), ({"1": ["0", "1"]}, "no ids of experts"), ({"1": [True, False]}, "no ids"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_in_words(content, message):
    with pytest.raises(PatternError, match=message):
        kept_experts(content, [1, 2], 6)


def test_a_bare_list_in_a_file_named_for_what_is_dropped_is_refused():
    bare = {"1": [0, 2, 3], "2": [1, 2, 5]}
    for name in ("pruned_expert_indices.json", "dropped.json", "experts_to_prune.json"):
        with pytest.raises(PatternError, match="its name says that it lists what is dropped"):
            kept_experts(bare, [1, 2], 6, name)
    for name in ("plan.json", "retained_expert_indices.json", "pruned_model_kept.json"):
        assert kept_experts(bare, [1, 2], 6, name) == KEPT
    assert kept_experts({"kept": bare}, [1, 2], 6, "pruned_experts.json") == KEPT


A, B = [0, 1, 2], [3, 4, 5]


@pytest.mark.parametrize(
    "content",
    [
        {"pruned_experts_layer_1": B, "pruned_experts_layer_2": A}, {"layer_1_dropped": B, "layer_2_dropped": A},
        {"model.layers.1.mlp.pruned_experts": B, "model.layers.2.mlp.pruned_experts": A},
    ],
)  # fmt: skip
def test_the_word_in_a_numbered_key_counts(content):
    assert kept_experts(content, [1, 2], 6) == {1: (0, 1, 2), 2: (3, 4, 5)}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"unpruned_experts": {"1": A, "2": B}}, ""), ({"not_kept": {"1": A, "2": B}}, ""),
        ({"prune_ratio": 0.5, "layers": {"1": A, "2": B}}, "pruned_experts.json"),
        ([{"layer": 1, "experts": A}, {"layer": 2, "experts": B}], "dropped.json"),
        ({"action": "drop", "layers": {"1": A, "2": B}}, ""), ({"pruned": True, "experts": {"1": A, "2": B}}, ""),
        ({"layers": [2, 1], "experts": [A, B]}, ""), ({"layers": {"1": {"kept_counts": A}, "2": {"kept_counts": B}}}, ""),
    ],
)  # fmt: skip
def test_what_could_mean_two_things_is_refused(content, name):
    with pytest.raises(PatternError):
        kept_experts(content, [1, 2], 6, name)


@pytest.mark.parametrize("lists", [[[0, 1], [0, 2]], [[], [0, 1], [0, 2]], {"experts": [[0, 1], [0, 2]]}])
def test_a_list_may_leave_out_layers_that_do_not_run(lists):
    assert kept_experts(lists, [1, 2, 3], 4, running=[1, 2]) == {1: (0, 1), 2: (0, 2)}
    with pytest.raises(PatternError, match="the model has 3 layers"):
        kept_experts(lists, [1, 2, 3], 4)


def test_a_key_of_very_many_digits_is_refused_in_words():
    with pytest.raises(PatternError, match="which has no experts in this model"):
        kept_experts({"9" * 5000: [0, 1]}, [0], 4)
