"""`prune`: a job is begun or resumed, walked through its blocks, and published."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from lowmem_wanda.checkpoint.output import (
    Output,
    begun,
    exclusive,
    finished,
    require_disk,
    require_target,
    shard_names,
)
from lowmem_wanda.checkpoint.writer import require_new
from lowmem_wanda.llamacpp.imatrix import require_matrix_target
from lowmem_wanda.pruning import STEPS
from lowmem_wanda.pruning.allocate import owl_shares
from lowmem_wanda.pruning.estimate import seconds_here
from lowmem_wanda.pruning.experts import MIN_TOKENS
from lowmem_wanda.pruning.job import PruneJob, label, prepare
from lowmem_wanda.pruning.plan import predict
from lowmem_wanda.pruning.publish import publish, verified
from lowmem_wanda.pruning.records import PruneReport
from lowmem_wanda.pruning.report import build, started
from lowmem_wanda.pruning.walk import PruningWalk
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.walk import Notify, ignore, streamed


def prune(
    source: str | Path,
    target: str | Path,
    *,
    pattern: str = "2:4",
    method: str | Method = "wanda",
    refine: str = "none",
    update: str = "none",
    variant: bool = False,
    quality: str | None = None,
    recover: str | None = None,
    recover_steps: int = STEPS,
    allocation: str = "uniform",
    min_tokens: int = MIN_TOKENS,
    all_experts: bool = False,
    gate_weighted: bool = False,
    group: str | None = None,
    norms: str | Path | None = None,
    imatrix: str | Path | None = None,
    zeros: str = "exact",
    verify_source: bool = False,
    text: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
    statistics: str = "block",
    include: str | Path | Sequence[str | Path] = (),
    exclude: str | Path | Sequence[str | Path] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    max_ram: float | str | None = None,
    max_vram: float | str | None = None,
    slots: int | None = None,
    read: str = "auto",
    states: str | None = None,
    held: int | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    on_start: Notify = ignore,
    on_block: Notify = ignore,
    on_report: Notify = ignore,
) -> PruneReport:
    """Writes a pruned copy of a checkpoint, one decoder block in memory at a time.

    After a kill, the same call goes on where the job stopped, and gives the bytes of an uninterrupted run. Until the
    last file is written, the target cannot be loaded as a checkpoint. Threads of one process must not prune at the same
    time, because transformers changes torch's settings for all threads while it builds a model; processes may.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint.
        target: a new folder, or the folder of an interrupted run of the same job.
        pattern: "N:M" to keep N of each M inputs, or a share to prune such as "50%" or "0.5" (default: "2:4").
        method: "wanda" (default), "magnitude", "ria", "sparsegpt", "alps", or a `Method` of your own.
        refine: "swaps" to improve the mask by swaps that lower the output's error (default: "none").
        update: "lsq" to fit kept weights to the dense outputs by least squares (default: "none").
        variant: whether Wanda prunes each row up to a share of its scores, as a variant in the paper's code
            (default: False).
        quality: "fast" for wanda, "good" for alps, "best" for alps with `recover` "block" (default: `method`).
        recover: "block" to train what is kept of each pruned block towards what the dense block put out, "norms" to
            train its vectors alone (default: "none").
        recover_steps: the most steps that a block is trained (default: 200).
        allocation: how a share is divided among blocks: "uniform" (default), "owl" or "atp".
        min_tokens: an expert that saw fewer tokens is scored by all tokens of its layer (default: 8).
        all_experts: measure every expert on every token, not on those that it is given alone (default: False).
        gate_weighted: weigh the inputs of an expert by its routing weights, as MoE-Pruner does (default: False).
        group: what is compared for a share, "row" or "matrix" (default: the method's own).
        norms: an importance matrix of the dense model (.gguf, .dat), whose norms replace a calibration (default: none).
        imatrix: a new file that the pruned model's importance matrix is written to (default: none).
        zeros: what pruned weights become: "exact" (default) for +0.0, or "signed-tiny" for the smallest normal number
            with a random sign.
        verify_source: know the source again by all of its bytes when a job goes on, which takes a reading of them
            (default: False, by config.json, names, sizes, and 1.6 % of the bytes of more than 256 MiB).
        text: the calibration: files of text or token ids, or "c4", "wikitext2" (default: the built-in text).
        sequences: the number of calibration sequences (default: 128).
        length: the tokens of each sequence, capped by the model's positions (default: 2048).
        seed: the seed of the calibration sample and of random signs (default: 0).
        statistics: what matrices are measured on: "block" (default), "dense" or "sequential".
        include: globs of the names of tensors to prune (default: all).
        exclude: globs of the names of tensors to leave dense (default: none).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in, "float32", "bfloat16", "float16" or "auto" (default: "auto", which is float32 on
            a CPU and the stored dtype elsewhere).
        batch: the number of sequences computed at a time (default: as many as fit).
        max_ram: host memory that the process may take in all, in bytes or as "8GB" (default: what is free).
        max_vram: GPU memory that tensors may take, in bytes or as "8GB" (default: what is free).
        slots: the number of block buffers in host memory, 1 to 3 (default: 3 where they fit).
        read: how shards are read, "mmap", "pread" or "auto" (default: "auto", mapped on local disks).
        states: where hidden states lie, "device", "host" or "file" (default: the first that fits).
        held: the number of micro-batches that may wait for a matrix in the sequential order (default: as many as fit).
        trust_remote_code: run, and copy, Python code that the checkpoint brings (default: False).
        dequantize: read fp8 with block scales, and MXFP4, as bfloat16, and write that (default: False).
        on_start: called once before the work, with a record of what will be done.
        on_block: called with each block's record when its shard is written, by the thread that writes.
        on_report: called with the report, just before it is written.

    Returns:
        The report, as it stands in report.json.

    Raises:
        PatternError: a pattern, a method or a glob does not fit the model.
        BudgetError: no placement keeps `max_ram` and `max_vram`; the message says what would fit.
        OutputError: the target cannot be written, or holds another job.
        NumberError: a weight or a statistic is NaN or infinite.
        LowmemError: any other trouble that a user can mend, in one sentence. Finished files stay.

    Example:
        >>> from lowmem_wanda import Method, SquaredNorm, prune
        >>> def score(weight, inputs):
        ...     return weight.float().abs() * inputs.norms()
        >>> mine = Method(score=score, statistic=SquaredNorm)
        >>> report = prune("source", "target", method=mine, text=["my.txt"], sequences=4, length=64, device="cpu")
        >>> report["summary"]["sparsity"]
        0.5
    """
    require_target(target, source)
    if imatrix:
        require_matrix_target(imatrix, "--imatrix", Path(source), Path(target))
    machine = Machine.of(device, dtype, batch, trust_remote_code, max_ram, max_vram, slots, read, states, held,
                         dequantize=dequantize)  # fmt: skip
    job = prepare(
        source, method=method, refine=refine, update=update, variant=variant, quality=quality, recover=recover,
        recover_steps=recover_steps, allocation=allocation, min_tokens=min_tokens, all_experts=all_experts,
        gate_weighted=gate_weighted, pattern=pattern, group=group, text=text,
        sequences=sequences, length=length, seed=seed,
        statistics=statistics, include=include, exclude=exclude, norms=norms, imatrix=imatrix, zeros=zeros,
        verify_source=verify_source, machine=machine,
    )  # fmt: skip
    return run(job, Path(target), on_block, on_report, on_start)


def run(
    job: PruneJob,
    target: Path,
    on_block: Notify = ignore,
    on_report: Notify = ignore,
    on_start: Notify | None = None,
) -> PruneReport:
    """Prunes into `target`, which may hold a part of the job already; gives the report.

    `require_target` must have passed the target. Shards are written first, then the small files, the index, the
    importance matrix, the report, and config.json last. The time is estimated where `on_start` is given.
    """
    before, apart = _settled(job, target)
    told, resumed = on_start or ignore, bool(begun(target))
    if finished(target):
        told({**started(job), "resumed": resumed, "seconds": None})
        with exclusive(target):
            return verified(job, Output(target, job.arguments(before or 0, bool(apart)), label))
    if job.imatrix and not resumed:
        require_new(job.imatrix)
    plan = predict(
        job, before, apart
    )  # before the time is estimated, which takes memory that products take later anyway
    expected = seconds_here(job, plan, target) if on_start and not resumed else None
    told({**started(job), "resumed": resumed, "seconds": expected})
    if not target.exists():
        require_disk(target, plan.disk)
        _ = job.traces  # which refuses what is no chain
    with exclusive(target):
        output = Output(target, job.arguments(plan.layout.batch, plan.layout.trained_apart), label)
        output.begin(plan.disk, shard_names(job.model.depth))
        if job.allocation == "owl":
            job = replace(job, shares=owl_shares(job, plan.layout, target))
        walk = PruningWalk(job, output, plan.layout, on_block)
        with closing(walk), streamed(job.model, batches=walk.batches, placement=plan.layout, folder=target) as stream:
            walk.through(stream)
            timing = {**stream.timing(), "expected": expected}
        arguments = {name: value for name, value in output.arguments.items() if name != "format"}
        report = build(job, plan, stream.peak, output.finished, arguments, timing)
        publish(job, output, report, walk.store, on_report)
    return report


def _settled(job: PruneJob, target: Path) -> tuple[int | None, bool | None]:
    """What a job in the target began with, if there is one: the number of sequences at a time, and training apart."""
    began = begun(target)
    batch, apart = began.get("batch") if job.batch is None else job.batch, began.get("trained_apart")
    return batch if isinstance(batch, int) else None, apart if isinstance(apart, bool) else None
