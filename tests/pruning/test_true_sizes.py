"""Plans of published mixtures of experts, from headers of their true size, without data."""

import os

import numpy as np
import pytest
from true_sizes import PUBLISHED, headers

from lowmem_wanda import Checkpoint, plan
from lowmem_wanda.errors import BudgetError

ALL = "TRUE_SIZES" in os.environ  # of their blocks; else the dense ones and one of experts: depth changes no memory


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function: name -> folder of its headers, made once; and the file of 128 sequences of 2048 ids."""
    folder = tmp_path_factory.mktemp("published")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 1000, (128, 2048)))

    def made(name):
        path, blocks = folder / name, PUBLISHED.get(name, {}).get("first_k_dense_replace", 0) + 1
        return path if path.exists() else headers(path, name, None if ALL else blocks)

    return made, [folder / "ids.npy"]


@pytest.mark.parametrize(
    ("name", "statistics"), [*((name, "block") for name in PUBLISHED), ("DeepSeek-V3", "sequential")]
)
def test_it_fits_a_card_of_24_gb_and_32_gb_of_memory(published, name, statistics):
    source, text = published
    made = plan(source(name), text=text, statistics=statistics, vram="24GB", ram="32GB")
    assert made.host_peak < 32e9 * 0.95 and made.device_peak < 24e9 * 0.95
    assert made.read == made.written == Checkpoint(source(name)).nbytes
    assert made.flops < 2 * made.prunable * made.tokens  # not all experts on all tokens


@pytest.mark.parametrize("statistics", ["block", "sequential"])
@pytest.mark.parametrize(
    "way", [{}, {"method": "sparsegpt"}, {"method": "alps"}, {"update": "lsq"}, {"refine": "swaps"},
            {"recover": "block"}, {"quality": "best"}], ids=lambda way: "-".join(way.values())
)  # fmt: skip
def test_every_method_fits_a_70b_model_into_24_gb(published, way, statistics):
    source, text = published
    made = plan(source("Llama-3.1-70B"), text=text, statistics=statistics, vram="24GB", ram="32GB", **way)
    assert made.host_peak < 32e9 * 0.95 and made.device_peak < 24e9 * 0.95


def test_better_methods_hold_one_expert_s_statistic(published):
    source, text = published
    made = plan(source("DeepSeek-V3"), text=text, method="alps", statistics="sequential", vram="24GB", ram="32GB")
    assert made.layout.part and made.device_peak < 24e9 * 0.95


def test_what_does_not_fit_is_refused_with_what_would(published):
    source, text = published
    with pytest.raises(
        BudgetError, match=r"--vram: 7600 MB cannot be kept, \d+ MB would fit .* --statistics sequential"
    ):
        plan(source("Kimi-K2"), text=text, vram="8GB", ram="32GB")
