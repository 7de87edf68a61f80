"""A pruning ready to start: everything that is checked and chosen before a weight is read."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from lowmem_wanda import __version__
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.output import fingerprint
from lowmem_wanda.checkpoint.writer import sha256_of, small_files
from lowmem_wanda.data.calibration import Calibration, calibrate
from lowmem_wanda.errors import CalibrationError, PatternError
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.llamacpp.norms import Norms, load_norms
from lowmem_wanda.pruning.passes import greenlets
from lowmem_wanda.sparsity.methods import METHODS, Method
from lowmem_wanda.sparsity.patterns import Pattern, Unstructured, parse
from lowmem_wanda.streaming.model import FREE, Limits, Work, describe_device, open_work
from lowmem_wanda.streaming.skeleton import Hollow


@dataclass(frozen=True, kw_only=True)
class Task(Work):
    """One pruning, ready to start: the model without weights, the calibration tokens, and what is selected.

    `selected` has for each block {path of a linear in it: file tensor of its weight}. `norms` stand for what would
    be measured; `imatrix` is where an importance matrix goes, and `names` what its weights are called there. `zeros`
    is "exact", or "signed-tiny" for what is put in their place.
    """

    method: str
    pattern: Pattern
    calibration: Calibration | None
    selected: tuple[dict[str, str], ...]
    seed: int
    statistics: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    norms: Norms | None
    imatrix: Path | None
    names: Mapping[str, str]
    zeros: str

    @property
    def measures(self) -> bool:
        """Whether linears are measured on the calibration before they are pruned."""
        return self.calibration is not None and self.norms is None and self.rule.statistic is not None

    @property
    def moved_on_dense(self) -> bool:
        """Whether a block moves the hidden states on before it is pruned."""
        return self.statistics == "dense" and self.measures

    @property
    def rule(self) -> Method:
        return METHODS[self.method]

    @cached_property
    def files(self) -> list[Path]:
        """The small files that go along, config.json among them."""
        return small_files(self.checkpoint.path, code=self.trust_remote_code)

    @property
    def scores(self) -> bool:
        return True

    @property
    def waits(self) -> bool:
        return self.statistics == "sequential" and self.measures

    @property
    def recorded_on(self) -> str:
        """What else than the shards an importance matrix depends on, beside the batch."""
        text = self.calibration.sha256 if self.calibration else ""
        return f"{text} {self.shape} {self.dtype_name} {self.moved_on_dense} {describe_device(self.device)}"

    def arguments(self, batch: int) -> dict[str, Any]:
        """All that can change a bit of the result, as it stands in job.json; `batch` sequences at a time."""
        sparsity = {"sparsity": self.pattern.sparsity} if isinstance(self.pattern, Unstructured) else {}
        return {
            "source fingerprint": fingerprint(self.checkpoint),
            "--method": self.method,
            "--pattern": str(self.pattern),
            **sparsity,
            "--group": self.pattern.group,
            "--include": list(self.include),
            "--exclude": list(self.exclude),
            **({"--norms sha256": self.norms.sha256} if self.norms else {}),
            **({"--zeros": self.zeros, "--seed": self.seed} if self.zeros != "exact" else {}),
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
        if self.calibration is None or not self.measures:
            return {"--text": []}
        return {
            "--text": list(self.calibration.sources),
            "--seed": self.seed,
            "calibration shape": list(self.calibration.tokens.shape),
            "calibration sha256": self.calibration.sha256,
            "--statistics": self.statistics,
            "--dtype": self.dtype_name,
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
    limits: Limits = FREE,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    trust_remote_code: bool = False,
    calibration: Calibration | None = None,
    norms: str | None = None,
    imatrix: str | Path | None = None,
    zeros: str = "exact",
) -> Task:
    """Checks everything that can be checked before work begins. Raises a LowmemError that says what is wrong.

    `sequences` of `length` tokens are calibrated on, `batch` of them at a time (default: as `layout` finds),
    measured in one of `orders`; or on a `calibration` that is there already; or `norms` of the dense model's inputs
    are read from an importance matrix. `imatrix` is a file for that of the pruned model. `include` and `exclude`
    are globs on tensor names, with or without ".weight".
    """
    kind, rule = _pattern(pattern, group, METHODS[method]), METHODS[method]
    if norms:
        _refuse_unused(norms, method, statistics, text if not imatrix else ())
    if statistics == "sequential" and rule.statistic:
        greenlets()
    work = open_work(source, device=device, dtype=dtype, limits=limits, trust_remote_code=trust_remote_code)
    checkpoint, model = work.checkpoint, work.hollow
    selected = _select(model, checkpoint, kind, include, exclude)
    names = gguf_names(model.weights, "--norms" if norms else "--imatrix") if norms or imatrix else {}
    columns = {name: model.matrix_shape(checkpoint.tensors[name])[1] for block in selected for name in block.values()}
    known = load_norms(norms, names, columns) if norms else None
    if not imatrix and (known or rule.statistic is None):
        calibration = None
    elif calibration is None:
        size = {"sequences": sequences, "length": work.window(length)}
        calibration = calibrate(text, work.encoder(text), vocabulary=model.vocabulary, seed=seed, **size)
    if zeros != "exact":
        _refuse_doubles(checkpoint, columns)
    shape = calibration.tokens.shape if calibration else (0, 0)
    settings = {field.name: getattr(work, field.name) for field in fields(Work)}
    return Task(
        **settings | {"judges": False, "shape": shape, "batch": batch and min(batch, shape[0] or 1)},
        method=method,
        pattern=kind,
        calibration=calibration,
        selected=selected,
        seed=seed,
        statistics=statistics,
        include=tuple(include),
        exclude=tuple(exclude),
        norms=known,
        imatrix=Path(imatrix) if imatrix else None,
        names=names,
        zeros=zeros,
    )


def _pattern(text: str, group: str | None, rule: Method) -> Pattern:
    """The pattern of a text; of a sparsity, in the group that was asked for or else the method's own."""
    kind = parse(text, group or "row")
    return replace(kind, group=rule.group) if group is None and isinstance(kind, Unstructured) else kind


def _refuse_unused(norms: str, method: str, statistics: str, text: Sequence[str]) -> None:
    """Raises CalibrationError for what norms that are known leave no use for."""
    given = {
        f"--method {method}": METHODS[method].statistic is None,
        f"--statistics {statistics}": statistics != "block",
        f"--text {' '.join(text)}": bool(text),
    }
    if useless := [flag for flag, there in given.items() if there]:
        raise CalibrationError(f"--norms {norms}: nothing is measured, {useless[0]} has no use; leave one of them out")


def _refuse_doubles(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises PatternError for a weight whose smallest number no GGUF holds."""
    for name in names:
        if checkpoint.tensors[name].dtype == "F64":
            raise PatternError(f"--zeros signed-tiny: tensor {name} is float64, whose smallest number is 0 in any GGUF")


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
        kind.require_shape(name, *model.matrix_shape(checkpoint.tensors[name]))
    return selected
