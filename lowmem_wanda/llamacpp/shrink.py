"""Makes a GGUF with fewer experts, which is smaller by their share; `shrink` is the command.

What is removed are whole experts, the same number in every layer, with their rows of the router. What is kept are the
source's bytes, in its quantization. Nothing is computed but scores, so neither torch nor a GPU is needed;
layers are scored while those before them are written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.output import require_disk
from lowmem_wanda.checkpoint.writer import explained, replacing, require_new, write_json
from lowmem_wanda.errors import CalibrationError, OutputError
from lowmem_wanda.llamacpp.expert_choice import Choices, choose, chosen_score, numbers, plan_text
from lowmem_wanda.llamacpp.expert_cut import Copy, Stacks, copy_of, write_copy
from lowmem_wanda.llamacpp.expert_layers import ExpertLayers, counted, expert_layers
from lowmem_wanda.llamacpp.expert_scores import read_counts
from lowmem_wanda.llamacpp.gguf_file import GGUF, mapped, read_gguf
from lowmem_wanda.llamacpp.gguf_values import Field
from lowmem_wanda.llamacpp.imatrix import SUMS
from lowmem_wanda.llamacpp.shrink_report import GGUFShrinkReport, note, shrink_report

Notify = Callable[[Mapping[str, Any]], None]


def _silent(_: Mapping[str, Any]) -> None:
    """Reports nothing."""


def shrink_gguf(
    path: str | Path,
    target: str | Path,
    drop_experts: str | float | None = None,
    keep_experts: int | None = None,
    scores_from: str | Path | None = None,
    score: str | None = None,
    seed: int | None = None,
    plan: str | Path | None = None,
    write_plan: str | Path | None = None,
    imatrix_out: str | Path | None = None,
    split_size: int | None = None,
    on_start: Notify = _silent,
    on_progress: Notify = _silent,
) -> GGUFShrinkReport:
    """Writes a copy of a GGUF with fewer experts in each layer, and a report beside it.

    Args:
        path: the GGUF of a mixture of experts; of a split one, the first file.
        target: the new GGUF.
        drop_experts: how many experts of each layer are removed: a share ("25%", 0.25), rounded down, or a number.
        keep_experts: instead, how many are kept (default: what drop_experts or the plan say).
        scores_from: the importance matrix of this very model, a .gguf with counts for each expert (default: none).
        score: "ean", the summed norms of outputs, estimated from the importance matrix; "frequency", its counts alone;
            "aimer", from weights alone; "random" (default: "ean").
        seed: seed of "random" (default: 0).
        plan: a JSON file of the experts that each layer keeps, instead of a score (default: none).
        write_plan: new JSON file for the choice that was made (default: none).
        imatrix_out: new file for the importance matrix of the small model (default: none).
        split_size: bytes that no file may exceed (default: one file).
        on_start: called with the facts before the work.
        on_progress: called with {"done", "total"}, the bytes that were written and that will be.

    Returns:
        A `GGUFShrinkReport`, which is also written beside the target as `<target>.report.json`.

    Raises:
        CheckpointError: a file is not a whole GGUF.
        ModelError: the model has no experts, or experts in a form that is not supported.
        PatternError: the number of experts does not work, or a plan is not understood.
        CalibrationError: the importance matrix cannot tell experts apart, or belongs to another model.
        OutputError: a file exists, or the disk is full.

    Example:
        >>> from lowmem_wanda import shrink_gguf
        >>> shrink_gguf("model.gguf", "small.gguf", "25%", scores_from="imatrix.gguf")["experts"]["kept"]
        12
    """
    started = time.monotonic()
    files = _Files(Path(target), _path(write_plan), _path(imatrix_out))
    score = chosen_score(score, scores_from, plan, imatrix_out, seed)
    model = read_gguf(path)
    files.require_new(model)
    experts = expert_layers(model)
    keep, planned = numbers(experts, drop_experts, keep_experts, _path(plan))
    experts.require(keep)
    known = read_counts(scores_from, model, experts) if scores_from is not None else {}
    on_start({"source": str(path), "layers": len(experts.layers), "experts": experts.count, "kept": keep})
    matrix = _path(scores_from)
    choices = Choices(choose(model, experts, keep, planned, score, matrix, known, seed or 0), experts.layers)
    how = f"plan {Path(plan).name}" if plan is not None else score
    if scores_from is not None and score in ("ean", "frequency"):
        how += f" from {Path(scores_from).name}"
    fields = _fields(model, experts, keep, how)
    written = _write(files, model, experts, fields, keep, choices, scores_from, split_size, on_progress)
    arguments = {
        "drop_experts": drop_experts, "keep_experts": keep_experts, "scores_from": _text(scores_from), "score": score,
        "seed": seed or 0 if score == "random" else None, "plan": _text(plan), "split_size": split_size,
        "write_plan": _text(write_plan), "imatrix_out": _text(imatrix_out),
    }  # fmt: skip
    report = shrink_report(model, experts, choices, known, Path(target), written, how)
    if imatrix_out is not None and matrix is not None:
        report["warnings"] += _unmeasured(matrix, experts)
    report |= {"arguments": arguments, "seconds": time.monotonic() - started}
    write_json(report_path(target), report)
    return report


def report_path(target: str | Path) -> Path:
    """Where the report of a shrunk GGUF is."""
    return Path(f"{target}.report.json")


@dataclass(frozen=True)
class _Files:
    """The files to write beside each other: the model, a plan and an importance matrix."""

    model: Path
    plan: Path | None
    imatrix: Path | None

    def require_new(self, source: GGUF) -> None:
        """Raises OutputError unless all can be written and none is there yet."""
        if self.model.suffix != ".gguf":
            raise OutputError(f"{self.model}: give a name that ends in .gguf")
        if self.imatrix is not None and self.imatrix.suffix != ".gguf":
            raise OutputError(f"--imatrix-out {self.imatrix}: give a name that ends in .gguf")
        reports = [report_path(self.model), report_path(self.model).with_suffix(".html")]
        named = [file for file in (self.model, self.plan, self.imatrix, *reports) if file is not None]
        if len({file.resolve() for file in named}) != len(named):
            raise OutputError(f"{self.model}: two of the files to write have one name; give another")
        for file in named:
            if any(file.exists() and file.samefile(part) for part in source.files):
                raise OutputError(f"{file}: is the source, which is never written to; give another name")
            require_new(file)
            with explained(file):
                if not file.resolve().parent.is_dir():
                    raise OutputError(f"{file}: there is no such directory; make it first")


def _fields(model: GGUF, experts: ExpertLayers, keep: int, how: str) -> dict[str, Field]:
    """The metadata of the small model: another number of experts, and a sentence at the end of its description."""
    fields = counted(model.fields, model.text("general.architecture"), keep)
    before = model.text("general.description")
    said = f"{before} {note(experts, keep, how)}" if before else note(experts, keep, how)
    if "general.description" in fields:
        return {**fields, "general.description": Field.text(said)}
    last = max((place for place, key in enumerate(fields) if key.startswith("general.")), default=-1)
    items = list(fields.items())
    return dict([*items[: last + 1], ("general.description", Field.text(said)), *items[last + 1 :]])


def _write(
    files: _Files, model: GGUF, experts: ExpertLayers, fields: Mapping[str, Field], keep: int, choices: Choices,
    scores_from: str | Path | None, split_size: int | None, on_progress: Notify,
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes all files, or none. Gives the names, sizes and checksums of the model's.

    A layer is scored when it is needed; processes that score run ahead. The first is needed before a file is made.
    """
    stacks = experts.tensors
    copies = [copy_of(files.model, model, fields, stacks, keep, split_size)]
    if files.imatrix is not None and scores_from is not None:
        matrix = read_gguf(scores_from)
        copies.append(copy_of(files.imatrix, matrix, matrix.fields, _entries(matrix, stacks, experts.count), keep))
    total, done = sum(copy.nbytes for copy in copies), 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        on_progress({"done": done, "total": total})

    new = [part.path for copy in copies for part in copy.parts] + ([files.plan] if files.plan else [])
    for file in new:
        require_new(file)
    _require_disk(copies)
    try:
        with ExitStack() as stack, closing(choices):
            choices[next(iter(choices))]
            sums = [write_copy(stack, copy, lambda block: choices[block].kept, moved) for copy in copies][0]
            if files.plan is not None:
                stack.enter_context(replacing(files.plan)).write(plan_text(choices).encode())
    except BaseException:
        for file in new:  # none was there before
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise
    return [{"name": file.name, "nbytes": file.nbytes, **file.checksum} for file in sums()]


