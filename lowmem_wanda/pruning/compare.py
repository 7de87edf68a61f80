"""`compare`: several prunings of one checkpoint, each evaluated against the dense model, in one table."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lowmem_wanda.checkpoint.companions import JOB, REPORT
from lowmem_wanda.checkpoint.directory import fingerprint
from lowmem_wanda.checkpoint.output import FORMAT, finished, report_folder, require_outside, require_target
from lowmem_wanda.checkpoint.reader import read_json
from lowmem_wanda.checkpoint.writer import write_json
from lowmem_wanda.data.calibration import Calibration, calibrate, name_list
from lowmem_wanda.data.windows import Windows
from lowmem_wanda.errors import LowmemError, OutputError
from lowmem_wanda.evaluation.evaluate import describe_windows, windows_for
from lowmem_wanda.evaluation.perplexity import evaluate_model
from lowmem_wanda.pruning.job import label, prepare
from lowmem_wanda.pruning.prune import run
from lowmem_wanda.pruning.variants import Variant, titles_of, variant_of, variants_of
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, describe_device, open_model, versions
from lowmem_wanda.streaming.walk import Notify, ignore

Samples = dict[tuple[int | None, int | None], Calibration]  # by sequences and seed
UNSEEDED = ("method", "pattern", "group", "statistics", "sequences")
FIGURES = (
    "perplexity", "perplexity_stderr", "kl_mean", "kl_mean_stderr", "kl_p99", "top1_agreement", "perplexity_ratio",
    "perplexity_ratio_stderr",
)  # fmt: skip


class ComparisonReport(TypedDict):
    """What several prunings cost. A row is a variant with its figures, seconds and bytes; `spread` is over seeds."""

    format: int
    kind: str
    source: str
    arguments: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    text: list[str]
    files: list[dict[str, Any]]
    convention: str
    length: int
    windows: int
    dense: dict[str, Any] | None
    rows: list[dict[str, Any]]
    spread: list[dict[str, Any]]


def compare(
    source: str | Path,
    target: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    methods: Sequence[str] = ("wanda", "magnitude"),
    patterns: Sequence[str] = ("50%", "4:8", "2:4"),
    groups: Sequence[str | None] = (None,),
    statistics: Sequence[str] = ("block",),
    sequences: Sequence[int] = (128,),
    seeds: Sequence[int] = (0,),
    calibration: str | Path | Sequence[str | Path] = (),
    length: int = 2048,
    windows: int | None = None,
    include: str | Path | Sequence[str | Path] = (),
    exclude: str | Path | Sequence[str | Path] = (),
    keep: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    max_ram: float | str | None = None,
    max_vram: float | str | None = None,
    slots: int | None = None,
    read: str = "auto",
    trust_remote_code: bool = False,
    dequantize: bool = False,
    on_block: Notify = ignore,
    on_report: Notify = ignore,
) -> ComparisonReport:
    """Prunes a checkpoint in several ways, evaluates each against the dense model, and gives one table.

    Each pruning is made in a folder of the target, evaluated on `text` and removed again. report.json is written after
    every row. Rows that it already has from the same settings are not made again.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint.
        target: a new folder for report.json, or one with a comparison to continue.
        text: the text to evaluate on: files of text or token ids, or "wikitext2", "c4".
        methods: names of methods, with what comes after the mask, such as "wanda+lsq", "ria+swaps", "alps+recover"
            (default: "wanda", "magnitude").
        patterns: patterns as `prune` takes them (default: "50%", "4:8", "2:4").
        groups: what is compared for a share, "row", "matrix", or None for the method's own (default: None).
        statistics: what matrices are measured on, "block", "dense" or "sequential" (default: "block").
        sequences: numbers of calibration sequences (default: 128).
        seeds: seeds of the calibration samples (default: 0).
        calibration: the calibration, as `text` of `prune` (default: the built-in text).
        length: tokens of a sequence and of a window, capped by the model's positions (default: 2048).
        windows: the number of windows to evaluate on, from the beginning of the text (default: all).
        include: globs of the names of tensors to prune (default: all).
        exclude: globs of the names of tensors to leave dense (default: none).
        keep: keep the pruned checkpoints (default: False).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in, "float32", "bfloat16", "float16" or "auto" (default: "auto", which is float32 on
            a CPU and the stored dtype elsewhere).
        batch: the number of sequences computed at a time (default: as many as fit).
        max_ram: host memory that the process may take in all, in bytes or as "8GB" (default: what is free).
        max_vram: GPU memory that tensors may take, in bytes or as "8GB" (default: what is free).
        slots: the number of block buffers in host memory, 1 to 3 (default: 3 where they fit).
        read: how shards are read, "mmap", "pread" or "auto" (default: "auto", mapped on local disks).
        trust_remote_code: run, and copy, Python code that the checkpoint brings (default: False).
        dequantize: read fp8 with block scales, and MXFP4, as bfloat16 (default: False).
        on_block: called with each block's record, which names the `variant`.
        on_report: called with the report, just before it is written.

    Returns:
        The report, as it stands in report.json.

    Raises:
        PatternError: a method, a pattern, a group or an order is unknown, or a number of sequences is below 1.
        OutputError: the target holds something else, or rows of other settings.
        LowmemError: any other trouble that a user can mend, in one sentence.

    Example:
        >>> from lowmem_wanda import compare
        >>> report = compare("source", "table", text=["my.txt"], methods=["magnitude"], patterns=["2:4"], length=64,
        ...                  windows=2, device="cpu")
        >>> [row["name"] for row in report["rows"]]
        ['magnitude 2:4']
    """
    text, calibration, include, exclude = map(name_list, (text, calibration, include, exclude))
    methods, patterns, statistics = map(name_list, (methods, patterns, statistics))
    if not text:
        raise LowmemError("nothing to evaluate on: give --text FILE")
    require_outside(target, source)
    chosen = variants_of(methods, patterns, groups, statistics, sequences, seeds)
    place = {"device": device, "dtype": dtype, "batch": batch, "trust_remote_code": trust_remote_code,
             "dequantize": dequantize, "max_ram": max_ram, "max_vram": max_vram, "slots": slots,
             "read": read}  # fmt: skip
    machine = Machine.of(**place)  # type: ignore[arg-type]
    dense = open_model(source, machine)
    evaluated = windows_for(dense, text, length=length, windows=windows)
    folder = report_folder(target, "compare")
    names = {"include": include, "exclude": exclude, "calibration": calibration}
    arguments = {"source": str(source), "target": str(target), "text": text, "methods": list(methods),
                 "patterns": list(patterns), "groups": list(groups), "statistics": list(statistics),
                 "sequences": list(sequences), "seeds": list(seeds), **names, "length": length, "windows": windows,
                 "keep": keep, **place}  # fmt: skip
    settings = settings_of(dense, evaluated) | names | {"length": length}
    table = _Table(dense, machine, evaluated, folder, arguments, settings, keep, on_block, on_report)
    return table.fill(chosen)


class _Table:
    """The table of a comparison, whose rows are made one after the other."""

    def __init__(
        self, dense: StreamedModel, machine: Machine, text: Windows, folder: Path, arguments: dict[str, Any],
        settings: dict[str, Any], keep: bool, on_block: Notify, on_report: Notify,
    ) -> None:  # fmt: skip
        self.dense, self.machine, self.text, self.folder = dense, machine, text, folder
        self.arguments, self.settings, self.keep = arguments, settings, keep
        self.on_block, self.on_report = on_block, on_report
        self.rows = read_rows(folder, settings)

    def fill(self, chosen: Sequence[Variant]) -> ComparisonReport:
        """Makes the rows that are missing; gives the report."""
        samples = samples_of(self.dense, chosen, self.settings["calibration"], self.settings["length"])
        chosen = tuple(dict.fromkeys(_as_sampled(variant, samples) for variant in chosen))
        samples |= {(len(sample.tokens), seed): sample for (_, seed), sample in samples.items()}
        titles = titles_of([*chosen, *map(variant_of, self.rows)])
        self.rows = [row | {"name": titles[variant_of(row)]} for row in self.rows]
        report = self._save()
        for variant in chosen:
            sample = samples.get((variant.sequences, variant.seed))
            folder = self.folder / re.sub(r"[^\w.%]+", "-", titles[variant])
            key = {"name": titles[variant], **asdict(variant), "calibration_sha256": sample.sha256 if sample else None}
            same = [row for row in self.rows if all(row.get(part) == value for part, value in key.items())]
            self.rows = [row for row in self.rows if variant_of(row) != variant]
            made = (
                same
                if same and (not self.keep or finished(folder))
                else [key | self._row(variant, titles[variant], sample, folder)]
            )
            self.rows += made
            report = self._save()
            if not self.keep and (folder / JOB).exists():
                shutil.rmtree(folder)
        return report

    def _row(self, variant: Variant, name: str, sample: Calibration | None, folder: Path) -> dict[str, Any]:
        """The figures of a row: one pruning and what it costs."""
        selection = {key: self.settings[key] for key in ("include", "exclude")}
        require_target(folder, self.dense.checkpoint.path)
        job = prepare(self.dense, calibration=sample, **selection, **variant.keywords)

        def told(record: dict[str, Any]) -> None:
            self.on_block({"variant": name, **record})

        made = run(job, folder, told)
        result = evaluate_model(open_model(folder, self.machine), self.text, self.dense, told)
        return {
            **{key: result[key] for key in FIGURES},
            "dense": result["dense"],
            "sparsity": made["summary"]["sparsity"],
            "seconds": made["summary"]["seconds"],
            "eval_seconds": result["seconds"],
            "host_bytes": made["peak_memory"]["host_measured"],
            "device_bytes": made["peak_memory"]["device_measured"],
            "blocks": [{key: block[key] for key in ("index", "relative_error")} for block in result["blocks"]],
        }

    def _save(self) -> ComparisonReport:
        computed = {key: self.settings[key] for key in ("device", "dtype")}
        report: ComparisonReport = {
            "format": FORMAT,
            "kind": "compare",
            "source": str(self.dense.checkpoint.path),
            "arguments": {**self.arguments, **computed},
            "settings": dict(self.settings),
            "versions": versions(),
            **describe_windows(self.text),  # type: ignore[typeddict-item]
            "dense": self.rows[0]["dense"] if self.rows else None,
            "rows": list(self.rows),
            "spread": _spread(self.rows),
        }
        self.on_report(report)  # type: ignore[arg-type]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / REPORT, report)
        return report


def read_rows(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a comparison that was begun in a folder. Raises OutputError where its settings differ."""
    if not (folder / REPORT).exists():
        return []
    report = read_json(folder / REPORT)
    if report.get("format") != FORMAT:
        raise OutputError(f"{folder}: holds a comparison of another version of lowmem-wanda; give another directory")
    before = report.get("settings", {})
    for key, value in json.loads(json.dumps(settings)).items():
        if before.get(key) != value:
            raise OutputError(
                f"{folder}: holds rows of another {label(key)}; repeat the first command or give another directory"
            )
    return list(report["rows"])


