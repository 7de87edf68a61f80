"""`evaluate`: checkpoints are opened once, measured on text and on tasks, and reported."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict, overload

from lowmem_wanda.checkpoint.companions import REPORT
from lowmem_wanda.checkpoint.output import FORMAT, report_folder
from lowmem_wanda.checkpoint.writer import write_json
from lowmem_wanda.data.calibration import name_list
from lowmem_wanda.data.windows import Windows
from lowmem_wanda.data.windows import windows as cut_windows
from lowmem_wanda.errors import LowmemError
from lowmem_wanda.evaluation.perplexity import evaluate_model
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, open_model, versions
from lowmem_wanda.streaming.walk import Notify, ignore


class ModelReport(TypedDict, total=False):
    """The figures of one model: those of a text, distances where a dense model is given, `tasks` where tasks are."""

    path: str
    perplexity: float
    perplexity_stderr: float
    tokens: int
    length: int
    kl_mean: float
    kl_mean_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top1_agreement_stderr: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float
    target_probability_change_mean: float
    target_probability_change_rms: float
    dense: dict[str, Any]
    blocks: list[dict[str, Any]]
    device: str
    dtype: str
    seconds: float
    timing: dict[str, Any]
    layout: dict[str, Any]
    memory: list[list[float]]
    peak_memory: dict[str, int]
    tasks: dict[str, dict[str, float]]


class EvaluationReport(TypedDict, total=False):
    """The figures of several models on the same text and tasks."""

    format: int
    kind: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    text: list[str]
    files: list[dict[str, Any]]
    convention: str
    length: int
    windows: int
    against: dict[str, Any] | None
    models: list[ModelReport]


@overload
def evaluate(source: str | Path, **settings: Any) -> ModelReport: ...
@overload
def evaluate(source: Sequence[str | Path], **settings: Any) -> list[ModelReport]: ...
def evaluate(  # type: ignore[misc]
    source: str | Path | Sequence[str | Path],
    *,
    text: str | Path | Sequence[str | Path] = (),
    against: str | Path | None = None,
    length: int = 2048,
    windows: int | None = None,
    stride: int | None = None,
    convention: str = "windows",
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    report: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    max_ram: float | str | None = None,
    max_vram: float | str | None = None,
    slots: int | None = None,
    read: str = "auto",
    states: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    on_start: Notify = ignore,
    on_block: Notify = ignore,
    on_model: Notify = ignore,
    on_report: Notify = ignore,
) -> ModelReport | list[ModelReport]:
    """What checkpoints are worth: perplexity, distance to the dense model, zero-shot accuracy, all by streaming.

    All checkpoints are opened and checked before the first one is measured.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint, pruned or not; or several folders, which are
            evaluated alike.
        text: files of text or token ids, or "wikitext2", "c4" (default: none; then give `tasks`).
        against: the folder of the dense model (default: none). With it, the distance to that model and each block's
            error are measured, too.
        length: tokens of a window, capped by the model's positions (default: 2048).
        windows: the number of windows, from the beginning of the text (default: all).
        stride: tokens from one window to the next, for overlapping windows (default: `length`).
        convention: with "windows" (default) all tokens of a window but its first are evaluated, as in the paper's code;
            with "llama.cpp" the second half of each window is, as in its perplexity tool.
        tasks: names of tasks of lm-evaluation-harness (default: none).
        include_path: a folder where the harness finds local task files (default: none).
        limit: the number of documents of each task (default: all).
        report: a folder for report.json, a new one or one with a report of an evaluation (default: none).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in, "float32", "bfloat16", "float16" or "auto" (default: "auto", which is float32 on
            a CPU and the stored dtype elsewhere).
        batch: the number of sequences computed at a time (default: as many as fit).
        max_ram: host memory that the process may take in all, in bytes or as "8GB" (default: what is free).
        max_vram: GPU memory that tensors may take, in bytes or as "8GB" (default: what is free).
        slots: the number of block buffers in host memory, 1 to 3 (default: 3 where they fit).
        read: how shards are read, "mmap", "pread" or "auto" (default: "auto", mapped on local disks).
        states: where hidden states lie, "device", "host" or "file" (default: the first that fits).
        trust_remote_code: run Python code that a checkpoint brings (default: False).
        dequantize: read fp8 with block scales, and MXFP4, as bfloat16 (default: False).
        on_start: called before each model is measured on the text, with a record of what will be done.
        on_block: called with the record of each block when the block is done.
        on_model: called with the figures of each model when they are complete.
        on_report: called with the report of all models so far, just before it is written.

    Returns:
        The figures of the model, or a list of them where several folders are given.

    Raises:
        LowmemError: there is nothing to evaluate on, models cannot be compared, a budget cannot be kept, or there is
            other trouble that a user can mend. The message is one sentence.

    Example:
        >>> from lowmem_wanda import evaluate
        >>> evaluate("source", text=["my.txt"], length=64, windows=2, device="cpu")["tokens"]
        126
    """
    text = name_list(text)
    if not text and not tasks:
        raise LowmemError("nothing to evaluate on: give --text FILE, --tasks NAME,... or both")
    folder = report_folder(report, "eval") if report else None
    sources = name_list(source)
    place = {"device": device, "dtype": dtype, "batch": batch, "trust_remote_code": trust_remote_code,
             "dequantize": dequantize, "max_ram": max_ram, "max_vram": max_vram, "slots": slots,
             "read": read}  # fmt: skip
    size = {"length": length, "windows": windows, "stride": stride, "convention": convention}
    requests = {"tasks": list(tasks), "include_path": include_path, "limit": limit}
    machine = Machine.of(**place, states=states)  # type: ignore[arg-type]
    models, dense = _opened(sources, against, machine, length if text else None, bool(tasks))
    settings = {"sources": sources, "text": text, "against": against and str(against), **size, **requests, **place}
    made: list[ModelReport] = []
    for path, model in zip(sources, models, strict=True):
        found: ModelReport = {"path": path}
        answers = _zeroshot().run(model, **requests, on_block=on_block) if tasks else None
        text_windows = windows_for(model, text, length, windows, stride, convention) if text else None
        if text_windows is not None:
            if dense is not None and dense.dtype != model.dtype:
                dense = open_model(str(against), replace(machine, dtype=model.dtype_name))
            on_start(_started(path, model, text_windows))
            found = evaluate_model(model, text_windows, dense, on_block)  # type: ignore[assignment]
        made.append({**found, "tasks": answers} if answers else found)
        written = _report(text_windows, made, settings)
        on_report(written)  # type: ignore[arg-type]
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / REPORT, written)
        on_model(made[-1])  # type: ignore[arg-type]
    return made[0] if isinstance(source, (str, Path)) else made


def _opened(
    sources: Sequence[str], against: str | Path | None, machine: Machine, length: int | None, tasks: bool
) -> tuple[list[StreamedModel], StreamedModel | None]:
    """The models and the dense one. Raises LowmemError at once for anything that would stop the work later."""
    if tasks:
        _zeroshot()
    models = [open_model(source, machine) for source in sources]
    dense = open_model(against, replace(machine, dtype=models[0].dtype_name)) if against else None
    lengths = sorted({model.window(length or 0) for model in [*models, *([dense] if dense else [])]})
    if length and len(lengths) > 1:
        raise LowmemError(f"not all of these models have {lengths[1]} positions: give --length {lengths[0]}")
    return models, dense


def windows_for(
    model: StreamedModel,
    text: Sequence[str],
    length: int,
    windows: int | None = None,
    stride: int | None = None,
    convention: str = "windows",
) -> Windows:
    """The windows of a text by the model's own tokenizer, each of at most as many tokens as the model has positions."""
    fits = {"length": model.window(length), "vocabulary": model.skeleton.vocabulary}
    return cut_windows(
        text, model.encode, render=model.render, stride=stride, convention=convention, most=windows, **fits
    )


