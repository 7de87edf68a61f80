"""Several removals of experts from one checkpoint, each evaluated against the whole model, in one table."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.companions import JOB, REPORT
from lowmem_wanda.checkpoint.output import FORMAT, report_folder, require_outside, require_target
from lowmem_wanda.checkpoint.writer import write_json
from lowmem_wanda.data.calibration import Calibration, name_list
from lowmem_wanda.data.windows import Windows
from lowmem_wanda.errors import LowmemError, PatternError
from lowmem_wanda.evaluation.evaluate import describe_windows, windows_for
from lowmem_wanda.evaluation.perplexity import evaluate_model
from lowmem_wanda.pruning.choices import choose_calibration
from lowmem_wanda.pruning.compare import FIGURES, ComparisonReport, read_rows, settings_of
from lowmem_wanda.shrinking.prepare import prepare
from lowmem_wanda.shrinking.shrink import run
from lowmem_wanda.sparsity import CHECKPOINT_SCORES, MEASURED
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, open_model, versions
from lowmem_wanda.streaming.walk import Notify, ignore

SCORES = "scores.json"  # what was measured of all experts, by which rows are made without a forward pass


@dataclass(frozen=True)
class Removal:
    """One way of removing experts."""

    drop_experts: str
    score: str
    refit: bool

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.score}{' + refit' if self.refit else ''} -{self.drop_experts}"


def compare_shrink(
    source: str | Path,
    target: str | Path,
    *,
    text: str | Path | Sequence[str | Path],
    drop_experts: Sequence[str] = ("25%", "50%"),
    scores: Sequence[str] = ("reap", "weighted", "squares"),
    refit: bool = False,
    statistics: str = "dense",
    calibration: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    seed: int = 0,
    length: int = 2048,
    windows: int | None = None,
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
    """Removes experts of a checkpoint in several ways, evaluates each against the whole model, and gives one table.

    Experts are measured once; rows without a refit are then made at the speed of a copy. Each is made in a folder of
    the target, evaluated on `text` and removed again. report.json is written after every row. Rows that it already has
    from the same settings are not made again.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint of a mixture of experts.
        target: a new folder for report.json, or one with a comparison to continue.
        text: the text to evaluate on: files of text or token ids, or "wikitext2", "c4".
        drop_experts: shares or numbers of experts to remove (default: "25%", "50%").
        scores: scores as `shrink` takes them (default: "reap", "weighted", "squares").
        refit: make each measured row with a refit, too (default: False).
        statistics: what layers are measured on, "dense" (default) or "block".
        calibration: the calibration, as `text` of `shrink` (default: the built-in text).
        sequences: the number of calibration sequences (default: 128).
        seed: the seed of the calibration sample, and of "random" (default: 0).
        length: tokens of a sequence and of a window, capped by the model's positions (default: 2048).
        windows: the number of windows to evaluate on, from the beginning of the text (default: all).
        keep: keep the smaller checkpoints (default: False).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in, "float32", "bfloat16", "float16" or "auto" (default: "auto").
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
        PatternError: a score is unknown, or a number of experts does not work.
        OutputError: the target holds something else, or rows of other settings.
        LowmemError: any other trouble that a user can mend, in one sentence.

    Example:
        >>> from lowmem_wanda import compare_shrink
        >>> report = compare_shrink("mixture", "removals", text=["my.txt"], drop_experts=["25%"], scores=["aimer"],
        ...                         length=64, windows=2, device="cpu")
        >>> [row["name"] for row in report["rows"]]
        ['aimer -25%']
    """
    text, calibration, drop_experts, scores = map(name_list, (text, calibration, drop_experts, scores))
    if not text:
        raise LowmemError("nothing to evaluate on: give --text FILE")
    if unknown := [score for score in scores if score not in CHECKPOINT_SCORES]:
        raise PatternError(f"--scores {unknown[0]}: give some of {', '.join(CHECKPOINT_SCORES)}")
    require_outside(target, source)
    place = {"device": device, "dtype": dtype, "batch": batch, "trust_remote_code": trust_remote_code,
             "dequantize": dequantize, "max_ram": max_ram, "max_vram": max_vram, "slots": slots,
             "read": read}  # fmt: skip
    machine = Machine.of(**place)  # type: ignore[arg-type]
    whole = open_model(source, machine)
    evaluated = windows_for(whole, text, length=length, windows=windows)
    sample = None
    if any(score in MEASURED for score in scores):
        sample = choose_calibration(whole, calibration, sequences, length, seed)
    ways = [Removal(*way) for way in product(drop_experts, scores, (False, True) if refit else (False,))]
    ways = [way for way in ways if not way.refit or way.score in MEASURED]
    settings = settings_of(whole, evaluated) | {
        "calibration_sha256": sample.sha256 if sample else None, "statistics": statistics, "seed": seed,
    }  # fmt: skip
    arguments = {"source": str(source), "target": str(target), "text": text, "drop_experts": list(drop_experts),
                 "scores": list(scores), "refit": refit, "calibration": calibration, "sequences": sequences,
                 "length": length, "windows": windows, "keep": keep, **place}  # fmt: skip
    table = _Table(whole, machine, evaluated, report_folder(target, "compare"), settings, sample)
    return table.fill(dict.fromkeys(ways), arguments, keep, on_block, on_report)


class _Table:
    """The table of a comparison, whose rows are made one after the other."""

    def __init__(
        self, whole: StreamedModel, machine: Machine, text: Windows, folder: Path, settings: dict[str, Any],
        sample: Calibration | None,
    ) -> None:  # fmt: skip
        self.whole, self.machine, self.text, self.folder = whole, machine, text, folder
        self.settings, self.sample = settings, sample
        self.rows = read_rows(folder, settings)
        if not self.rows:
            (folder / SCORES).unlink(missing_ok=True)

    def fill(
        self, ways: Mapping[Removal, None], arguments: dict[str, Any], keep: bool, on_block: Notify, on_report: Notify
    ) -> ComparisonReport:
        """Makes the rows that are missing; gives the report."""
        report = self._save(arguments, on_report)
        for way in ways:
            folder = self.folder / way.name.replace(" + ", "+").replace(" ", "")
            if not any(row["name"] == way.name for row in self.rows):
                self.rows.append({"name": way.name, **vars(way), **self._row(way, folder, on_block)})
            report = self._save(arguments, on_report)
            if not keep and (folder / JOB).exists():
                shutil.rmtree(folder)
        return report

    def _row(self, way: Removal, folder: Path, on_block: Notify) -> dict[str, Any]:
        """The figures of a row: one removal and what it costs."""
        require_target(folder, self.whole.checkpoint.path)
        measured, scores = way.score in MEASURED, self.folder / SCORES
        known = scores if measured and not way.refit and scores.exists() else None
        job = prepare(
            self.whole, drop_experts=way.drop_experts, score=way.score, scores_from=known, refit=way.refit,
            statistics=self.settings["statistics"] if measured and not known else "dense", seed=self.settings["seed"],
            calibration=None if known else self.sample, machine=self.machine,
        )  # fmt: skip

        def told(record: dict[str, Any]) -> None:
            on_block({"variant": way.name, **record})

        self.folder.mkdir(parents=True, exist_ok=True)
        dense = self.settings["statistics"] == "dense"  # else what is measured depends on what was removed
        beside = {"record": scores} if measured and dense and not scores.exists() else {}
        made = run(job, folder, beside, ignore, told, ignore)
        found = evaluate_model(open_model(folder, self.machine), self.text, self.whole, told)
        memory = made.get("peak_memory") or {"host_measured": 0, "device_measured": 0}
        return {
            **{key: found[key] for key in FIGURES},
            "dense": found["dense"],
            "size": made["bytes"]["after"] / made["bytes"]["before"],
            "tokens_lost": (made["tokens"] or {}).get("lost_mean"),
            "kept": {str(layer["layer"]): layer["kept"] for layer in made["layers"]},
            "seconds": made["seconds"],
            "eval_seconds": found["seconds"],
            "host_bytes": memory["host_measured"],
            "device_bytes": memory["device_measured"],
            "blocks": [{key: block[key] for key in ("index", "relative_error")} for block in found["blocks"]],
        }

    def _save(self, arguments: dict[str, Any], on_report: Notify) -> ComparisonReport:
        report: ComparisonReport = {
            "format": FORMAT,
            "kind": "compare",
            "source": str(self.whole.checkpoint.path),
            "arguments": arguments,
            "settings": dict(self.settings),
            "versions": versions(),
            **describe_windows(self.text),  # type: ignore[typeddict-item]
            "dense": self.rows[0]["dense"] if self.rows else None,
            "rows": list(self.rows),
            "spread": [],
        }
        on_report(report)  # type: ignore[arg-type]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / REPORT, report)
        return report
