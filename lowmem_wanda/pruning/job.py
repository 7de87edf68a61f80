"""A pruning that is ready to start: everything that is chosen and checked before a weight is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.checkpoint.companions import Companions, companions
from lowmem_wanda.checkpoint.directory import fingerprint
from lowmem_wanda.data.calibration import Calibration, name_list
from lowmem_wanda.llamacpp.norms import Norms, load_norms
from lowmem_wanda.pruning import STEPS
from lowmem_wanda.pruning.allocate import rising
from lowmem_wanda.pruning.choices import (
    choose_calibration,
    choose_experts,
    choose_matrices,
    choose_method,
    choose_names,
    choose_pattern,
    judged,
    require_no_doubles,
    require_options,
    require_use_of_norms,
)
from lowmem_wanda.pruning.demand import demand
from lowmem_wanda.pruning.experts import MIN_TOKENS, OfExperts
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.sparsity.patterns import Pattern, Unstructured
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.machine import ANY, Machine
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel, describe_device, open_model, versions
from lowmem_wanda.streaming.tracing import Trace
from lowmem_wanda.streaming.walk import require_chain
from lowmem_wanda.streaming.workload import Workload

FLAGS = ("method", "pattern", "group", "include", "exclude", "zeros", "seed", "text", "statistics", "dtype", "batch",
         "device", "trust_remote_code", "calibration", "length", "recover", "recover_steps", "allocation", "min_tokens",
         "all_experts", "gate_weighted")  # fmt: skip
COUNTS = ("--sequences", "--length", "--recover-steps", "--min-tokens")
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
    recover: str = "none"
    recover_steps: int = STEPS
    allocation: str = "uniform"
    shares: tuple[float, ...] | None = None
    experts: OfExperts = OfExperts()

    @property
    def measures(self) -> bool:
        """Whether matrices are measured on the calibration before they are pruned."""
        return self.calibration is not None and self.norms is None and self.method.statistic is not None

    @property
    def recovers(self) -> bool:
        """Whether pruned blocks are trained."""
        return self.recover != "none"

    @property
    def keeps_bits(self) -> bool:
        """Whether the weights that are not pruned keep their bits."""
        return self.method.keeps_bits and not self.recovers

    def pattern_in(self, block: int) -> Pattern:
        """The pattern of the matrices in a block."""
        if self.shares is None or not isinstance(self.pattern, Unstructured):
            return self.pattern
        return replace(self.pattern, sparsity=self.shares[block])

    def selected_of(self, matrices: Iterable[Matrix], block: int) -> list[Matrix]:
        """Those of a block's traced `matrices` that are pruned."""
        names = {matrix.name for matrix in self.selected[block]}
        return [matrix for matrix in matrices if matrix.name in names]

    @cached_property
    def traces(self) -> dict[int, Trace]:
        """The trace of each block, which proves that blocks are a chain. {} without a calibration."""
        return require_chain(self.model, self.calibration.tokens) if self.calibration else {}

    @cached_property
    def traced(self) -> list[list[Matrix]]:
        """The matrices to prune, block by block, which know what inputs they share.

        Where a statistic is small, each linear counts as if it had inputs of its own, which need not be known.
        """
        known = not self.model.skeleton.is_plain  # by the trace that told what can be pruned
        if known or self.method.statistic is SquaredNorm or self.calibration is None:
            return [list(block) for block in self.selected]
        return [self.selected_of(self.traces[index].matrices, index) for index in range(self.model.depth)]

    @cached_property
    def has_experts(self) -> bool:
        """Whether matrices of experts are pruned."""
        return any(matrix.expert is not None for block in self.selected for matrix in block)

    @property
    def one_by_one(self) -> bool:
        """Whether statistics are so large that experts are measured one after the other, all sequences waiting."""
        return self.has_experts and self.measures and self.method.statistic is not SquaredNorm

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
        return demand(self)

    @property
    def recorded_on(self) -> str:
        """All that an importance matrix depends on, beside the shards and the batch, in one text."""
        text, shape = (self.calibration.sha256, self.calibration.tokens.shape) if self.calibration else ("", (0, 0))
        device = describe_device(self.model.device)
        return f"{text} {shape} {self.model.dtype_name} {self.moved_on_dense} {device}"

    def arguments(self, batch: int, trained_apart: bool = False) -> dict[str, Any]:
        """All that can change a bit of the result, as it stands in job.json.

        `batch` sequences are computed at a time, and the parts of a block are trained at once or `trained_apart`.
        """
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
            **({"allocation": self.allocation} if self.allocation != "uniform" else {}),
            **self._measured_on(batch),
            **(self.experts.settings if self.has_experts and self.measures else {}),
            **(
                {"recover": self.recover, "recover_steps": self.recover_steps, "trained_apart": trained_apart}
                if self.recovers
                else {}
            ),
            "device": describe_device(self.model.device),
            "trust_remote_code": self.model.trust_remote_code,
            **({"dequantize": True} if self.model.checkpoint.dequantized else {}),
            "small_files": {str(file): sha256_of(source.path / file) for file in self.companions.files},
            **{name.replace("-", "_"): running_on[name] for name in ("lowmem-wanda", "torch", "transformers")},
        }

    def _measured_on(self, batch: int) -> dict[str, Any]:
        """The part of `arguments` that can change the result only where matrices are measured."""
        if self.calibration is None or not (self.measures or self.recovers or self.allocation == "owl"):
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
    chosen, trained = choose_method(method, refine, update, variant, quality, recover)
    compared = choose_pattern(pattern, group, chosen)
    counts = (sequences, length, recover_steps, min_tokens)
    require_options((chosen, trained), compared, statistics, zeros, allocation, dict(zip(COUNTS, counts, strict=True)))
    needs_text = bool(imatrix) or trained != "none" or allocation == "owl"
    if norms:
        require_use_of_norms(norms, chosen, statistics, () if needs_text else text)
    model = source if isinstance(source, StreamedModel) else open_model(source, machine)
    selected = choose_matrices(model, compared, include, exclude)
    matrices = [matrix for block in selected for matrix in block]
    experts = choose_experts(model, matrices, (min_tokens, all_experts, gate_weighted), chosen, statistics)
    require_no_doubles(model, matrices if zeros != "exact" else ())
    names, columns = choose_names(model, norms, imatrix), {matrix.name: matrix.shape[1] for matrix in matrices}
    known = load_norms(str(norms), names, columns) if norms else None
    if not needs_text and (known or chosen.statistic is None):
        calibration = None  # nothing is measured
    else:
        calibration = calibration or choose_calibration(model, text, sequences, length, seed)
        calibration = judged(calibration, matrices, chosen, trained, model.batch)
    return PruneJob(
        model=model, method=chosen, pattern=compared, selected=selected, calibration=calibration,
        statistics=statistics, seed=seed, include=tuple(include), exclude=tuple(exclude), norms=known,
        imatrix=Path(imatrix) if imatrix else None, names=names, zeros=zeros, verify_source=verify_source,
        recover=trained, recover_steps=recover_steps, allocation=allocation, experts=experts,
        shares=rising(compared, selected) if allocation == "atp" and isinstance(compared, Unstructured) else None,
    )  # fmt: skip
