"""A model that is ready to be walked, and what the walk is held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from lowmem_wanda.checkpoint.directory import FLOATS, Checkpoint, refuse_unprunable
from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.data.calibration import Encode, holds_ids
from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.skeleton import Hollow, hollow, tokenizer
from lowmem_wanda.streaming.tensors import DTYPES, laid_bytes, wanted


@dataclass(frozen=True)
class Limits:
    """What the layout of the work is held to. None: as fits.

    `max_ram` and `max_vram` are bytes of this process on the host and of tensors on the GPU; `slots` is the number
    of block buffers (1 to 3), `reading` one of `reading.WAYS`; `states` and `held` are those of `layout.Layout`.
    """

    max_ram: int | None = None
    max_vram: int | None = None
    slots: int | None = None
    reading: str = "pread"
    states: str | None = None
    held: int | None = None


FREE = Limits()


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model without weights, and how it is walked.

    `shape` is (sequences, length) of the tokens that go through it, (0, 0) for none, `batch` of the sequences at a
    time (None: as `layout` finds); models `beside` it are walked with it, each with its own hidden states. `judges`:
    logits are made in the end.
    """

    checkpoint: Checkpoint
    hollow: Hollow
    device: torch.device
    dtype: torch.dtype
    batch: int | None = None
    limits: Limits = FREE
    trust_remote_code: bool = False
    shape: tuple[int, int] = (0, 0)
    beside: tuple["Work", ...] = ()
    judges: bool = True

    @property
    def streams(self) -> int:
        """How many models are walked side by side."""
        return 1 + len(self.beside)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.hollow.blocks)

    @property
    def scores(self) -> bool:
        """Whether weights are scored and masked on the way."""
        return False

    @property
    def waits(self) -> bool:
        """Whether micro-batches wait for each other within a block."""
        return False

    @property
    def dtype_name(self) -> str:
        """Of the computing dtype, as flags have it."""
        return str(self.dtype).removeprefix("torch.")

    def window(self, length: int) -> int:
        """`length`, or as many positions as the model has."""
        return min(length, self.hollow.positions or length)

    def encoder(self, texts: Sequence[str]) -> Encode:
        """The model's own tokenizer; none is loaded for files of ids. Raises CalibrationError."""
        return (lambda _: []) if holds_ids(texts) else tokenizer(self.checkpoint, self.trust_remote_code)

    def block_tensors(self, index: int) -> list[Tensor]:
        """The file tensors of one block."""
        return [self.checkpoint.tensors[name] for name in sorted(set(self.hollow.block_tensors(index).values()))]

    @cached_property
    def block_bytes(self) -> int:
        """What the largest block takes, laid in a buffer, also of those `beside`."""
        own = max(laid_bytes(wanted(self.block_tensors(index))) for index in range(self.depth))
        return max([own, *(work.block_bytes for work in self.beside)])


def open_work(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    limits: Limits = FREE,
    trust_remote_code: bool = False,
) -> Work:
    """The model in `source`. Raises CheckpointError or ModelError where it is none that can be walked."""
    checkpoint = Checkpoint(source)
    refuse_unprunable(checkpoint, trust_remote_code)
    where = find_device(device)
    computing = find_dtype(dtype, where, checkpoint)
    return Work(
        checkpoint=checkpoint,
        hollow=hollow(checkpoint, computing, trust_remote_code),
        device=where,
        dtype=computing,
        batch=batch,
        limits=limits,
        trust_remote_code=trust_remote_code,
    )


def find_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda", "cuda:N" or "mps". Raises ModelError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(
        kind, False
    )
    if not available or (
        number and not (number.isdigit() and kind == "cuda" and int(number) < torch.cuda.device_count())
    ):
        raise ModelError(f"--device {name} is not to be had here (torch {torch.__version__}); give cpu or auto")
    return torch.device("cuda", int(number or 0)) if kind == "cuda" else torch.device(kind)


def find_dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The computing dtype. "auto": what most weights are stored in, but on a CPU float32.

    A CPU without bf16 units multiplies float32 matrices 60 times as fast (61 against 0.9 GFLOP/s).
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cpu":
        return torch.float32
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.numel
    stored = DTYPES[max(sizes, key=lambda kind: sizes[kind])]
    return torch.float32 if stored == torch.float64 else stored


def describe_device(device: torch.device) -> str:
    """The device and its kind: another kind may round otherwise."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type
