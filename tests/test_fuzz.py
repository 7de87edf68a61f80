"""Every reader on files that are changed at random: a result, or one of our errors, soon. `make fuzz` for FUZZ_MINUTES.

The seeds are whole files that tests make; each is changed by a few flips, cuts, repeats and extreme numbers.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import moe_ggufs
import numpy as np
import pytest
from helpers import save_tiny

from lowmem_wanda import Checkpoint, LowmemError, check, check_gguf, outline, prune
from lowmem_wanda import plan as plan_of
from lowmem_wanda.data.documents import documents_of
from lowmem_wanda.data.token_ids import load_ids
from lowmem_wanda.llamacpp.imatrix import read
from lowmem_wanda.sparsity.expert_plan import kept_experts

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
FEW = 40  # changes of each seed where no minutes are given
SLOW = 20  # seconds that one file may take
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF]


def changed(data: bytes, random_: random.Random) -> bytes:
    """The bytes with one to four changes."""
    made = bytearray(data)
    for _ in range(random_.randrange(1, 5)):
        if not made:
            break
        at, kind = random_.randrange(len(made)), random_.randrange(6)
        if kind == 0:
            made[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            made[at] = random_.choice(EXTREMES)
        elif kind == 2:
            del made[at : at + random_.randrange(1, 64)]
        elif kind == 3:
            made[at:at] = made[at : at + random_.randrange(1, 64)] * random_.randrange(1, 20)
        elif kind == 4:
            made[at : at + 8] = random_.choice([0, 1 << 31, 1 << 62, (1 << 64) - 1]).to_bytes(8, "little")
        else:
            del made[at:]
    return bytes(made)


def seeds(folder: Path):
    """{name: (a whole file, what reads a changed one at a path)}."""
    source = save_tiny(folder / "source", "llama", shard="20KB")
    one = save_tiny(folder / "one", "llama", shard="1GB")
    prune(source, folder / "pruned", method="magnitude", device="cpu")
    model = moe_ggufs.write(folder / "model.gguf", "deepseek2", 8, layers=2, used=1)
    matrix = moe_ggufs.write_imatrix(folder / "imatrix.gguf", model)
    np.save(folder / "ids.npy", np.arange(64).reshape(4, 16))
    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": f"a text {place}", "n": [place]}) for place in range(9))
    )
    (folder / "chat.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "hi"}]}] * 3))
    (folder / "utf16.txt").write_bytes(("ein Text mit Umläuten äöü\n" * 20).encode("utf-16"))
    (folder / "plan.json").write_text(json.dumps({"0": [0, 1], "1": [2, 3], "layer_2": {"pruned_experts": [0, 1]}}))

    def in_place_of(root, name, work):
        def at(path):
            held = folder / "copy"
            shutil.rmtree(held, ignore_errors=True)
            shutil.copytree(root, held)
            shutil.copy(path, held / name)
            return work(held)

        return root / name, at

    def resumed(held):
        (held / "config.json").unlink(missing_ok=True)
        return prune(source, held, method="magnitude", device="cpu")

    def texts(path):
        return [reader() for reader in documents_of(path).readers]

    def plan(path):
        return kept_experts(json.loads(path.read_bytes()), [0, 1, 2], 8)

    index = "model.safetensors.index.json"
    return {
        "shard": in_place_of(one, "model.safetensors", Checkpoint),
        "index": in_place_of(source, index, Checkpoint),
        "config": in_place_of(one, "config.json", lambda held: plan_of(held, method="magnitude", device="cpu")),
        "job": in_place_of(folder / "pruned", "job.json", resumed),
        "report": in_place_of(folder / "pruned", "report.json", check),
        "gguf": (model, outline),
        "imatrix": (matrix, read),
        "proof": (model, lambda path: check_gguf(path, model)),
        "ids": (folder / "ids.npy", load_ids),
        "rows": (folder / "rows.jsonl", texts),
        "chats": (folder / "chat.json", texts),
        "utf16": (folder / "utf16.txt", texts),
        "plan": (folder / "plan.json", plan),
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs alarms")
def test_changed_files_give_a_result_or_a_sentence(tmp_path):
    def late(*_):
        raise AssertionError(f"took more than {SLOW} s")

    made, seed, end = seeds(tmp_path), 0, time.monotonic() + 60 * MINUTES
    signal.signal(signal.SIGALRM, late)
    while seed < FEW * len(made) if not MINUTES else time.monotonic() < end:
        name = list(made)[seed % len(made)]
        file, work = made[name]
        path = tmp_path / f"changed{file.suffix}"
        path.write_bytes(changed(file.read_bytes(), random.Random(seed)))
        signal.alarm(SLOW)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                work(path)
        except LowmemError:
            pass
        except ValueError as error:
            assert name == "plan" and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)), (seed, name)
        except BaseException:
            shutil.copy(path, f"fuzz-{name}-{seed}{file.suffix}")  # to be looked at
            raise
        finally:
            signal.alarm(0)
        seed += 1
    assert seed >= FEW or MINUTES
