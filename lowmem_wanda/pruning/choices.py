"""What is chosen for a job beforehand, each choice with its requirements: pattern, matrices, calibration, names."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lowmem_wanda.data.calibration import Calibration, calibrate, require_counts
from lowmem_wanda.errors import CalibrationError, PatternError
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.pruning import ALLOCATIONS, ORDERS, QUALITIES, RECOVERIES, STEPS
from lowmem_wanda.pruning.experts import OfExperts
from lowmem_wanda.sparsity import GROUPS
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.known import find_method
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.sparsity.patterns import Pattern, Unstructured, parse
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.flows import require_greenlet
from lowmem_wanda.streaming.matrices import Matrix
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.walk import prunable
from lowmem_wanda.streaming.watching import Observe

ZEROS = ("exact", "signed-tiny")


def choose_method(
    method: str | Method, refine: str, update: str, variant: bool, quality: str | None, recover: str | None
) -> tuple[Method, str]:
    """The method, and what is trained of a pruned block. Raises PatternError for what is unknown or at odds.

    A name such as "alps+recover" stands for both, and a `quality` chooses both.
    """
    if quality is not None:
        if quality not in QUALITIES:
            raise PatternError(f"--quality {quality}: give one of {', '.join(QUALITIES)}")
        if method != "wanda" or refine != "none" or update != "none" or variant:
            raise PatternError(f"--quality {quality} chooses the method; leave --method, --refine and --update out")
        method = QUALITIES[quality]
    if isinstance(method, str) and method.endswith("+recover"):
        if recover not in (None, "block"):
            raise PatternError(f"--recover {recover}: {method} recovers the block; leave one of them out")
        method, recover = method.removesuffix("+recover"), recover or "block"
    if variant:
        if method != "wanda":
            raise PatternError(f"--variant is of wanda, and --method is {method}; leave one of them out")
        method = "wanda-variant"
    if (recover or "none") not in RECOVERIES:
        raise PatternError(f"--recover {recover}: give one of {', '.join(RECOVERIES)}")
    return find_method(method, refine, update), recover or "none"


def require_options(
    chosen: tuple[Method, str],
    pattern: Pattern,
    statistics: str,
    zeros: str,
    allocation: str,
    counts: Mapping[str, int],
) -> None:
    """Raises PatternError or CalibrationError for an unknown word, a count below 1, and what does not go together.

    `chosen` are the method and what is trained; `counts` are the numbers by their flags.
    """
    method, recover = chosen
    for flag, word, known in (
        ("--statistics", statistics, ORDERS),
        ("--zeros", zeros, ZEROS),
        ("--allocation", allocation, ALLOCATIONS),
    ):
        if word not in known:
            raise PatternError(f"{flag} {word}: give one of {', '.join(known)}")
    require_counts(counts)
    if recover == "none" and counts["--recover-steps"] != STEPS:
        raise PatternError("--recover-steps: nothing is trained without --recover; give --recover block, too")
    if allocation != "uniform" and not isinstance(pattern, Unstructured):
        raise PatternError(f"--allocation {allocation}: divides a share, such as 50%, and {pattern} has none")
    if recover != "none":
        _require_recovery(recover, statistics, zeros, counts["--sequences"])
    if statistics == "sequential" and method.statistic:
        require_greenlet()


def _require_recovery(recover: str, statistics: str, zeros: str, sequences: int) -> None:
    """Raises PatternError or CalibrationError for what does not go with training a pruned block."""
    if statistics == "dense":
        raise PatternError(
            f"--recover {recover}: trains on what pruned blocks put out, and --statistics dense keeps them from it; "
            "leave one of them out"
        )
    if zeros != "exact":
        raise PatternError(f"--zeros {zeros}: --recover {recover} holds zeros; leave one of them out")
    if sequences < 2:
        raise CalibrationError(f"--recover {recover}: needs 2 sequences at least, one of which is held out")


def choose_pattern(text: str, group: str | None, method: Method) -> Pattern:
    """The pattern that a text names. A share is compared per `group`, or per the method's own group if that is None."""
    if method.group == "variant" and ":" in text:
        raise PatternError(
            f"--variant: is of a share such as 50%, and {text} has groups of its own; leave one of them out"
        )
    own = method.group not in GROUPS
    asked = None if own and group == method.group else group
    pattern = parse(text, asked or "row")
    if own and asked:
        raise PatternError(f"--group {group}: {method} compares {method.group} of its own; leave it out")
    return replace(pattern, group=method.group) if asked is None and isinstance(pattern, Unstructured) else pattern


