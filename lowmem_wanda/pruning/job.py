"""A pruning that is ready to start: everything that is chosen and checked before a weight is read."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.checkpoint.companions import Companions, companions
from lowmem_wanda.checkpoint.directory import fingerprint
from lowmem_wanda.checkpoint.reader import ITEMSIZE
from lowmem_wanda.data.calibration import Calibration, calibrate, name_list, require_counts
from lowmem_wanda.errors import CalibrationError, PatternError
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.llamacpp.norms import Norms, load_norms
from lowmem_wanda.pruning import ORDERS
from lowmem_wanda.pruning.passes import require_greenlet
from lowmem_wanda.sparsity import GROUPS
from lowmem_wanda.sparsity.methods.known import find_method
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.sparsity.patterns import Pattern, Unstructured, parse
from lowmem_wanda.sparsity.selection import SCORE_BYTES, suitable_chunk
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.machine import ANY, Machine
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel, describe_device, open_model, versions
from lowmem_wanda.streaming.placement import Workload
from lowmem_wanda.streaming.walk import require_chain

ZEROS = ("exact", "signed-tiny")
FLAGS = ("method", "pattern", "group", "include", "exclude", "zeros", "seed", "text", "statistics", "dtype", "batch",
         "device", "trust_remote_code", "calibration", "length")  # fmt: skip
LABELS = {
    "source_sha256": "--verify-source",
    "norms_sha256": "--norms sha256",
    "threads": "threads (OMP_NUM_THREADS)",
    "lowmem_wanda": "lowmem-wanda",
}


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """One pruning, ready to start: what is pruned, how, and what its matrices are measured on.

    `selected` are the matrices to prune, block by block. `statistics` is one of ORDERS. `norms`, if given, replace the
    measuring. `imatrix` is the file that the importance matrix is written to, and `names` are llama.cpp's names of the
    matrices. `zeros` is "exact", or "signed-tiny" for the smallest numbers with random signs in place of zeros. With
    `verify_source`, another run knows the source again by all of its bytes.
    """

    model: StreamedModel
    method: Method
    pattern: Pattern
    selected: tuple[tuple[Matrix, ...], ...]
    calibration: Calibration | None
    statistics: str
    seed: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    norms: Norms | None
    imatrix: Path | None
    names: Mapping[str, str]
    zeros: str
    verify_source: bool

    @property
    def measures(self) -> bool:
        """Whether matrices are measured on the calibration before they are pruned."""
        return self.calibration is not None and self.norms is None and self.method.statistic is not None

    @property
    def moved_on_dense(self) -> bool:
        """Whether the dense block moves the hidden states on, before it is pruned."""
        return self.statistics == "dense" and self.measures

    @property
    def batch(self) -> int | None:
        """The number of sequences at a time that was asked for, at most all of them; None: as many as fit."""
        return self.model.batch and min(self.model.batch, self.workload.sequences or 1)

    @cached_property
    def companions(self) -> Companions:
        """The small files that are copied, config.json among them, and those that are left out."""
        return companions(self.model.checkpoint.path, code=self.model.trust_remote_code)

    @cached_property
    def workload(self) -> Workload:
        """What goes through the model, and the memory that this takes."""
        sequences, length = self.calibration.tokens.shape if self.calibration else (0, 0)
        matrices = [matrix for block in self.selected for matrix in block]
        tensors = self.model.checkpoint.tensors
        statistic = self.method.statistic if self.measures else None
        sums = [[statistic.nbytes(columns) for columns in block] for block in self._inputs] if statistic else [[0]]
        together, one = max(map(sum, sums)), max(max(block, default=0) for block in sums)
        return Workload(
            (self.model,),
            sequences,
            length,
            statistics=one if self.statistics == "sequential" else together,
            statistics_apart=one if self.statistics == "block" else 0,
            workspace=max(self.method.workspace(*one.shape, ITEMSIZE[tensors[one.tensor].dtype]) for one in matrices),
            chunk=suitable_chunk(self.model.device),
            score_bytes=SCORE_BYTES,
            holds_micro_batches=self.statistics == "sequential" and self.measures,
        )

    @cached_property
    def _inputs(self) -> list[list[int]]:
        """The numbers of columns of the distinct inputs of each block's matrices.

        Where a statistic is small, each matrix counts as if it had inputs of its own, which need not be known.
        """
        if self.method.statistic is SquaredNorm or self.calibration is None:
            return [[matrix.shape[1] for matrix in block] for block in self.selected]
        traces = require_chain(self.model, self.calibration.tokens)
        names = [{matrix.name for matrix in block} for block in self.selected]
        shared = [
            {one.inputs: one.shape[1] for one in traces[index].matrices if one.name in names[index]}
            for index in range(self.model.depth)
        ]
        return [list(columns.values()) for columns in shared]

    @property
    def recorded_on(self) -> str:
        """All that an importance matrix depends on, beside the shards and the batch, in one text."""
        text, shape = (self.calibration.sha256, self.calibration.tokens.shape) if self.calibration else ("", (0, 0))
        device = describe_device(self.model.device)
        return f"{text} {shape} {self.model.dtype_name} {self.moved_on_dense} {device}"

    def arguments(self, batch: int) -> dict[str, Any]:
        """All that can change a bit of the result, as it stands in job.json, for `batch` sequences at a time."""
        source, running_on = self.model.checkpoint, versions()
        return {
            "source_fingerprint": fingerprint(source),
            **({"source_sha256": {file.name: sha256_of(file) for file in source.files}} if self.verify_source else {}),
            "method": str(self.method),
            **({"method_code": self.method.code} if self.method.code else {}),
            "pattern": str(self.pattern),
            **({"sparsity": self.pattern.sparsity} if isinstance(self.pattern, Unstructured) else {}),
            "group": self.pattern.group,
            "include": list(self.include),
            "exclude": list(self.exclude),
            **({"norms_sha256": self.norms.sha256} if self.norms else {}),
            **({"zeros": self.zeros, "seed": self.seed} if self.zeros != "exact" else {}),
            **self._measured_on(batch),
            "device": describe_device(self.model.device),
            "trust_remote_code": self.model.trust_remote_code,
            "small_files": {str(file): sha256_of(source.path / file) for file in self.companions.files},
            **{name.replace("-", "_"): running_on[name] for name in ("lowmem-wanda", "torch", "transformers")},
        }

    def _measured_on(self, batch: int) -> dict[str, Any]:
        """The part of `arguments` that can change the result only where matrices are measured."""
        if self.calibration is None or not self.measures:
            return {"text": []}
        return {
            "text": list(self.calibration.sources),
            "seed": self.seed,
            "calibration_shape": list(self.calibration.tokens.shape),
            "calibration_sha256": self.calibration.sha256,
            "statistics": self.statistics,
            "dtype": self.model.dtype_name,
            "batch": batch,
            "threads": torch.get_num_threads() if self.model.device.type == "cpu" else 0,
        }


def label(name: str) -> str:
    """The name of a job's argument in messages: its flag, where it has one."""
    return LABELS.get(name) or (f"--{name.replace('_', '-')}" if name in FLAGS else name.replace("_", " "))


