"""A removal of experts is prepared: what is chosen, and what can be checked before a weight is read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.quantized import KINDS, kind_of
from lowmem_wanda.data.calibration import Calibration, name_list, require_counts
from lowmem_wanda.errors import ModelError, PatternError
from lowmem_wanda.llamacpp.expert_choice import numbers
from lowmem_wanda.pruning.choices import choose_calibration
from lowmem_wanda.pruning.job import prepare as prepare_pruning
from lowmem_wanda.shrinking.choice import Sums, chosen_score, read_scores
from lowmem_wanda.shrinking.from_imatrix import Estimates
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.sparsity import MEASURED
from lowmem_wanda.sparsity.experts import require_kept
from lowmem_wanda.sparsity.patterns import parse
from lowmem_wanda.streaming.expert_layout import ExpertLayout, expert_layout
from lowmem_wanda.streaming.experts import is_experts
from lowmem_wanda.streaming.machine import ANY, Machine
from lowmem_wanda.streaming.model import StreamedModel, open_model, open_structure
from lowmem_wanda.streaming.skeleton import Skeleton, build_skeleton

NUMBERED = re.compile(r"experts\W*\d")  # an expert by its number, in a configuration
ORDERS = ("dense", "block")
PROTECTED = ("none", "super")
MTP = ("keep", "drop")  # what becomes of layers that predict further tokens


def prepare(
    source: str | Path | StreamedModel,
    *,
    drop_experts: str | float | None = None,
    keep_experts: int | None = None,
    score: str | None = None,
    plan: str | Path | None = None,
    scores_from: str | Path | None = None,
    mtp: str = "keep",
    statistics: str = "dense",
    refit: bool = False,
    protect: str = "none",
    pattern: str | None = None,
    text: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
    verify_source: bool = False,
    calibration: Calibration | None = None,
    machine: Machine = ANY,
) -> ShrinkJob:
    """The job of removing experts of a checkpoint, after all that can be checked beforehand has been checked.

    Raises a LowmemError that says what is wrong.
    """
    text = name_list(text)
    decides = chosen_score(score, plan, scores_from)
    if mtp not in MTP:
        raise PatternError(f"--mtp {mtp}: give one of {', '.join(MTP)}")
    if statistics not in ORDERS:
        raise PatternError(f"--statistics {statistics}: give one of {', '.join(ORDERS)}")
    require_counts({"--sequences": sequences, "--length": length})
    model = source if isinstance(source, StreamedModel) else _opened(source, machine, bool(plan or scores_from))
    stored = model.checkpoint
    if stored.dequantized and not machine.dequantize:
        stored = Checkpoint(stored.path)
    layout = _layout(model, stored)
    keep, planned = numbers(layout, drop_experts, keep_experts, Path(plan) if plan else None)
    require_kept(layout.count, keep, layout.used, layout.groups, layout.groups_used)
    known = _known(Path(scores_from), layout, model) if scores_from else {}
    if (plan or scores_from or decides not in MEASURED) and text:
        raise PatternError("--text is what experts are measured on, and nothing is measured here; leave it out")
    measures = decides in MEASURED and not known
    _require_passes(measures, statistics, refit, model, stored)
    _require_known(protect, measures or (bool(known) and Path(scores_from or "").suffix != ".gguf"), statistics, refit)
    if pattern is not None:
        _require_masks(pattern, measures, statistics, refit, stored is model.checkpoint)
    if measures:
        _require_heard(model, layout)
        calibration = calibration or choose_calibration(model, text, sequences, length, seed)
    given = {name: sha256_of(Path(file)) for name, file in (("plan", plan), ("from", scores_from)) if file}
    computing = layout if stored is model.checkpoint else _layout(model, model.checkpoint)
    return ShrinkJob(
        source=stored, layout=layout, model=model, keep=keep, score=decides, seed=seed, planned=planned, known=known,
        origin=Path(plan or scores_from or "").name, given={f"{name}_sha256": value for name, value in given.items()},
        calibration=calibration if measures else None, mtp=mtp, verify_source=verify_source, statistics=statistics,
        refit=refit, protect=protect == "super", computing=computing, small=_smaller(model, computing, keep, mtp),
        pruning=None if pattern is None else prepare_pruning(model, pattern=pattern, calibration=calibration),
    )  # fmt: skip


def _opened(source: str | Path, machine: Machine, decided: bool) -> StreamedModel:
    """The model of a source, whose values are dequantized to compute.

    Where they cannot be, as those of int4, it is the model without file tensors, which will do where it is `decided`
    elsewhere which experts are kept.
    """
    stored = Checkpoint(source)
    kind = kind_of(stored.config())
    if not kind or kind in KINDS:
        return open_model(source, replace(machine, dequantize=True))
    if not decided:
        raise PatternError(
            f"{stored.path}: quantization_config says {kind}, whose values are not read: give --plan, or --from "
            "scores.json of a checkpoint of this model that is not quantized"
        )
    if NUMBERED.search(json.dumps(stored.config()["quantization_config"])):
        raise ModelError(
            "config.json: quantization_config names experts by number, which is not supported yet; get a checkpoint "
            "that does not"
        )
    return open_structure(stored, machine)


def _known(path: Path, layout: ExpertLayout, model: StreamedModel) -> Mapping[int, Sums]:
    """What a file of scores, or an importance matrix, says of the experts."""
    return Estimates(path, model) if path.suffix == ".gguf" else read_scores(path, layout)


def _layout(model: StreamedModel, stored: Checkpoint) -> ExpertLayout:
    return expert_layout(model.skeleton.model, stored, model.skeleton.path, model.trust_remote_code)


def _require_heard(model: StreamedModel, layout: ExpertLayout) -> None:
    """Raises ModelError unless what the experts of every layer put out can be heard."""
    for layer in layout.running:
        count = sum(is_experts(module) for module in model.skeleton.blocks[layer].modules())
        if count != 1:
            raise ModelError(
                f"{type(model.skeleton.blocks[layer]).__name__}: has {count or 'no'} layers of experts that "
                "transformers lets be measured, so scores of what they put out are not known; give --score aimer, or "
                "--plan"
            )


def _smaller(model: StreamedModel, layout: ExpertLayout, keep: int, mtp: str) -> Skeleton:
    """The skeleton of the smaller model. Raises ModelError where it would not be one that transformers loads.

    What is not read, as int4, is not compared.
    """
    if not model.skeleton.names:
        return model.skeleton
    layers = layout.layers if mtp == "keep" else layout.running
    cut = layout.cut(dict.fromkeys(layers, tuple(range(keep))))
    return build_skeleton(cut, model.dtype, model.trust_remote_code)


def _require_passes(measures: bool, statistics: str, refit: bool, model: StreamedModel, stored: Checkpoint) -> None:
    """Raises PatternError for an order, or a refit, that does not go with the rest."""
    if not measures and (refit or statistics != "dense"):
        flag = "--refit" if refit else f"--statistics {statistics}"
        raise PatternError(f"{flag}: needs a forward pass, with a score of what experts put out; leave one of them out")
    if refit and stored is not model.checkpoint:
        raise PatternError(
            "--refit: changes weights, and those of this checkpoint are quantized: give --dequantize, too, to write "
            "bfloat16"
        )
    if refit and any(getattr(one, "has_post_expert_norm", False) for one in model.skeleton.model.modules()):
        raise ModelError("--refit: experts of this model are normed behind their down projection; leave it out")


def _require_known(protect: str, known: bool, statistics: str, refit: bool) -> None:
    """Raises PatternError where experts are to be protected by what they put out, and that is not known in time."""
    if protect not in PROTECTED:
        raise PatternError(f"--protect {protect}: give one of {', '.join(PROTECTED)}")
    if protect == "super" and not known:
        raise PatternError(
            "--protect super: is told by the largest values that experts put out, and they are not measured here; give "
            "a score that measures, such as reap, or --from what --record wrote"
        )
    if protect == "super" and (refit or statistics != "dense"):
        flag = "--refit" if refit else f"--statistics {statistics}"
        raise PatternError(
            f"--protect super: all layers are measured before the first is cut, so {flag} does not go with it; leave "
            "one of them out"
        )


def _require_masks(pattern: str, measures: bool, statistics: str, refit: bool, in_place: bool) -> None:
    """Raises PatternError where what is left cannot be pruned in the same walk."""
    said = f"--pattern {pattern}: "
    parse(pattern)
    if not measures:
        raise PatternError(f"{said}weights are pruned by what is measured, and nothing is here; prune what is written")
    if statistics != "block":
        raise PatternError(
            f"{said}what is left is measured on what the smaller blocks before it put out; give --statistics block, too"
        )
    if refit:
        raise PatternError(f"{said}changes what --refit would fit; leave one of them out")
    if not in_place:
        raise PatternError(
            f"{said}changes weights, and those of this checkpoint are quantized: give --dequantize, too, to write "
            "bfloat16"
        )
