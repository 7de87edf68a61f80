"""What a removal of experts will hold, compute and write, predicted before a weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_wanda.checkpoint.quantized import source_bytes
from lowmem_wanda.llamacpp.expert_layers import routing_facts
from lowmem_wanda.pruning.estimate import Rates, absent_machine, estimate, folder_for_files, measure
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.shrinking.prepare import prepare
from lowmem_wanda.shrinking.report import started
from lowmem_wanda.sparsity.refit import SWEEPS
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.walk import Notify, ignore, prunable
from lowmem_wanda.streaming.workload import Placement


@dataclass(frozen=True)
class ShrinkPlan:
    """Counts, bytes and floating-point operations of a removal of experts; `device_peak` is 0 where the host computes.

    Of `experts` in each of `layers`, `kept` are left; `used` of them work for a token, so that an expert sees
    `tokens_per_expert` of the `tokens` in the mean. The tensors have `before` bytes and `after` bytes. `read` and
    `written` are bytes of tensors. `seconds` are those from the first block to the last, by the `rates` of products
    (operations), reading and writing (bytes), each in a second; None for a machine whose rates are not known.
    """

    experts: int
    kept: int
    used: int
    layers: int
    routing: dict[str, bool]
    before: int
    after: int
    blocks: int
    tokens: int
    sequences: int
    length: int
    tokens_per_expert: float
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


def plan_shrink(
    source: str | Path,
    *,
    drop_experts: str | float | None = None,
    keep_experts: int | None = None,
    score: str | None = None,
    mtp: str = "keep",
    statistics: str = "dense",
    refit: bool = False,
    text: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
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
    vram: float | str | None = None,
    ram: float | str | None = None,
    flops: float | str | None = None,
    disk: float | str | None = None,
    on_start: Notify = ignore,
) -> ShrinkPlan:
    """What `shrink` of a checkpoint with the same parameters will need: memory, disk, operations and time.

    For the time this machine is measured, for at most a second. A machine that is not here is planned for by its `ram`
    and `vram`, and by its rates.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint of a mixture of experts.
        drop_experts: how many experts of each layer are removed: a share ("25%", 0.25), rounded down, or a number.
        keep_experts: instead, how many are kept (default: what drop_experts says).
        score: as in `shrink` (default: "reap").
        mtp: "keep" layers that predict further tokens (default), or "drop" them.
        statistics: what layers are measured on, "dense" (default) or "block".
        refit: whether kept experts are fitted to the whole layer (default: False).
        text: the calibration: files of text or token ids, or "c4", "wikitext2" (default: the built-in text).
        sequences: the number of calibration sequences (default: 128).
        length: the tokens of each sequence, capped by the model's positions (default: 2048).
        seed: the seed of the calibration sample (default: 0).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in, "float32", "bfloat16", "float16" or "auto" (default: "auto").
        batch: the number of sequences computed at a time (default: as many as fit).
        max_ram: host memory that the process may take in all, in bytes or as "8GB" (default: what is free).
        max_vram: GPU memory that tensors may take, in bytes or as "8GB" (default: what is free).
        slots: the number of block buffers in host memory, 1 to 3 (default: 3 where they fit).
        read: how shards are read, "mmap", "pread" or "auto" (default: "auto", mapped on local disks).
        states: where hidden states lie, "device", "host" or "file" (default: the first that fits).
        trust_remote_code: run Python code that the checkpoint brings (default: False).
        dequantize: write what is quantized as bfloat16 (default: False).
        vram: the memory of a GPU that is not here, in bytes or as "24GB" (default: this machine).
        ram: the host memory that is free on that machine (default: what is free here).
        flops: the operations of that machine in a second, in the computing dtype, such as "80T" (default: none).
        disk: the bytes that its disk reads, or writes, in a second, such as "3GB" (default: none).
        on_start: called once, with what would be done.

    Returns:
        The plan, in bytes and floating-point operations.

    Raises:
        BudgetError: no placement keeps `max_ram` and `max_vram`; the message says what would fit.
        LowmemError: any other trouble for which `shrink` would raise one.

    Example:
        >>> from lowmem_wanda import plan_shrink
        >>> plan_shrink("mixture", drop_experts="25%", device="cpu").kept
        12
    """
    absent = absent_machine(vram, ram, flops, disk)
    machine = Machine.of(device, dtype, batch, trust_remote_code, max_ram, max_vram, slots, read, states, None,
                         free=absent.memory, dequantize=dequantize)  # fmt: skip
    job = prepare(
        source, drop_experts=drop_experts, keep_experts=keep_experts, score=score, mtp=mtp, statistics=statistics,
        refit=refit, text=text, sequences=sequences, length=length, seed=seed, machine=machine,
    )  # fmt: skip
    on_start(started(job))
    found = predict(job)
    if absent.memory == (None, None):
        rates: Rates | None = measure(job, found, folder_for_files())
    else:
        rates = absent.rates(on_host=not found.device_peak, computes=found.flops > 0)
    return found if rates is None else replace(found, seconds=estimate(job, found, rates), rates=rates.finite())


def predict(job: ShrinkJob) -> ShrinkPlan:
    """The plan of a job. Raises BudgetError where no placement keeps --max-ram and --max-vram."""
    work, layout = job.workload, job.layout
    placement, need = choose(work, job.batch)
    kept = dict.fromkeys(job.layers, tuple(range(job.keep)))
    after = sum(made.nbytes for _, made in layout.tensors(kept))
    tokens = work.sequences * work.length
    read = sum(source_bytes(tensor) for tensor in job.model.checkpoint.tensors.values()) if tokens else after
    exact = _fitting(job)
    again = after if tokens and not (job.in_place and not placement.part) else 0  # what is written, from its files
    return ShrinkPlan(
        experts=layout.count,
        kept=job.keep,
        used=layout.used,
        layers=len(job.layers),
        routing=routing_facts(job.keep),
        before=job.source.nbytes,
        after=after,
        blocks=job.model.depth,
        tokens=tokens,
        sequences=work.sequences,
        length=work.length,
        tokens_per_expert=tokens * layout.used / layout.count,
        flops=_flops(job) + exact,
        host_peak=need.host,
        device_peak=need.device,
        disk=after + need.disk + (1 << 20),
        read=read + again,
        written=after,
        layout=placement,
        exact=exact,
    )


def _fitting(job: ShrinkJob) -> int:
    """The operations, in float32, of fitting down projections to routed tokens, in all sweeps over the kept experts.

    Each takes X^T X of its inputs, its product with what is missing, a solution, and what that adds for its tokens.
    """
    routes, total = job.workload.sequences * job.workload.length * job.layout.used, 0.0
    for block in job.model.skeleton.matrices if job.refit else ():
        found = [one.shape for one in block if one.parameter == "down_proj" and one.expert is not None]
        for rows, columns in found[:1]:
            total += routes * (2 * columns**2 + 4 * rows * columns)
            total += job.keep * (2 / 3 * columns**3 + 2 * rows * columns**2)
    return int(SWEEPS * total)


def _flops(job: ShrinkJob) -> int:
    """The operations of all matrices, those of experts for the tokens that they are given, and of attention's two."""
    sequences, length = job.workload.sequences, job.workload.length
    tokens, total = sequences * length, 0.0
    if not tokens:
        return 0
    for index, block in enumerate(prunable(job.model)):
        shares = job.model.skeleton.shares(index)
        sizes = sum(matrix.weights * shares.get(matrix.module, 1.0) for matrix in block)
        total += 2 * tokens * sizes + 4 * tokens * length * job.model.skeleton.width
    return int(total * (1 + job.passes_twice))