def prepare(
    source: str | Path | StreamedModel,
    *,
    method: str | Method = "wanda",
    pattern: str = "2:4",
    group: str | None = None,
    text: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
    statistics: str = "block",
    include: str | Path | Sequence[str | Path] = (),
    exclude: str | Path | Sequence[str | Path] = (),
    norms: str | Path | None = None,
    imatrix: str | Path | None = None,
    zeros: str = "exact",
    verify_source: bool = False,
    calibration: Calibration | None = None,
    machine: Machine = ANY,
) -> PruneJob:
    """The job of pruning a checkpoint or an open model, after all that can be checked beforehand has been checked.

    A `calibration` that is made already replaces `text`, `sequences` and `length`. All other parameters are those of
    `prune`. Raises a LowmemError that says what is wrong.
    """
    text, include, exclude = map(name_list, (text, include, exclude))
    chosen = find_method(method)
    compared = _choose_pattern(pattern, group, chosen)
    _require_known(statistics, zeros, sequences, length)
    if norms:
        _require_use_of_norms(norms, chosen, statistics, text if not imatrix else ())
    if statistics == "sequential" and chosen.statistic:
        require_greenlet()
    model = source if isinstance(source, StreamedModel) else open_model(source, machine)
    selected = _choose_matrices(model, compared, include, exclude)
    matrices = [matrix for block in selected for matrix in block]
    if zeros != "exact":
        _require_no_doubles(model, matrices)
    names, known = _choose_names(model, norms, imatrix), None
    if norms:
        known = load_norms(str(norms), names, {matrix.name: matrix.shape[1] for matrix in matrices})
    if not imatrix and (known or chosen.statistic is None):
        calibration = None  # nothing is measured
    elif calibration is None:
        calibration = _choose_calibration(model, text, sequences, length, seed)
    return PruneJob(
        model=model,
        method=chosen,
        pattern=compared,
        selected=selected,
        calibration=calibration,
        statistics=statistics,
        seed=seed,
        include=tuple(include),
        exclude=tuple(exclude),
        norms=known,
        imatrix=Path(imatrix) if imatrix else None,
        names=names,
        zeros=zeros,
        verify_source=verify_source,
    )