def choose_calibration(
    model: StreamedModel, text: Sequence[str], sequences: int, length: int, seed: int
) -> Calibration:
    """The calibration tokens of a text, in sequences that the model has positions for."""
    size = {"sequences": sequences, "length": model.window(length), "seed": seed}
    return calibrate(text, model.encode, vocabulary=model.skeleton.vocabulary, render=model.render, **size)


def judged(
    calibration: Calibration, matrices: Sequence[Matrix], method: Method, trained: str, batch: int | None
) -> Calibration:
    """The calibration, with a warning where X^T X of so few tokens is singular.

    Raises CalibrationError where what is `trained` needs a micro-batch to be held out, and there is one alone.
    """
    count, length = calibration.tokens.shape
    if trained != "none" and batch is not None and batch >= count:
        raise CalibrationError(
            f"--recover {trained}: --batch {batch} makes one micro-batch of {count} sequences, and one is held out; "
            f"give --batch {max(1, count // 4)}, or leave it out"
        )
    columns = max((matrix.shape[1] for matrix in matrices if matrix.expert is None), default=0)
    if method.statistic is not Gram or count * length >= columns:
        return calibration
    warning = (
        f"{count * length} tokens are fewer than the {columns} inputs of a matrix, so {method} fits weights to them "
        "alone; give more --sequences, or a larger --length"
    )
    return replace(calibration, warnings=(*calibration.warnings, warning))


def choose_names(model: StreamedModel, norms: str | Path | None, imatrix: str | Path | None) -> Mapping[str, str]:
    """llama.cpp's names of the matrices; {} where there are neither norms nor an importance matrix."""
    weights = [matrix.name for block in prunable(model) for matrix in block]
    return gguf_names(weights, "--norms" if norms else "--imatrix") if norms or imatrix else {}


def choose_matrices(
    model: StreamedModel, pattern: Pattern, include: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[Matrix, ...], ...]:
    """The matrices to prune, block by block.

    Raises PatternError for a glob that matches no matrix, or a matrix that the pattern does not fit.
    """
    blocks = prunable(model)
    names = {matrix.name for block in blocks for matrix in block}

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


def choose_experts(
    model: StreamedModel, matrices: Sequence[Matrix], flags: tuple[int, bool, bool], method: Method, statistics: str
) -> OfExperts:
    """How experts are measured, by the flags --min-tokens, --all-experts and --gate-weighted.

    Raises PatternError for ways that a model has no experts for, or that do not go together.
    """
    experts = OfExperts(flags[0], Observe(*flags[1:]))
    asked = [f"--{name.replace('_', '-')}" for name, value in experts.settings.items() if value is True]
    if len(asked) > 1:
        raise PatternError(f"{' and '.join(asked)}: tokens that an expert is not given have no weight; leave one out")
    if asked and not any(matrix.expert is not None for matrix in matrices):
        raise PatternError(f"{asked[0]}: no expert of {model.checkpoint.path} is pruned; leave it out")
    watched = next((name for trace in model.skeleton.traces.values() for name in trace.stacks), "")
    if asked and watched:
        raise PatternError(f"{asked[0]}: {watched} is computed in a way of its own, which it is not made for")
    if watched and method.statistic not in (None, SquaredNorm) and statistics != "sequential":
        raise PatternError(
            f"--method {method}: {watched} computes all experts at once, whose X^T X are not held together; give "
            "--statistics sequential"
        )
    return experts


def require_use_of_norms(norms: str | Path, method: Method, statistics: str, text: Sequence[str]) -> None:
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


def require_no_doubles(model: StreamedModel, matrices: Iterable[Matrix]) -> None:
    """Raises PatternError for a float64 matrix, whose smallest number a GGUF cannot hold."""
    for matrix in matrices:
        if model.checkpoint.tensors[matrix.tensor].dtype == "F64":
            raise PatternError(
                f"--zeros signed-tiny: tensor {matrix.name} is float64, whose smallest number is 0 in any GGUF"
            )
