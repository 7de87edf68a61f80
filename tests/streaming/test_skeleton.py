"""A checkpoint's own code is run, and copied, only when it is trusted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_own_code_needs_trust(tmp_path, token_file):
    source = save_tiny(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (source / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (source / "own.py").write_text(CODE)
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        str(root / "cli.py"),
        "prune",
        str(source),
        str(tmp_path / "out"),
        "--text",
        str(token_file),
    ]
    settings = {"env": os.environ | {"HF_HOME": str(tmp_path / "cache")}, "capture_output": True, "text": True}
    refused = subprocess.run(command, **settings)
    assert refused.returncode == 1 and "--trust-remote-code" in refused.stderr and not (tmp_path / "out").exists()
    trusted = subprocess.run([*command, "--trust-remote-code"], **settings)
    assert trusted.returncode == 0, trusted.stderr
    assert (tmp_path / "out" / "own.py").read_text() == CODE


def test_what_is_larger_than_memory_is_built_without_it():
    from lowmem_wanda.streaming.building import without_memory

    with without_memory():
        stack = torch.nn.Parameter(torch.empty(1 << 20, 1 << 10, 1 << 10))
        linear = torch.nn.Linear(1 << 18, 1 << 18)
        small = torch.empty(3, 4)
    assert stack.is_meta and linear.weight.is_meta and not small.is_meta
