"""A pruning ready to start: everything that is checked and chosen before a weight is read."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from lowmem_wanda import __version__
from lowmem_wanda.checkpoint import FLOATS, Checkpoint, refuse_unprunable
from lowmem_wanda.errors import ModelError, PatternError
from lowmem_wanda.hollow import Hollow, hollow, tokenizer
from lowmem_wanda.job import fingerprint
from lowmem_wanda.methods import METHODS, Method
from lowmem_wanda.orders import greenlets
from lowmem_wanda.patterns import Pattern, Ratio, parse
from lowmem_wanda.reading import Tensor
from lowmem_wanda.tensors import DTYPES, laid_bytes, wanted
from lowmem_wanda.text import Calibration, calibrate, holds_ids
from lowmem_wanda.writer import sha256_of, small_files


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


@dataclass(frozen=True)
class Task:
    """One pruning, ready to start: the model without weights, the calibration tokens, and what is selected.

    `selected` has for each block {path of a linear in it: file tensor of its weight}.
    """

    checkpoint: Checkpoint
    hollow: Hollow
    method: str
    pattern: Pattern
    calibration: Calibration | None
    selected: tuple[dict[str, str], ...]
    device: torch.device
    dtype: torch.dtype
    batch: int | None
    seed: int
    statistics: str
    limits: Limits
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    trust_remote_code: bool

    @property
    def rule(self) -> Method:
        return METHODS[self.method]

    @cached_property
    def files(self) -> list[Path]:
        """The small files that go along, config.json among them."""
        return small_files(self.checkpoint.path, code=self.trust_remote_code)

    def block_tensors(self, index: int) -> list[Tensor]:
        """The file tensors of one block."""
        return [self.checkpoint.tensors[name] for name in sorted(set(self.hollow.block_tensors(index).values()))]

    @cached_property
    def block_bytes(self) -> int:
        """What the largest block takes, laid in a buffer."""
        return max(laid_bytes(wanted(self.block_tensors(index))) for index in range(len(self.selected)))

    def arguments(self, batch: int) -> dict[str, Any]:
        """All that can change a bit of the result, as it stands in job.json; `batch` sequences at a time."""
        sparsity = {"sparsity": self.pattern.sparsity} if isinstance(self.pattern, Ratio) else {}
        return {
            "source fingerprint": fingerprint(self.checkpoint),
            "--method": self.method,
            "--pattern": str(self.pattern),
            **sparsity,
            "--group": self.pattern.group,
            "--include": list(self.include),
            "--exclude": list(self.exclude),
            **self.measuring(batch),
            "--device": describe_device(self.device),
            "--trust-remote-code": self.trust_remote_code,
            "small files": {str(file): sha256_of(self.checkpoint.path / file) for file in self.files},
            "lowmem-wanda": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def measuring(self, batch: int) -> dict[str, Any]:
        """The part of `arguments` that matters where something is measured."""
        if self.calibration is None:
            return {"--text": []}
        return {
            "--text": list(self.calibration.sources),
            "--seed": self.seed,
            "calibration shape": list(self.calibration.tokens.shape),
            "calibration sha256": self.calibration.sha256,
            "--statistics": self.statistics,
            "--dtype": str(self.dtype).removeprefix("torch."),
            "--batch": batch,
            "threads (OMP_NUM_THREADS)": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }


def prepare(
    source: str | Path,
    *,
    method: str = "wanda",
    pattern: str = "2:4",
    group: str | None = None,
    text: Sequence[str] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    statistics: str = "block",
    limits: Limits = Limits(),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Task:
    """Checks everything that can be checked before work begins. Raises a LowmemError that says what is wrong.

    `sequences` of `length` tokens are calibrated on, `batch` of them at a time (default: as `layout` finds),
    measured in one of `orders`. `include` and `exclude` are globs on tensor names, with or without
    ".weight".
    """
    kind = _pattern(pattern, group, METHODS[method])
    if statistics == "sequential":
        greenlets()
    checkpoint = Checkpoint(source)
    refuse_unprunable(checkpoint, trust_remote_code)
    where = find_device(device)
    computing = find_dtype(dtype, where, checkpoint)
    model = hollow(checkpoint, computing, trust_remote_code)
    selected = _select(model, checkpoint, kind, include, exclude)
    calibration = None
    if METHODS[method].statistic is not None:
        encode = (lambda _: []) if holds_ids(text) else tokenizer(checkpoint, trust_remote_code)
        size = {"sequences": sequences, "length": min(length, model.positions or length)}
        calibration = calibrate(text, encode, vocabulary=model.vocabulary, seed=seed, **size)
    return Task(
        checkpoint=checkpoint,
        hollow=model,
        method=method,
        pattern=kind,
        calibration=calibration,
        selected=selected,
        device=where,
        dtype=computing,
        batch=batch and min(batch, len(calibration.tokens) if calibration else 1),
        seed=seed,
        statistics=statistics,
        limits=limits,
        include=tuple(include),
        exclude=tuple(exclude),
        trust_remote_code=trust_remote_code,
    )


def _pattern(text: str, group: str | None, rule: Method) -> Pattern:
    """The pattern of a text; of a sparsity, in the group that was asked for or else the method's own."""
    kind = parse(text, group or "row")
    return replace(kind, group=rule.group) if group is None and isinstance(kind, Ratio) else kind


def _select(
    model: Hollow, checkpoint: Checkpoint, kind: Pattern, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, str], ...]:
    """The linears to prune, block by block. Raises PatternError for a glob or a pattern that fits none."""
    linears = [model.linears(index) for index in range(len(model.blocks))]
    names = {name for block in linears for name in block.values()}

    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(
            fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.removesuffix(".weight"), glob) for glob in globs
        )

    for flag, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(matches(name, [glob]) for name in names):
                raise PatternError(f"{flag} {glob!r} matches no prunable tensor; they are named as {min(names)}")
    selected = tuple(
        {
            path: name
            for path, name in block.items()
            if (not include or matches(name, include)) and not matches(name, exclude)
        }
        for block in linears
    )
    if not any(selected):
        raise PatternError("--include and --exclude leave nothing to prune; widen them")
    for name in (name for block in selected for name in block.values()):
        kind.check_shape(name, *model.matrix_shape(checkpoint.tensors[name]))
    return selected


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
