"""How long a pruning will take, from rates that are measured on this machine for at most a second, or are given."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lowmem_wanda.checkpoint.checksum import FASTEST
from lowmem_wanda.checkpoint.loading import forget_cached
from lowmem_wanda.checkpoint.reader import PIECE
from lowmem_wanda.checkpoint.writer import Growing
from lowmem_wanda.errors import BudgetError
from lowmem_wanda.sparsity.masks import prune_lowest
from lowmem_wanda.sparsity.selection import Scaled
from lowmem_wanda.streaming.buffers import DTYPES
from lowmem_wanda.streaming.containers import folder_on_disk
from lowmem_wanda.streaming.machine import size_of
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.resources import free_memory, wait
from lowmem_wanda.streaming.workload import Placement, Workload

PRODUCTS = 0.7  # share of a block's forward that is products: 0.68 on a CPU (width 1024), 0.73 on an H100 (70B)
MOST, SHARE = 1.0, 0.03  # seconds that measuring takes at most, also as a share of a rough estimate
ROUGH = (1e11, 4e8, 1e9)  # operations, weights and bytes per second, for that rough estimate
WEIGHTS = 1 << 22  # of the matrix that products are measured with, and a quarter of it for masks
DEVICE_WEIGHTS = 1 << 25  # of that matrix on a GPU, whose products are slow where they are small
LAUNCH = 15e-6  # seconds of one small operation on a GPU (H200, torch 2.11)
HALF = 2  # times as long as in the computing dtype takes float32 on a GPU that is not here (an RTX 3090 or 4090)
READ, WRITTEN = 64 << 20, 48 << 20  # bytes at most
PART = 32  # of a checkpoint, one such part is written at most
MASKS = 4e8  # weights per second on a CPU that is not here: 2.5 ns each on an Intel Xeon with AVX-512


class Estimated(Protocol):
    """A job whose time is estimated: its model, what goes through it, and the matrices that it prunes, if any."""

    @property
    def model(self) -> StreamedModel:
        """The model that is walked."""

    @property
    def workload(self) -> Workload:
        """What goes through it."""

    @property
    def selected(self) -> Sequence[Sequence[Matrix]]:
        """The matrices that are pruned, block by block."""


class Predicted(Protocol):
    """What is predicted of it: operations, bytes that are written, and where all lies."""

    @property
    def flops(self) -> int:
        """The operations of products."""

    @property
    def exact(self) -> int:
        """Those of them that are in float32, whatever the computing dtype is."""

    @property
    def launches(self) -> int:
        """Small operations of solvers, one after the other."""

    @property
    def written(self) -> int:
        """The bytes that are written."""

    @property
    def layout(self) -> Placement:
        """Where everything lies."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    `flops` are operations of matrix products in the computing dtype, `exact` those in float32, `weights` are weights
    that are masked, `read` and `written` are bytes. `launches` are small operations (0: they take no time of their
    own). `busy` are the seconds of a core that a byte takes to be read and written, of `cores` cores.
    """

    flops: float
    exact: float
    weights: float
    read: float
    written: float
    launches: float = 0.0
    busy: float = 0.0
    cores: int = 1

    def finite(self) -> dict[str, float]:
        """What bounds the job, by name."""
        return {name: value for name, value in vars(self).items() if value and value != float("inf")}


def folder_for_files() -> Path:
    """A folder to measure writing in: one on a disk, where there is one."""
    try:
        return Path(folder_on_disk())
    except BudgetError:
        return Path(tempfile.gettempdir())


@dataclass(frozen=True)
class Absent:
    """A machine that is not here: the bytes that are free on its host and its GPU, and what it does in a second."""

    memory: tuple[int, int] | tuple[None, None] = (None, None)
    flops: int | None = None
    disk: int | None = None

    def rates(self, on_host: bool, computes: bool) -> Rates | None:
        """Its rates; None where not all that count are given."""
        if not self.disk or (computes and not self.flops):
            return None
        masks = MASKS if on_host else float("inf")  # which take no time beside the products on a GPU
        flops = self.flops or float("inf")
        exact, launches = (flops, 0.0) if on_host else (flops / HALF, 1 / LAUNCH)
        return Rates(flops, exact, masks, self.disk, self.disk, launches)


def absent_machine(
    vram: float | str | None, ram: float | str | None, flops: float | str | None, disk: float | str | None
) -> Absent:
    """The machine of these parameters; one without memory if it is this machine. Raises BudgetError."""
    rates = size_of("flops", flops), size_of("disk", disk)
    if vram is None and ram is None:
        if rates != (None, None):
            raise BudgetError("--flops and --disk are of a machine that is not here: give its --ram, or --vram, too")
        return Absent()
    free = free_memory(torch.device("cpu")) if ram is None else size_of("ram", ram)
    if 0 in rates:
        raise BudgetError("--flops and --disk are what a machine does in a second; give more than 0")
    return Absent((free or 0, size_of("vram", vram) or 0), *rates)


def measure(job: Estimated, plan: Predicted, folder: Path) -> Rates:
    """The rates of this machine: of products in the plan's micro-batches, of the pattern's masks, and of disks.

    Writing is measured in `folder`. The seconds that this takes grow with the rough seconds of the job, up to one in
    all.
    """
    layout, flops = plan.layout, plan.flops
    weights, nbytes = sum(one.weights for block in job.selected for one in block), job.model.checkpoint.nbytes
    rough = flops / ROUGH[0] + weights / ROUGH[1] + nbytes / ROUGH[2]
    seconds = min(MOST, SHARE * rough)
    dtypes = {job.model.dtype, *([torch.float32] if plan.exact else [])} if flops else set()
    share = 0.4 * seconds / max(1, len(dtypes))
    products = {dtype: _rate(_product(job, layout, dtype), share, job.model.device) for dtype in dtypes}
    masks = _rate(_mask(job), 0.2 * seconds, job.model.device) if weights else float("inf")
    if job.model.device.type == "cuda":
        torch.cuda.empty_cache()  # else what is cached counts for the job that follows
    start = time.thread_time()
    read = _read_rate(job, 0.2 * seconds)
    written = _write_rate(folder, min(WRITTEN, nbytes // PART + 1, int(ROUGH[2] * 0.2 * seconds) + 1))
    busy = (time.thread_time() - start) / (read[0] + written[0]) * 2
    on_host = job.model.device.type == "cpu"
    fast, exact = (products.get(dtype, float("inf")) for dtype in (job.model.dtype, torch.float32))
    launches = 1 / LAUNCH if plan.launches and not on_host else 0.0
    return Rates(fast, exact, masks, read[1], written[1], launches, busy if on_host else 0.0, torch.get_num_threads())


def estimate(job: Estimated, plan: Predicted, rates: Rates) -> float:
    """The seconds from the first block to the last."""
    slots = plan.layout.slots
    weights = sum(one.weights for block in job.selected for one in block)
    inside = sum(tensor.nbytes for index in range(job.model.depth) for tensor in job.model.block_tensors(index))
    depth = job.model.depth
    products = (plan.flops - plan.exact) / rates.flops + plan.exact / rates.exact
    small = plan.launches / rates.launches if rates.launches else 0.0
    computing = (products / PRODUCTS + weights / rates.weights + small + inside * rates.busy / rates.cores) / depth
    reading, writing = inside / rates.read / depth, plan.written / rates.written / depth
    if slots == 1:
        return depth * (computing + reading + writing)
    together = (computing, reading, writing) if slots == 3 else (computing, reading + writing)
    return (depth - 1) * max(together) + computing + reading + writing


def seconds_here(job: Estimated, plan: Predicted, target: Path) -> float:
    """`estimate` by the rates of this machine, and of the disk that `target` will be on."""
    folder = next(folder for folder in target.resolve().parents if folder.is_dir())
    return estimate(job, plan, measure(job, plan, folder))


def _product(job: Estimated, layout: Placement, dtype: torch.dtype) -> tuple[int, Callable[[], None]]:
    """The operations of one product of the size of a micro-batch and a part of a matrix, and what computes it."""
    device = job.model.device
    rows, columns = max((one.shape for one in job.model.skeleton.all_matrices), key=lambda shape: shape[1])
    most = WEIGHTS if device.type == "cpu" else DEVICE_WEIGHTS
    tokens, rows = layout.batch * job.workload.length, min(rows, max(1, most // columns))
    inputs, weight = (torch.ones(size, columns, dtype=dtype, device=device) for size in (tokens, rows))

    def compute() -> None:
        inputs @ weight.t()

    return 2 * tokens * rows * columns, compute


def _mask(job: Any) -> tuple[int, Callable[[], None]]:
    """The weights of a part of a matrix, and what prunes it."""
    matrix = max((one for block in job.selected for one in block), key=lambda one: one.weights)
    columns, dtype = matrix.shape[1], DTYPES[job.model.checkpoint.tensors[matrix.tensor].dtype]
    rows = min(matrix.shape[0], max(1, WEIGHTS // 4 // columns))
    mixed = torch.arange(rows * columns) * 7919 % 65521 - 32760  # of every sign and size, in no order
    weight = mixed.view(rows, columns).to(job.model.device, dtype)
    norms = torch.ones(columns, device=weight.device) if job.method.statistic is not None else None

    def prune() -> None:
        prune_lowest(weight, Scaled(weight, norms), job.pattern)

    return weight.numel(), prune


def _rate(work: tuple[int, Callable[[], None]], seconds: float, device: torch.device) -> float:
    """How much of some work is done in a second; it is done once unmeasured, and then for about `seconds`."""
    amount, act = work
    with torch.no_grad():
        act()
        wait(device)
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < seconds:
            act()
            wait(device)
            count += 1
    return amount * count / (time.perf_counter() - start)


def _read_rate(job: Estimated, seconds: float) -> tuple[int, float]:
    """How many bytes of the source were read, and how many are in a second, from the disk."""
    tensor = max(job.model.checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    forget_cached(tensor)
    start, done = time.perf_counter(), 0
    for piece in tensor.pieces(PIECE // 4):
        done += len(piece)
        if time.perf_counter() - start >= seconds or done >= READ:
            break
    return done, done / (time.perf_counter() - start)


def _write_rate(folder: Path, nbytes: int) -> tuple[int, float]:
    """How many bytes were written, and how many are in a second, with a checksum, until they are on the disk.

    The file has no name. Where nothing can be written, that will be said when the job begins; here it takes no time.
    """
    piece, start = bytes(min(PIECE, nbytes)), time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            growing = Growing(file.fileno(), FASTEST)
            while growing.size < nbytes:
                growing.write(piece)
            os.fsync(file.fileno())
    except OSError:
        return 0, float("inf")
    return growing.size, growing.size / (time.perf_counter() - start)
