"""`shrink`: experts of a checkpoint are removed, and what is left is published as a smaller checkpoint."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.companions import REPORT
from lowmem_wanda.checkpoint.output import Output, begun, exclusive, finished, require_disk, require_target, shard_names
from lowmem_wanda.checkpoint.pruned import read_report
from lowmem_wanda.checkpoint.verify_cut import Removal
from lowmem_wanda.checkpoint.writer import named_partial, require_new, write_json
from lowmem_wanda.errors import OutputError, PatternError
from lowmem_wanda.llamacpp.expert_choice import LayerChoice, plan_text
from lowmem_wanda.shrinking.choice import scores_text
from lowmem_wanda.shrinking.imatrix import of_smaller, require_imatrix
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.shrinking.prepare import prepare
from lowmem_wanda.shrinking.report import ShrinkReport, build, started
from lowmem_wanda.shrinking.walk import ShrinkWalk
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import Notify, ignore, require_chain, streamed
from lowmem_wanda.streaming.workload import Need, Placement

NOTHING = Need(0, 0, 0)  # what a job needs of memory that computes nothing
LABELS = {"source_sha256": "--verify-source", "threads": "threads (OMP_NUM_THREADS)", "lowmem_wanda": "lowmem-wanda"}
FLAGS = ("keep_experts", "pattern", "score", "seed", "text", "statistics", "dtype", "batch", "mtp", "device",
         "dequantize", "trust_remote_code")  # fmt: skip


def shrink(
    source: str | Path,
    target: str | Path,
    *,
    drop_experts: str | float | None = None,
    keep_experts: int | None = None,
    score: str | None = None,
    plan: str | Path | None = None,
    scores_from: str | Path | None = None,
    record: str | Path | None = None,
    write_plan: str | Path | None = None,
    mtp: str = "keep",
    statistics: str = "dense",
    refit: bool = False,
    protect: str = "none",
    imatrix: str | Path | None = None,
    pattern: str | None = None,
    text: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
    verify_source: bool = False,
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
    on_report: Notify = ignore,
) -> ShrinkReport:
    """Writes a copy of a checkpoint with fewer experts in each layer. What is kept has the source's bytes.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint of a mixture of experts.
        target: a new folder, or that of an interrupted run of the same job, which goes on.
        drop_experts: how many experts of each layer are removed: a share ("25%", 0.25), rounded down, or a number.
        keep_experts: instead, how many are kept (default: what drop_experts or the plan say).
        score: "reap" (default), "weighted", "squares", "ean", "man", "msan" or "frequency", of what experts put out;
            "aimer", of their weights alone; "random".
        plan: a JSON file of the experts that each layer keeps, instead of a score (default: none).
        scores_from: scores that `record` wrote, instead of a forward pass; or llama.cpp's importance matrix of this
            model (.gguf), from which "ean" is estimated (default: none).
        record: a new file for what was measured of all experts (default: none).
        write_plan: a new JSON file for the choice that was made (default: none).
        mtp: "keep" layers that predict further tokens, with as many experts (default), or "drop" them.
        statistics: what layers are measured on: "dense" (default), what the whole model's blocks put out, or "block",
            what the smaller blocks before them do.
        refit: fit the kept experts' down projections to what the whole layer put out, by least squares (default:
            False). Then these weights are not the source's.
        protect: "super" to keep experts that put out outlying values, whatever their score is; all layers are measured
            before the first is cut (default: "none").
        imatrix: a new file for the importance matrix of the smaller model, which is computed once more for it
            (default: none).
        pattern: prune what is left by Wanda in the same walk, to "N:M" or a share such as "50%"; needs `statistics`
            "block" (default: none).
        text: the calibration: files of text or token ids, or "c4", "wikitext2" (default: the built-in text).
        sequences: the number of calibration sequences (default: 128).
        length: the tokens of each sequence, capped by the model's positions (default: 2048).
        seed: the seed of the calibration sample and of "random" (default: 0).
        verify_source: know the source again by all of its bytes when the job goes on (default: False).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in, "float32", "bfloat16", "float16" or "auto" (default: "auto", which is float32 on
            a CPU and the stored dtype elsewhere).
        batch: the number of sequences computed at a time (default: as many as fit).
        max_ram: host memory that the process may take in all, in bytes or as "8GB" (default: what is free).
        max_vram: GPU memory that tensors may take, in bytes or as "8GB" (default: what is free).
        slots: the number of block buffers in host memory, 1 to 3 (default: 3 where they fit).
        read: how shards are read, "mmap", "pread" or "auto" (default: "auto", mapped on local disks).
        states: where hidden states lie, "device", "host" or "file" (default: the first that fits).
        trust_remote_code: run, and copy, Python code that the checkpoint brings (default: False).
        dequantize: write what is quantized as bfloat16 (default: False, its bytes are kept).
        on_start: called once before the work, with a record of what will be done.
        on_block: called with each block's record when its shard is written, by the thread that writes.
        on_report: called with the report, just before it is written.

    Returns:
        The report, as it stands in report.json.

    Raises:
        ModelError: the model has no experts, or experts in a form that is not supported.
        PatternError: the number of experts does not work, or a plan is not understood.
        CalibrationError: a text or scores cannot be used.
        BudgetError: no placement keeps `max_ram` and `max_vram`; the message says what would fit.
        OutputError: the target cannot be written, or holds another job.
        LowmemError: any other trouble that a user can mend, in one sentence. Finished files stay.

    Example:
        >>> from lowmem_wanda import shrink
        >>> shrink("mixture", "smaller", drop_experts="25%", score="aimer", device="cpu")["experts"]["kept"]
        12
    """
    require_target(target, source)
    machine = Machine.of(device, dtype, batch, trust_remote_code, max_ram, max_vram, slots, read, states, None,
                         dequantize=dequantize)  # fmt: skip
    job = prepare(
        source, drop_experts=drop_experts, keep_experts=keep_experts, score=score, plan=plan, scores_from=scores_from,
        mtp=mtp, statistics=statistics, refit=refit, protect=protect, pattern=pattern, text=text,
        sequences=sequences, length=length, seed=seed, verify_source=verify_source, machine=machine,
    )  # fmt: skip
    if record is not None and job.calibration is None:
        raise PatternError("--record: nothing is measured here; leave it out")
    beside = {name: Path(file) for name, file in (("record", record), ("plan", write_plan)) if file is not None}
    sample = None if imatrix is None else require_imatrix(job, Path(imatrix), Path(target))
    report = run(job, Path(target), beside, on_start, on_block, on_report)
    if imatrix is not None and sample is not None and not Path(imatrix).exists():
        report["imatrix"] = of_smaller(sample, Path(imatrix), Path(target), machine)
        on_report(report)  # type: ignore[arg-type]
        write_json(Path(target) / REPORT, report)
    return report


def run(
    job: ShrinkJob, target: Path, beside: dict[str, Path], on_start: Notify, on_block: Notify, on_report: Notify
) -> ShrinkReport:
    """Removes experts into `target`, which may hold a part of the job already; gives the report.

    `beside` are the files for what was measured ("record") and chosen ("plan").
    """
    start, began = time.monotonic(), begun(target)
    before = began.get("batch") if job.batch is None else job.batch
    before = before if isinstance(before, int) else None
    on_start({**started(job), "resumed": bool(began)})
    if finished(target):
        with exclusive(target):
            report = _verified(job, Output(target, job.arguments(before or 0), _label))
            _write_beside(job, report, beside)
            return report
    for file in beside.values():
        if not file.parent.is_dir():
            raise OutputError(f"{file}: there is no folder {file.parent}; make it first")
    for file in beside.values() if not began else ():
        require_new(file)
    placement, need = choose(job.workload, before) if job.measures else (None, NOTHING)
    needed = _result_bytes(job) + need.disk + (1 << 20)
    if not target.exists():
        require_disk(target, needed)
        if job.calibration:
            require_chain(job.model, job.calibration.tokens)
    with exclusive(target):
        output = Output(target, job.arguments(placement.batch if placement else 0), _label)
        output.begin(needed, shard_names(job.model.depth))
        timing, peak = _walk(job, output, placement, need, on_block)
        report = build(job, output, asdict(placement) if placement else {}, timing, peak)
        report["seconds"] = time.monotonic() - start
        _publish(job, output, report, beside, on_report)
    return report


def _walk(
    job: ShrinkJob, output: Output, placement: Placement | None, need: Need, on_block: Notify
) -> tuple[dict[str, Any], dict[str, int] | None]:
    """Writes all shards; gives the seconds, and the peaks of memory beside what was predicted, where it computed."""
    walk = ShrinkWalk(job, output, placement.batch if placement else 0, on_block)
    if placement is None:
        walk.without_computing()
        return {}, None
    with streamed(job.model, batches=walk.batches, placement=placement, folder=output.path) as stream:
        if job.protect:
            walk.measure(stream)
        else:
            walk.through(stream, placement)
        found = stream.timing(), stream.peak.beside(need.host, need.device)
    if job.protect:  # all layers are known now
        ShrinkWalk(replace(job, known=walk.measured), output, placement.batch, on_block).without_computing()
    return found


def _publish(job: ShrinkJob, output: Output, report: ShrinkReport, beside: dict[str, Path], on_report: Notify) -> None:
    """Writes all files that make shards a checkpoint; config.json comes last."""
    small = job.layout.cut({layer["layer"]: layer["kept"] for layer in report["layers"]})
    output.publish_files(small, job.companions.files)
    _write_beside(job, report, beside)
    on_report(report)  # type: ignore[arg-type]
    write_json(output.path / REPORT, report)
    output.publish_config(small)
    output.end()


def _write_beside(job: ShrinkJob, report: ShrinkReport, beside: dict[str, Path]) -> None:
    """Writes what was measured and what was chosen. Raises OutputError where a file of other bytes is there."""
    layers = {layer["layer"]: layer for layer in report["layers"]}
    texts = {}
    if "record" in beside:
        sums = {layer: one["sums"] for layer, one in layers.items() if one["sums"]}
        about = {"source": report["source"], "source_fingerprint": report["arguments"]["source_fingerprint"],
                 "calibration": report["calibration"]}  # fmt: skip
        texts["record"] = scores_text(job.layout, sums, about)
    if "plan" in beside:
        choices = {layer: LayerChoice(tuple(one["kept"]), one["by"], None) for layer, one in layers.items()}
        texts["plan"] = plan_text(choices)
    for name, text in texts.items():
        with named_partial(beside[name]) as partial:
            partial.write_bytes(text.encode())


def _verified(job: ShrinkJob, output: Output) -> ShrinkReport:
    """The report of a finished job, after its files are compared with it. Raises OutputError where they differ."""
    kept = Removal(read_report(output.path)).layers
    return output.verified(job.layout.cut(kept), job.companions.files)  # type: ignore[return-value]


def _result_bytes(job: ShrinkJob) -> int:
    """The bytes of the tensors of the result."""
    kept = dict.fromkeys(job.layers, tuple(range(job.keep)))
    return sum(made.nbytes for _, made in job.layout.tensors(kept))


def _label(name: str) -> str:
    """The name of a job's argument in messages: its flag, where it has one."""
    return LABELS.get(name) or (f"--{name.replace('_', '-')}" if name in FLAGS else name.replace("_", " "))