def _zeroshot() -> Any:
    """The module `zeroshot`. Raises LowmemError where lm-evaluation-harness is not installed."""
    try:
        return import_module("lowmem_wanda.evaluation.zeroshot")
    except ImportError:
        raise LowmemError("--tasks runs lm-evaluation-harness, which is not installed: pip install lm-eval") from None


def _started(path: str, model: StreamedModel, text: Windows) -> dict[str, Any]:
    count, length = text.tokens.shape
    return {"source": path, "blocks": model.depth, "device": model.place, "text": list(text.sources),
            "windows": count, "length": length, "evaluated": text.evaluated}  # fmt: skip


def _report(text: Windows | None, models: Sequence[ModelReport], settings: Mapping[str, Any]) -> EvaluationReport:
    """The report of the models so far. It has the dense model once, under "against"."""
    computed = {key: models[-1][key] for key in ("device", "dtype") if key in models[-1]}  # type: ignore[literal-required]
    without_dense = [{key: value for key, value in model.items() if key != "dense"} for model in models]
    return {
        "format": FORMAT,
        "kind": "eval",
        "arguments": {**settings, **computed},
        "versions": versions(),
        **describe_windows(text),  # type: ignore[typeddict-item]
        "against": next((model["dense"] for model in models if "dense" in model), None),
        "models": without_dense,  # type: ignore[typeddict-item]
    }


def describe_windows(text: Windows | None) -> dict[str, Any]:
    """The part of a report about the text that models were measured on; {} without a text."""
    if text is None:
        return {}
    count, length = text.tokens.shape
    return {
        "text": list(text.sources),
        "convention": text.convention,
        "length": length,
        "windows": count,
        "files": list(text.files),
    }
