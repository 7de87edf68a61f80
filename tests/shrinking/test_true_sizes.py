"""Plans of removing experts of published mixtures, from headers of their true size, without data."""

import numpy as np
import pytest
from true_sizes import PUBLISHED, headers

from lowmem_wanda import Checkpoint, plan_shrink


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_fits_a_card_of_24_gb_and_32_gb_of_memory(tmp_path, name):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 1000, (128, 2048)))
    source = headers(tmp_path / name, name, PUBLISHED[name].get("first_k_dense_replace", 0) + 1)
    made = plan_shrink(source, drop_experts="25%", text=[tmp_path / "ids.npy"], vram="24GB", ram="32GB")
    whole = Checkpoint(source).nbytes
    assert made.host_peak < 32e9 * 0.95 and made.device_peak < 24e9 * 0.95
    assert made.kept == made.experts * 3 // 4 and made.before == whole and made.after == made.written
    assert whole <= made.read <= whole + made.after
    assert made.tokens_per_expert == made.tokens * made.used / made.experts > 100