def samples_of(dense: StreamedModel, chosen: Sequence[Variant], texts: Sequence[str], length: int) -> Samples:
    """{(sequences, seed): calibration}. Each seed is sampled once; fewer sequences are the first of that sample."""
    needed = {(variant.sequences, variant.seed) for variant in chosen if variant.sequences and variant.seed is not None}
    most: dict[int, int] = {}
    for count, seed in needed:
        most[seed] = max(most.get(seed, 0), count)
    size = {"length": dense.window(length), "vocabulary": dense.skeleton.vocabulary}
    whole = {
        seed: calibrate(texts, dense.encode, sequences=count, seed=seed, render=dense.render, **size)
        for seed, count in most.items()
    }
    return {(count, seed): replace(whole[seed], tokens=whole[seed].tokens[:count]) for count, seed in needed}


def _as_sampled(variant: Variant, samples: Samples) -> Variant:
    """The variant with as many sequences as the text gave. A short text gives fewer than were asked for."""
    sample = samples.get((variant.sequences, variant.seed))
    return replace(variant, sequences=len(sample.tokens)) if sample else variant


def settings_of(dense: StreamedModel, text: Windows) -> dict[str, Any]:
    """All that rows must have in common to stand in one table."""
    return {
        "source_fingerprint": fingerprint(dense.checkpoint),
        "windows_sha256": text.sha256,
        "convention": text.convention,
        "device": describe_device(dense.device),
        "dtype": dense.dtype_name,
        "versions": versions(),
    }


def _spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over the rows that differ in their seed alone."""
    spread = []
    for row in rows:
        alike = [other for other in rows if all(other[key] == row[key] for key in UNSEEDED)]
        if len(alike) > 1 and row is alike[0]:
            values = [other["perplexity"] for other in alike]
            name = row["name"].replace(f" seed {row['seed']}", "")
            mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
            spread.append({"name": name, "rows": len(alike), "perplexity_mean": mean, "perplexity_sd": sd})
    return spread
