"""One model type, proved: a tiny checkpoint is pruned by the library and compared with a plain whole-model Wanda.

The outcome is "verified", "refused" (in the library's own sentence), "crashed" (with a traceback, or refused
after the work: a bug of ours),
"WRONG" (with what differs), "unproved" (transformers itself does not run the model on text), or "not built" (with what
transformers says).
"""

import json
import math
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families.build import IMAGES, NEEDS_MORE, SPECIAL, NotBuilt, build
from families.reference import load, reference
from safetensors import safe_open

from lowmem_wanda import check, evaluate, prune
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.errors import LowmemError
from lowmem_wanda.streaming.head import Head
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import open_model
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import advance, streamed
from lowmem_wanda.streaming.workload import Workload

VERIFIED, REFUSED, CRASHED, WRONG, NOT_BUILT = "verified", "refused", "crashed", "WRONG", "not built"
UNPROVED = "unproved"
SEQUENCES, LENGTH, BATCH = 4, 32, 2
Result = dict[str, Any]


def verify(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Result:
    """The outcome of a type, and what was found. `folder` must be new or empty."""
    try:
        path = build(folder / "source", family, dtype, **changes)
    except NotBuilt as error:
        return {"outcome": NOT_BUILT, "reason": str(error)}
    found = verify_checkpoint(path, folder, family.startswith(IMAGES))
    if family in NEEDS_MORE and found["outcome"] == CRASHED and "pruned" in found:
        return found | {
            "outcome": UNPROVED,
            "reason": f"transformers itself does not run it on text alone: {last(found)}",
        }
    return found


def last(found: Result) -> str:
    """The last line of a traceback."""
    return found["reason"].strip().splitlines()[-1]


@torch.no_grad()
def verify_checkpoint(
    path: Path, folder: Path, images: bool = False, spoil: Callable[[Path], None] | None = None
) -> Result:
    """The outcome of a checkpoint. `spoil` may change the pruned one before it is looked at."""
    tokens = np.random.default_rng(0).integers(3, SPECIAL, (SEQUENCES, LENGTH))
    np.save(folder / "ids.npy", tokens)
    out, ids = folder / "pruned", [folder / "ids.npy"]
    try:
        report = prune(
            path, out, pattern="2:4", text=ids, sequences=SEQUENCES, length=LENGTH, batch=BATCH, device="cpu"
        )
    except LowmemError as error:
        if out.exists():
            return {"outcome": CRASHED, "reason": f"refused after the work: {error}"}
        return {"outcome": REFUSED, "reason": str(error)}
    except Exception:  # which the library must not raise
        return {"outcome": CRASHED, "reason": traceback.format_exc()}
    if spoil:
        spoil(out)
    result: Result = facts(report)
    batches = [torch.from_numpy(part) for part in in_batches(tokens, BATCH)]
    wrong: list[str] = compare_files(path, out, report)
    try:
        state, logits = reference(path, batches, report["left_dense"], folder / "marked", images)
        wrong += compare_states(state, load(out, images))
        wrong += [f"check: {problem}" for problem in check(out, against=path).problems]
        wrong += compare_logits(path, tokens, logits, result)
        wrong += compare_perplexity(out, ids, batches, images, result)
    except Exception:  # of the library, of transformers, or of the reference: for a person to see
        return result | {"outcome": CRASHED, "reason": traceback.format_exc(), "wrong": wrong}
    return result | {"outcome": WRONG if wrong else VERIFIED, "reason": "; ".join(wrong)}


def facts(report: Any) -> Result:
    """What the report says of the model: how much is pruned, what is left dense and how experts were scored."""
    linears = {name: one for block in report["blocks"] for name, one in block["linears"].items()}
    few = [one["scored_by"] for one in linears.values() if "scored_by" in one]
    return {
        "pruned": len(linears),
        "experts": sum("expert" in one for one in linears.values()),
        "few": {why: few.count(why) for why in sorted(set(few))},
        "left_dense": report["left_dense"],
        "warnings": len(report.get("warnings", [])),
    }


def compare_files(path: Path, out: Path, report: Any) -> list[str]:
    """What the output's files have that a pruned copy must not have: other names, shapes, dtypes, bytes or config."""
    wrong = []
    if json.loads((path / "config.json").read_bytes()) != json.loads((out / "config.json").read_bytes()):
        wrong.append("config.json differs")
    source, pruned = tensors_of(path), tensors_of(out)
    if source.keys() != pruned.keys():
        return [*wrong, f"tensors {sorted(source.keys() ^ pruned.keys())[:4]} are in one of the two"]
    linears = {name: one for block in report["blocks"] for name, one in block["linears"].items()}
    named = {one.get("tensor", name) for name, one in linears.items()}
    for name, tensor in source.items():
        other = pruned[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            wrong.append(f"{name}: {tensor.shape} {tensor.dtype} became {other.shape} {other.dtype}")
        elif name not in named and not same_bits(tensor, other):
            wrong.append(f"{name}: is not pruned by the report, and differs")
        elif name in named and not bool(((other == tensor) | (other == 0)).all()):
            wrong.append(f"{name}: kept weights differ")
    return wrong


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def compare_states(state: dict[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """Where the output, as transformers loads it, is not the reference."""
    found = model.state_dict()
    wrong = [f"{name}: is in one of the two" for name in sorted(state.keys() ^ found.keys())]
    for name in sorted(state.keys() & found.keys()):
        if not torch.equal(state[name], found[name]):
            zeros = [int((one[name] == 0).sum()) for one in (found, state)]
            unlike = int(((found[name] == 0) != (state[name] == 0)).sum())
            wrong.append(f"{name}: {zeros[0]} zeros for {zeros[1]}, {unlike} of {state[name].numel()} elsewhere")
    return wrong


def compare_logits(path: Path, tokens: np.ndarray, expected: list[torch.Tensor], result: Result) -> list[str]:
    """Where the dense model's streamed logits are not the whole model's."""
    model = open_model(path, Machine.of(device="cpu", batch=BATCH))
    placement, _ = choose(Workload((model,), *tokens.shape))
    most = 0.0
    with streamed(model, batches=in_batches(tokens, BATCH), placement=placement) as stream:
        stream.walk(advance)
        (decoder,), (parts,) = stream.decoders, stream.states
        try:
            head = Head(decoder, 1 << 20)
            head.load(slice(0, head.rows))
            found = [decoder.finish(part) for part in parts]
        except LowmemError as error:
            result["logits"] = str(error)
            return []
    for part, logits in zip(found, expected, strict=True):
        if not torch.equal(part.view_as(logits), logits):
            most = max(most, float((part.view_as(logits) - logits).abs().nan_to_num(math.inf).max()))
    result["logits"] = most
    return [f"streamed logits differ by up to {most:.3g}"] if most else []


def compare_perplexity(
    out: Path, ids: list[Path], batches: list[torch.Tensor], images: bool, result: Result
) -> list[str]:
    """Where the library's perplexity of the output is not that of transformers."""
    try:
        found = evaluate(out, text=ids, length=LENGTH, batch=BATCH, device="cpu")["perplexity"]
    except LowmemError as error:
        result["perplexity"] = str(error)
        return []
    model, losses = load(out, images), []
    for tokens in batches:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        )
    expected = float(torch.cat(losses).double().mean().exp())
    result["perplexity"] = found
    return (
        [] if math.isclose(found, expected, rel_tol=1e-5) else [f"perplexity {found:.6g}, transformers' {expected:.6g}"]
    )


def verify_apart(family: str, dtype: torch.dtype = torch.float32) -> Result:
    """The outcome of a type, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="family-") as folder:
        return verify(family, Path(folder), dtype)
