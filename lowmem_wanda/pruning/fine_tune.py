"""`recover`: a pruned checkpoint is fine-tuned as a whole, its zeros are held, and a new checkpoint is written."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem_wanda.checkpoint.checksum import checksum_in, sha256_of
from lowmem_wanda.checkpoint.companions import REPORT, companions
from lowmem_wanda.checkpoint.directory import CONFIG, INDEX, Checkpoint
from lowmem_wanda.checkpoint.output import require_disk, require_finished, require_outside
from lowmem_wanda.checkpoint.pruned import promises_of, read_report
from lowmem_wanda.checkpoint.reader import read_header
from lowmem_wanda.checkpoint.writer import copy_file, explained, write_json, write_shard
from lowmem_wanda.data.calibration import Calibration, calibrate, name_list, require_counts
from lowmem_wanda.errors import CalibrationError, CheckpointError, OutputError
from lowmem_wanda.llamacpp.survive import outlook
from lowmem_wanda.pruning.records import PruneReport
from lowmem_wanda.pruning.report import MOVED
from lowmem_wanda.streaming.buffers import raw
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, open_model
from lowmem_wanda.streaming.walk import Notify, ignore

HELD_OUT = 10  # one of so many sequences is not trained on
LORA_RATE, FULL_RATE = 2e-4, 2e-5


def recover(
    source: str | Path,
    target: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    full: bool = False,
    rank: int = 16,
    steps: int = 200,
    learning_rate: float | None = None,
    batch: int = 8,
    sequences: int = 1024,
    length: int = 512,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_start: Notify = ignore,
    on_step: Notify = ignore,
    on_report: Notify = ignore,
) -> PruneReport:
    """Fine-tunes a pruned checkpoint with its zeros held, and writes the result as a new checkpoint.

    The whole model is in memory, in float32: on the GPU where there is one. LoRA adapters are masked like the matrices
    that they are merged into, so the merged checkpoint is the trained model and as sparse as the pruned one.

    Args:
        source: the folder of a checkpoint that `prune` wrote.
        target: a new or empty folder.
        text: what is trained on: files of text or token ids, or "c4", "wikitext2".
        full: whether all weights of the blocks are trained in place of adapters (default: False).
        rank: the rank of the adapters (default: 16).
        steps: the number of steps (default: 200).
        learning_rate: the highest rate (default: 2e-4, with `full` 2e-5).
        batch: the number of sequences in a step (default: 8).
        sequences: the number of sequences, the last tenth of which is held out (default: 1024).
        length: the tokens of each sequence, capped by the model's positions (default: 512).
        seed: the seed of the sample and of the training (default: 0).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        trust_remote_code: run, and copy, Python code that the checkpoint brings (default: False).
        on_start: called once before the work, with a record of what will be done.
        on_step: called after each step, with its `index`.
        on_report: called with the report, just before it is written.

    Returns:
        The report of the pruning with what was changed since, as it stands in report.json.

    Raises:
        CheckpointError: the source is not what `prune` wrote.
        OutputError: the target is not new, or cannot be written.
        NumberError: training diverged.
        LowmemError: any other trouble that a user can mend, in one sentence.

    Example:
        >>> from lowmem_wanda import recover
        >>> report = recover("pruned", "recovered", text=["my.txt"], full=True, steps=2, sequences=20, length=32,
        ...                  device="cpu")
        >>> report["fine_tuning"]["steps"]
        2
    """
    counts = {"--rank": rank, "--steps": steps, "--batch": batch, "--sequences": sequences, "--length": length}
    require_counts(counts)
    rate = learning_rate or (FULL_RATE if full else LORA_RATE)
    model, report = _opened(Path(source), Path(target), Machine.of(device, trust_remote_code=trust_remote_code))
    size = {"sequences": sequences, "length": model.window(length), "seed": seed}
    sample = calibrate(name_list(text), model.encode, vocabulary=model.skeleton.vocabulary, render=model.render, **size)
    held = max(1, len(sample.tokens) // HELD_OUT)
    if len(sample.tokens) <= held:
        raise CalibrationError(f"{', '.join(sample.sources)}: gives one sequence, and one is held out; give more text")
    how: dict[str, Any] = {"rank": None if full else rank, "steps": steps, "rate": rate, "batch": batch, "seed": seed}
    on_start(_about(model, sample, held, how))
    from lowmem_wanda.streaming.fine_tuning import fine_tune  # imports transformers' Trainer

    made = fine_tune(model, promises_of(report), sample.tokens[:-held], sample.tokens[-held:], **how, on_step=on_step)
    report["fine_tuning"] = {
        **{"learning_rate" if name == "rate" else name: value for name, value in how.items()},
        "text": list(sample.sources),
        "sequences": len(sample.tokens) - held,
        "length": sample.tokens.shape[1],
        "held_out": held,
        "before": math.exp(made.before),
        "after": math.exp(made.after),
        "tensors": sorted(made.tensors),
    }
    _write(model.checkpoint, Path(target), made.tensors, report, trust_remote_code, on_report)
    return report  # type: ignore[return-value]


def _opened(source: Path, target: Path, machine: Machine) -> tuple[StreamedModel, dict[str, Any]]:
    """The pruned model and its report. Raises CheckpointError, and OutputError for a target that is not new."""
    require_outside(target, source)
    with explained(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(f"{target}: exists and is not empty; give a new or empty directory")
    require_finished(source)
    report = read_report(source)
    promises = promises_of(report)
    if not promises:
        raise CheckpointError(f"{source}: has no {REPORT} of a pruning; give a folder that prune wrote")
    if any(promise.filled for promise in promises.values()):
        raise CheckpointError(f"{source}: its pruned weights are the smallest numbers, not zeros, which cannot be held")
    return open_model(source, machine), report


def _about(model: StreamedModel, sample: Calibration, held: int, how: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": str(model.checkpoint.path), "device": model.place, "text": list(sample.sources),
        "warnings": list(sample.warnings), "sequences": len(sample.tokens) - held, "held_out": held,
        "length": sample.tokens.shape[1], **how,
    }  # fmt: skip


def _write(
    source: Checkpoint, target: Path, tensors: Mapping[str, torch.Tensor], report: dict[str, Any], code: bool,
    on_report: Notify,
) -> None:  # fmt: skip
    """Writes the checkpoint with some tensors changed, in a folder that takes the target's name when it is whole."""
    require_disk(target, source.nbytes)
    folder = target.with_name(f".{target.name}-{os.getpid()}")
    with explained(target):
        folder.mkdir(parents=True)
    try:
        shards = {}
        for file in source.files:
            pieces = [
                (one, [raw(tensors[one.name]).data] if one.name in tensors else None)
                for one in read_header(file).values()
            ]
            written = write_shard(folder / file.name, pieces, finite=set(tensors))
            shards[file.name] = {"name": file.name, "nbytes": written.nbytes, **written.checksum}
        small = [*companions(source.path, code=code).files, *(Path(INDEX) for _ in source.path.glob(INDEX))]
        for name in sorted(small, key=lambda name: name.name == CONFIG):  # which comes last
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(source.path / name, folder / name, sha256_of(source.path / name))
        _update(report, shards, tensors)
        report["quantization"] = outlook(Checkpoint(folder), report)
        on_report({**report, "folder": str(folder)})
        write_json(folder / REPORT, report)
        with explained(target):
            folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is left where this failed


def _update(report: dict[str, Any], shards: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives the report of the pruning the checksums and the zeros of the new files."""
    report["shards"] = [shards[shard["name"]] for shard in report["shards"]]
    for block in report["blocks"]:
        for key in ("blake3", "sha256", "nbytes"):
            block.pop(key, None)
        new = shards[block["shard"]]
        block |= {"nbytes": new["nbytes"], **checksum_in(new)}
        for name, linear in block["linears"].items():
            if name in tensors:
                linear["zeros"] = int((tensors[name] == 0).sum())
                linear["sparsity"] = linear["zeros"] / tensors[name].numel()
    summary = report["summary"]
    if summary.get("keeps_bits", True):
        summary["gives"] += MOVED
    linears = [linear for block in report["blocks"] for linear in block["linears"].values()]
    summary |= {"keeps_bits": False, "zeros": sum(linear["zeros"] for linear in linears)}
    summary["sparsity"] = summary["zeros"] / summary["weights"]
