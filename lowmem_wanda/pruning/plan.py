"""What a pruning will hold, compute and write, predicted before a weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_wanda.checkpoint.quantized import source_bytes
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.llamacpp.imatrix import require_matrix_target
from lowmem_wanda.pruning import STEPS
from lowmem_wanda.pruning.estimate import Rates, absent_machine, estimate, folder_for_files, measure
from lowmem_wanda.pruning.experts import MIN_TOKENS
from lowmem_wanda.pruning.job import PruneJob, prepare
from lowmem_wanda.pruning.recover import HELD_OUT, LOOKS
from lowmem_wanda.pruning.report import started
from lowmem_wanda.sparsity.gram import TILE, Gram
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import Notify, ignore, prunable
from lowmem_wanda.streaming.workload import Placement


@dataclass(frozen=True)
class Plan:
    """Counts, bytes and floating-point operations of a pruning; `device_peak` is 0 where the host computes.

    `read` are the bytes of tensors that are read of the source, and `written` those that are written. That shards which
    are written in groups of experts are read once more for their checksums is not counted.
    Of the operations `exact` are in float32 whatever the computing dtype; `launches` are small ones, one after another.
    `seconds` are those from the first block to the last, by the `rates` of products (operations), masks (weights),
    reading and writing (bytes), each in a second; None for a machine that is not here and whose rates are not given.
    """

    parameters: int
    prunable: int
    blocks: int
    largest_block: int
    tokens: int
    sequences: int
    length: int
    flops: int
    host_peak: int
    device_peak: int
    disk: int
    read: int
    written: int
    layout: Placement
    exact: int = 0
    launches: int = 0
    seconds: float | None = None
    rates: dict[str, float] | None = None


def plan(
    source: str | Path,
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
    vram: float | str | None = None,
    ram: float | str | None = None,
    flops: float | str | None = None,
    disk: float | str | None = None,
    on_start: Notify = ignore,
) -> Plan:
    """What `prune` with the same parameters will need: memory, disk, operations and time.

    For the time this machine is measured, for at most a second. A machine that is not here is planned for by its `ram`
    and `vram`, and by its rates.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint.
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
        vram: the memory of a GPU that is not here, in bytes or as "24GB" (default: this machine).
        ram: the host memory that is free on that machine (default: what is free here).
        flops: the operations of that machine in a second, in the computing dtype, such as "80T" (default: none).
        disk: the bytes that its disk reads, or writes, in a second, such as "3GB" (default: none).
        on_start: called once, with what would be done.

    Returns:
        The plan, in bytes and floating-point operations.

    Raises:
        BudgetError: no placement keeps `max_ram` and `max_vram`; the message says what would fit.
        LowmemError: any other trouble for which `prune` would raise one.

    Example:
        >>> from lowmem_wanda import plan
        >>> plan("source", pattern="2:4", method="magnitude", device="cpu").blocks
        5
    """
    if imatrix:
        require_matrix_target(imatrix, "--imatrix", Path(source))
    absent = absent_machine(vram, ram, flops, disk)
    if absent.memory[1] and not device.startswith(("auto", "cuda")):
        raise BudgetError(f"--vram is of a GPU, and --device {device} is none; leave one of them out")
    if absent.memory[1] == 0 and (device.startswith("cuda") or max_vram is not None):
        raise BudgetError(
            "a machine with --ram alone has no GPU: give its --vram too, or leave --device, --max-vram out"
        )
    machine = Machine.of(
        device,
        dtype,
        batch,
        trust_remote_code,
        max_ram,
        max_vram,
        slots,
        read,
        states,
        held,
        free=absent.memory,
        dequantize=dequantize,
    )
    job = prepare(
        source, method=method, refine=refine, update=update, variant=variant, quality=quality, recover=recover,
        recover_steps=recover_steps, allocation=allocation, min_tokens=min_tokens, all_experts=all_experts,
        gate_weighted=gate_weighted, pattern=pattern, group=group, text=text,
        sequences=sequences, length=length, seed=seed,
        statistics=statistics, include=include, exclude=exclude, norms=norms, imatrix=imatrix, zeros=zeros,
        machine=machine,
    )  # fmt: skip
    on_start(started(job))
    found = predict(job)
    if absent.memory == (None, None):
        rates: Rates | None = measure(job, found, folder_for_files())
    else:
        rates = absent.rates(on_host=not found.device_peak, computes=found.flops > 0)
    return found if rates is None else replace(found, seconds=estimate(job, found, rates), rates=rates.finite())


def predict(job: PruneJob, batch: int | None = None, trained_apart: bool | None = None) -> Plan:
    """The plan of a job. `batch` and `trained_apart` are as in `choose`, if a resumed job has settled them.

    Raises BudgetError where no placement keeps --max-ram and --max-vram.
    """
    model, work = job.model, job.workload
    checkpoint = model.checkpoint
    blocks = [sum(tensor.nbytes for tensor in model.block_tensors(index)) for index in range(model.depth)]
    placement, need = choose(work, batch, trained_apart)
    exact, launches = _solving(job)
    small = sum((checkpoint.path / file).stat().st_size for file in job.companions.files)
    return Plan(
        parameters=sum(tensor.numel for tensor in checkpoint.tensors.values()),
        prunable=sum(matrix.weights for block in job.selected for matrix in block),
        blocks=len(blocks),
        largest_block=max(blocks),
        tokens=work.sequences * work.length,
        sequences=work.sequences,
        length=work.length,
        flops=_flops(job, placement.batch) + exact,
        host_peak=need.host,
        device_peak=need.device,
        disk=checkpoint.nbytes + small + need.disk + (1 << 20),
        read=sum(source_bytes(tensor) for tensor in checkpoint.tensors.values()),
        written=checkpoint.nbytes,
        layout=placement,
        exact=exact,
        launches=launches,
    )


def _flops(job: PruneJob, batch: int) -> int:
    """The operations of all matrices, of attention's two products, and of recovery.

    A block is computed once. In the block order it is computed once more, up to its last matrix.
    """
    sequences, length = job.workload.sequences, job.workload.length
    tokens, total = sequences * length, 0.0
    twice = job.statistics == "block" and job.measures
    for index, block in enumerate(prunable(job.model)):
        shares = job.model.skeleton.shares(index)
        sizes = [matrix.weights * shares.get(matrix.module, 1.0) for matrix in block]
        attention = 4 * tokens * length * job.model.skeleton.width * (1 + twice)
        total += (sum(sizes) + twice * sum(sizes[:-1])) * 2 * tokens + attention
        if job.recovers:
            trained = 6 * job.recover_steps * batch * length + 2 * tokens * (1 + LOOKS / HELD_OUT)
            total += trained * sum(sizes)
    return int(total)


def _solving(job: PruneJob) -> tuple[int, int]:
    """The operations of X^T X and its solvers, which are in float32, and the small ones among them."""
    if not (job.measures and job.method.statistic is Gram):
        return 0, 0
    tokens, total = job.workload.sequences * job.workload.length, 0.0
    for index, traced in enumerate(job.traced):
        shares = job.model.skeleton.shares(index)
        inputs = {one.inputs: (one.shape[1], shares.get(one.module, 1.0)) for one in traced}
        total += sum(tokens * share * columns * (columns + TILE) for columns, share in inputs.values())
    matrices = [matrix for block in job.selected for matrix in block]
    total += sum(job.method.flops(*matrix.shape) for matrix in matrices)
    return int(total), sum(job.method.launches(matrix.shape[1]) for matrix in matrices)
