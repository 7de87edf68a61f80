"""The fixtures of all tests: tiny checkpoints, tokens, and the way to shared/."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # for processes: the load does not count
with pytest.MonkeyPatch.context() as environment, suppress(ImportError):
    if not torch.cuda.is_available():
        environment.setenv("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported, be it by transformers
    import triton  # noqa: F401

import numpy as np
from helpers import SHARED, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function: family -> directory of its tiny checkpoint, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama in bfloat16, where a test file makes no source of its own."""
    return save_tiny(tmp_path_factory.mktemp("source"), "llama", torch.bfloat16)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory):
    """Six sequences of 16 token ids, as .npy."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (6, 16)))
    return path


@pytest.fixture(scope="session")
def shared():
    """The folder of real models; the test is skipped where it is not."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared with real models beside this checkout")
    return SHARED
