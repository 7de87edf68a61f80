"""Experts in groups: a block larger than memory gives the bytes that it gives whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digests

from lowmem_wanda import check, evaluate, imatrix, prune
from lowmem_wanda.streaming import placement


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    """Twenty-two sequences of 16 token ids, so that every expert sees some."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (22, 16)))
    return path


@pytest.fixture
def in_groups(monkeypatch):
    """A function: has all that follows read experts in groups of at most so many bytes, 0 for none."""
    choose = placement.choose

    def set_limit(limit, **more):
        def chosen(work, *args, **kwargs):
            found, need = choose(work, *args, **kwargs)
            return replace(found, part=limit, slots=2, **more), need

        for module in ("pruning.plan", "evaluation.perplexity", "llamacpp.collect"):
            monkeypatch.setattr(f"lowmem_wanda.{module}.choose", chosen)

    return set_limit


WAYS = [
    {},
    {"statistics": "sequential"},
    {"statistics": "dense"},
    {"method": "magnitude"},
    {"method": "sparsegpt"},
    {"method": "sparsegpt", "statistics": "sequential"},
    {"method": "sparsegpt", "statistics": "dense"},
    {"update": "lsq", "exclude": ["*experts.1*"]},
]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_bytes_are_those_of_whole_blocks(tmp_path, tiny, token_file, in_groups, family, way):
    way = {name: value for name, value in way.items() if name != "exclude" or family in ("qwen3_moe", "deepseek_v3")}
    made = {}
    for limit in (0, 1, 30000):
        in_groups(limit)
        sums = tmp_path / f"{limit}.gguf" if family == "qwen3_moe" and way.get("method") != "magnitude" else None
        prune(tiny(family), tmp_path / f"{limit}", text=[token_file], batch=4, imatrix=sums, **way)
        made[limit] = digests(tmp_path / f"{limit}") | ({"sums": sums.read_bytes()} if sums else {})
    assert made[1] == made[0] and made[30000] == made[0]
    assert not check(tmp_path / "1", against=tiny(family)).problems


@pytest.mark.parametrize("way", [{}, {"statistics": "sequential"}, {"method": "sparsegpt"}], ids=str)
def test_the_bytes_are_the_same_where_what_waits_is_parked(tmp_path, tiny, token_file, in_groups, monkeypatch, way):
    moved = []
    resize = torch.UntypedStorage.resize_
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda self, size: moved.append(size) or resize(self, size))
    for parked in (False, True):
        in_groups(1, parked=parked, states="file" if parked else "device", held=2)
        prune(tiny("deepseek_v3"), tmp_path / f"{parked}", text=[token_file], batch=4, **way)
        assert bool(moved) is parked
    assert digests(tmp_path / "True") == digests(tmp_path / "False")
    assert moved.count(0) == len(moved) / 2  # all of it has come back


def test_figures_are_those_of_whole_blocks(tmp_path, tiny, token_file, in_groups):
    found = []
    for limit in (0, 1):
        in_groups(limit)
        file = tmp_path / f"{limit}.gguf"
        imatrix(tiny("qwen3_moe"), file, text=[token_file], length=16, batch=4)
        found.append(
            (evaluate(tiny("qwen3_moe"), text=[token_file], length=16, batch=4)["perplexity"], file.read_bytes())
        )
    assert found[0] == found[1]


def test_a_job_goes_on_with_other_groups(tmp_path, tiny, token_file, in_groups):
    def stop(record):
        raise KeyboardInterrupt

    settings = {"text": [token_file], "batch": 4, "statistics": "sequential"}
    in_groups(0)
    prune(tiny("qwen3_moe"), tmp_path / "whole", **settings)
    in_groups(1)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny("qwen3_moe"), tmp_path / "cut", **settings, on_block=stop)
    in_groups(30000)
    prune(tiny("qwen3_moe"), tmp_path / "cut", **settings)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
