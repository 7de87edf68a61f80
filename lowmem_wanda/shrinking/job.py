"""A removal of experts that is ready to start: everything that is chosen and checked before a weight is read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.checkpoint.companions import Companions, companions
from lowmem_wanda.checkpoint.directory import Checkpoint, fingerprint
from lowmem_wanda.data.calibration import Calibration
from lowmem_wanda.llamacpp.expert_choice import LayerChoice
from lowmem_wanda.pruning.job import PruneJob
from lowmem_wanda.shrinking.choice import Sums, choose
from lowmem_wanda.sparsity.experts import super_experts
from lowmem_wanda.streaming.expert_layout import ExpertLayout
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel, describe_device, versions
from lowmem_wanda.streaming.skeleton import Skeleton
from lowmem_wanda.streaming.smaller import Smaller
from lowmem_wanda.streaming.workload import Workload

BUSIEST = 4  # times as many tokens as in the mean, that the busiest expert is taken to have


@dataclass(frozen=True, kw_only=True)
class ShrinkJob:
    """One removal of experts, ready to start: which checkpoint, how many are kept in each layer, and what decides.

    `source` is the checkpoint as it is stored and `layout` where its experts lie. `model` computes, from values that
    are dequantized where `source` is quantized. `planned` are {layer: kept ids} of a plan, and `known` the sums of
    layers that were measured before. `given` are the checksums of files that decide, and `origin` the name of
    one. In the order `statistics` "block"
    each layer is measured on what the smaller blocks before it put out, else on what the whole ones do. With `refit`,
    kept experts are fitted to the whole layer. With `protect` experts that put out outlying values are kept: then all
    layers are measured before the first is chosen. `small` is the smaller model, and `computing` the layout of what is
    computed with. With `pruning` the matrices that are left are masked by it, in the same walk.
    """

    source: Checkpoint
    layout: ExpertLayout
    model: StreamedModel
    keep: int
    score: str
    seed: int
    planned: Mapping[int, tuple[int, ...]]
    known: Mapping[int, Sums]
    given: Mapping[str, str]
    origin: str
    calibration: Calibration | None
    mtp: str
    verify_source: bool
    statistics: str
    refit: bool
    protect: bool
    small: Skeleton
    computing: ExpertLayout
    pruning: PruneJob | None = None

    @property
    def measures(self) -> bool:
        """Whether experts are measured in a forward pass."""
        return self.calibration is not None

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that keep experts."""
        return self.layout.layers if self.mtp == "keep" else self.layout.running

    @property
    def in_place(self) -> bool:
        """Whether what is computed with has the bytes of the source, so that it can be written."""
        return self.source.tensors == self.model.checkpoint.tensors

    def choose(self, layer: int, sums: Sums | None) -> LayerChoice:
        """The choice of a layer, from its sums where the score is of what experts put out."""
        if layer in self.planned:
            return LayerChoice(self.planned[layer], "plan", None)
        protected = self.protected.get(layer, ())
        return choose(self.layout, layer, self.keep, self.score, sums, self.model.checkpoint, self.seed, protected)

    @cached_property
    def protected(self) -> Mapping[int, tuple[int, ...]]:
        """{layer: ids} of the experts that are kept whatever their score is, of what is known of all layers."""
        if not self.protect:
            return {}
        largest = {layer: np.asarray(self.known[layer]["largest"]) for layer in self.layout.running}
        return super_experts(largest, self.model.depth)

    @cached_property
    def companions(self) -> Companions:
        """The small files that are copied, and those that are left out."""
        return companions(self.source.path, code=self.model.trust_remote_code)

    @cached_property
    def workload(self) -> Workload:
        """What goes through the model, and the memory that this takes."""
        sequences, length = self.calibration.tokens.shape if self.calibration else (0, 0)
        if not self.passes_twice:
            return Workload((self.model,), sequences, length)
        tokens, size = sequences * length, self.model.dtype.itemsize
        fitted = tokens * self.model.skeleton.width * (size + 4) * self.refit  # what a layer is given and puts out
        largest = max(matrix.weights for matrix in self.model.skeleton.all_matrices) * size
        workspace = 2 * largest + (self._fitting(tokens) if self.refit else 0)
        made = Workload((self.model,), sequences, length, statistics=fitted, workspace=workspace, whole_blocks=True)
        if self.pruning is None:
            return made
        masks = self.pruning.workload
        return replace(made, statistics=fitted + masks.statistics, workspace=made.workspace + masks.workspace,
                       chunk=masks.chunk, score_bytes=masks.score_bytes)  # fmt: skip

    def _fitting(self, tokens: int) -> int:
        """The bytes of a refit: what is added to each kept down projection, and the work on one of many tokens."""
        down = [one.shape for one in self.model.skeleton.all_matrices if one.parameter == "down_proj"]
        rows, columns = max((one for one in down), key=lambda shape: shape[0] * shape[1], default=(0, 0))
        busy = min(tokens, BUSIEST * tokens * max(1, self.layout.used) // self.keep)
        kept = 4 * tokens * self.model.skeleton.width + self.keep * rows * columns * self.model.dtype.itemsize
        return kept + 4 * (self.keep * rows * columns + busy * (3 * columns + rows) + 3 * columns * columns)

    @property
    def passes_twice(self) -> bool:
        """Whether blocks are computed with all of their experts, and with those that are kept."""
        return self.calibration is not None and (self.refit or self.statistics == "block")

    def moved_in(self, block: int, kept: Sequence[int], still: Collection[int]) -> list[str]:
        """The file tensors of the result that a refit of a block changes; those of the experts `still` are not."""
        down = {
            matrix.tensor
            for matrix in self.model.skeleton.matrices[block]
            if matrix.parameter == "down_proj" and matrix.expert in set(kept) - set(still)
        }
        return [made.name for tensor, made in self.layout.tensors({block: kept}) if tensor.name in down]

    def smaller(self) -> Smaller | None:
        """What gives the smaller blocks; None where they are not computed."""
        if not self.passes_twice:
            return None
        return Smaller(self.small, self.computing, self.model.device, self.model.dtype)

    @property
    def selected(self) -> tuple[tuple[Matrix, ...], ...]:
        """The matrices that are pruned, block by block: none."""
        return ()

    @property
    def batch(self) -> int | None:
        """The number of sequences at a time that was asked for, at most all of them; None: as many as fit."""
        return self.model.batch and min(self.model.batch, self.workload.sequences or 1)

    @property
    def source_sums(self) -> dict[str, str]:
        """{file of the source: its checksum}."""
        return {file.name: sha256_of(file) for file in self.source.files}

    def arguments(self, batch: int) -> dict[str, Any]:
        """All that can change a bit of the result, as it stands in job.json."""
        running_on, model = versions(), self.model
        measured = self.calibration and {
            "text": list(self.calibration.sources),
            "calibration_shape": list(self.calibration.tokens.shape),
            "calibration_sha256": self.calibration.sha256,
            "statistics": self.statistics,
            "refit": self.refit,
            "dtype": model.dtype_name,
            "batch": batch,
            "threads": torch.get_num_threads() if model.device.type == "cpu" else 0,
        }
        return {
            "source_fingerprint": fingerprint(self.source),
            **({"source_sha256": self.source_sums} if self.verify_source else {}),
            "experts": self.layout.count,
            "keep_experts": self.keep,
            "score": self.score,
            **self.given,
            **({"seed": self.seed} if self.calibration or self.score == "random" else {}),
            **(measured or {}),
            **({"protect": "super"} if self.protect else {}),
            **({"pattern": str(self.pruning.pattern)} if self.pruning else {}),
            "mtp": self.mtp if self.layout.predicting else "none",
            "device": describe_device(model.device),
            "trust_remote_code": model.trust_remote_code,
            **({"dequantize": True} if self.source.dequantized else {}),
            "small_files": {str(file): sha256_of(self.source.path / file) for file in self.companions.files},
            **{name.replace("-", "_"): running_on[name] for name in ("lowmem-wanda", "torch", "transformers")},
        }  # fmt: skip