def _require_disk(copies: Sequence[Copy]) -> None:
    """Raises OutputError if a disk has no room for the copies that are to be on it."""
    needed: dict[int, int] = {}
    for copy in copies:
        folder = copy.parts[0].path.resolve().parent
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + copy.nbytes
        require_disk(folder, needed[disk])


def _entries(matrix: GGUF, stacks: Stacks, count: int) -> Stacks:
    """{tensor of an importance matrix with a row for each expert: block}.

    Raises CalibrationError for another size, and for numbers that cannot be sums of squares or counts.
    """
    found = {}
    for tensor in matrix.tensors.values():
        values = mapped(tensor).view("<f4") if tensor.dtype == "F32" else np.zeros(1)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise CalibrationError(
                f"{matrix.path}: {tensor.name} holds NaN, infinity or negative numbers; get another file, or leave "
                "--imatrix-out out"
            )
        name = tensor.name.rpartition(".")[0]
        if name in stacks and "_exps." in name:
            if tensor.shape[0] != count:
                raise CalibrationError(
                    f"{matrix.path}: entry {tensor.name} is not for {count} experts; get another file"
                )
            found[tensor.name] = stacks[name]
    return found


def _unmeasured(matrix: Path, experts: ExpertLayers) -> list[str]:
    """A warning of the expert weights that an importance matrix has no entry of, though their layers run."""
    entries = read_gguf(matrix).tensors
    running = [block for block in experts.layers if block not in experts.predicting]
    missing = [name for block in running for name in experts.matrices(block) if f"{name}{SUMS}" not in entries]
    if not missing:
        return []
    return [
        f"the importance matrix, and so that of --imatrix-out, has no entry of {len(missing)} expert weights, such as "
        f"{missing[0]}: llama-quantize refuses to make its lowest types of them"
    ]


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _text(given: str | Path | None) -> str | None:
    return None if given is None else str(given)