def _choose_pattern(text: str, group: str | None, method: Method) -> Pattern:
    """The pattern that a text names. A share is compared per `group`, or per the method's own group if that is None."""
    pattern = parse(text, "row" if group in (None, method.group) else group or "row")
    if group not in (None, method.group) and method.group not in GROUPS:
        raise PatternError(f"--group {group}: {method} compares {method.group} of its own; leave it out")
    own = group in (None, method.group) and isinstance(pattern, Unstructured)
    return replace(pattern, group=method.group) if own else pattern


def _choose_calibration(
    model: StreamedModel, text: Sequence[str], sequences: int, length: int, seed: int
) -> Calibration:
    """The calibration tokens of a text, in sequences that the model has positions for."""
    size = {"sequences": sequences, "length": model.window(length), "seed": seed}
    return calibrate(text, model.encode, vocabulary=model.skeleton.vocabulary, render=model.render, **size)


def _choose_names(model: StreamedModel, norms: str | Path | None, imatrix: str | Path | None) -> Mapping[str, str]:
    """llama.cpp's names of the matrices; {} where there are neither norms nor an importance matrix."""
    weights = [matrix.name for matrix in model.skeleton.all_matrices]
    return gguf_names(weights, "--norms" if norms else "--imatrix") if norms or imatrix else {}


def _choose_matrices(
    model: StreamedModel, pattern: Pattern, include: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[Matrix, ...], ...]:
    """The matrices to prune, block by block.

    Raises PatternError for a glob that matches no matrix, or a matrix that the pattern does not fit.
    """
    blocks = model.skeleton.matrices
    names = {matrix.name for matrix in model.skeleton.all_matrices}

    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(
            fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.removesuffix(".weight"), glob) for glob in globs
        )

    for flag, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(matches(name, [glob]) for name in names):
                raise PatternError(f"{flag} {glob!r} matches no prunable tensor; they are named as {min(names)}")
    selected = tuple(
        tuple(one for one in block if (not include or matches(one.name, include)) and not matches(one.name, exclude))
        for block in blocks
    )
    if not any(selected):
        raise PatternError("--include and --exclude leave nothing to prune; widen them")
    for matrix in (matrix for block in selected for matrix in block):
        pattern.require_shape(matrix.name, *matrix.shape)
    return selected


def _require_known(statistics: str, zeros: str, sequences: int, length: int) -> None:
    """Raises PatternError for an unknown word, CalibrationError for a number below 1."""
    for flag, word, known in (("--statistics", statistics, ORDERS), ("--zeros", zeros, ZEROS)):
        if word not in known:
            raise PatternError(f"{flag} {word}: give one of {', '.join(known)}")
    require_counts({"--sequences": sequences, "--length": length})


def _require_use_of_norms(norms: str | Path, method: Method, statistics: str, text: Sequence[str]) -> None:
    """Raises CalibrationError for flags that --norms makes useless, and for a method that measures more than norms."""
    useless = {
        f"--method {method}": method.statistic is None,
        f"--statistics {statistics}": statistics != "block",
        f"--text {' '.join(text)}": bool(text),
    }
    for flag, there in useless.items():
        if there:
            raise CalibrationError(f"--norms {norms}: nothing is measured, {flag} has no use; leave one of them out")
    if method.statistic is not SquaredNorm:
        raise CalibrationError(f"--norms {norms}: method {method} measures more than norms; give it calibration text")


def _require_no_doubles(model: StreamedModel, matrices: Iterable[Matrix]) -> None:
    """Raises PatternError for a float64 matrix, whose smallest number a GGUF cannot hold."""
    for matrix in matrices:
        if model.checkpoint.tensors[matrix.tensor].dtype == "F64":
            raise PatternError(
                f"--zeros signed-tiny: tensor {matrix.name} is float64, whose smallest number is 0 in any GGUF"
            )
