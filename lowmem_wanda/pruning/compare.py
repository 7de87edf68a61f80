"""Several prunings of one checkpoint, each evaluated against the dense model: a table of what they cost."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowmem_wanda.checkpoint.output import JOB, fingerprint, finished
from lowmem_wanda.data.calibration import Calibration, calibrate
from lowmem_wanda.data.windows import Windows
from lowmem_wanda.errors import PatternError
from lowmem_wanda.evaluation.perplexity import evaluate
from lowmem_wanda.pruning.job import Task, prepare
from lowmem_wanda.pruning.prune import prune
from lowmem_wanda.pruning.report import comparison, read_rows, save, versions
from lowmem_wanda.sparsity.methods import METHODS
from lowmem_wanda.sparsity.patterns import Unstructured, parse
from lowmem_wanda.streaming.model import Work, describe_device, open_work

Samples = dict[tuple[int | None, int | None], Calibration]  # by sequences and seed
Notify = Callable[[str, dict[str, Any]], None]  # which variant, and the record of a block of it
FIGURES = (
    "perplexity", "perplexity_stderr", "kl_mean", "kl_mean_stderr", "kl_p99", "top1_agreement", "perplexity_ratio",
    "perplexity_ratio_stderr",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way of pruning; None for what does not matter to it: N:M has groups of its own, and a method without
    calibration has no sequences."""

    method: str
    pattern: str
    group: str | None
    statistics: str | None
    sequences: int | None
    seed: int | None

    @property
    def flags(self) -> dict[str, Any]:
        """As keywords of `prepare`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def variants(
    methods: Sequence[str],
    patterns: Sequence[str],
    groups: Sequence[str | None] = (None,),
    orders: Sequence[str] = ("block",),
    sequences: Sequence[int] = (128,),
    seeds: Sequence[int] = (0,),
) -> tuple[Variant, ...]:
    """All that differ. Raises PatternError for a word that is none of its kind."""
    for flag, given, known in (
        ("--methods", methods, tuple(METHODS)),
        ("--groups", groups, (None, "row", "matrix")),
        ("--statistics", orders, ("block", "dense", "sequential")),
    ):
        for word in given:
            if word not in known:
                raise PatternError(f"{flag} {word}: is none; there are {', '.join(filter(None, known))}")
    if min(sequences) < 1:
        raise PatternError(f"--sequences {min(sequences)}: give whole numbers above 0")
    made = []
    for pattern, method, group, order, count, seed in product(patterns, methods, groups, orders, sequences, seeds):
        kind, rule = parse(pattern), METHODS[method]
        compared = (group or rule.group) if isinstance(kind, Unstructured) else None
        measured = (order, count, seed) if rule.statistic else (None, None, None)
        made.append(Variant(method, str(kind), compared, *measured))
    return tuple(dict.fromkeys(made))


def names(chosen: Sequence[Variant]) -> dict[Variant, str]:
    """A name for each: its method, its pattern, and whatever else those of the same method and pattern differ in."""
    words = {"group": "per {}", "statistics": "{}", "sequences": "{} sequences", "seed": "seed {}"}

    def name(variant: Variant) -> str:
        alike = [other for other in chosen if (other.method, other.pattern) == (variant.method, variant.pattern)]
        varied = [key for key in words if len({getattr(other, key) for other in alike}) > 1]
        rest = [words[key].format(getattr(variant, key)) for key in varied]
        return " ".join([variant.method, variant.pattern, *rest])

    return {variant: name(variant) for variant in chosen}


def compare(
    source: Path,
    target: Path,
    chosen: Sequence[Variant],
    text: Windows,
    *,
    calibration: Sequence[str] = (),
    length: int = 2048,
    machine: Mapping[str, Any],
    selection: Mapping[str, Any] = MappingProxyType({}),
    arguments: Mapping[str, Any],
    keep: bool = False,
    notify: Notify = lambda what, record: None,
) -> dict[str, Any]:
    """Prunes `source` in each chosen way in a folder of `target`, evaluates that on `text`, removes it unless it is to
    be kept, and gives the report, which is saved after every row (see `report.comparison`). Rows that are there
    from the same settings are not made again. `machine` are keywords of `open_work`, `selection` of `prepare`,
    `arguments` are for the report.
    """
    dense = open_work(source, **machine)
    given = {**{f"--{key}": list(globs) for key, globs in selection.items()}, "--calibration": list(calibration)}
    settings = _settings(dense, text) | given | {"--length": length}
    rows = read_rows(target, settings)
    samples = _samples(dense, chosen, calibration, length)
    chosen = tuple(dict.fromkeys(_as_sampled(variant, samples) for variant in chosen))
    samples |= {(len(sample.tokens), seed): sample for (_, seed), sample in samples.items()}
    titles = names([*chosen, *map(variant_of, rows)])
    rows = [row | {"name": titles[variant_of(row)]} for row in rows]
    save(target, report := comparison(dense, text, arguments, settings, rows))
    for variant in chosen:
        sample = samples.get((variant.sequences, variant.seed))
        folder = target / re.sub(r"[^\w.%]+", "-", titles[variant])
        key = {"name": titles[variant], **asdict(variant), "calibration sha256": sample.sha256 if sample else None}
        same = [row for row in rows if all(row.get(part) == value for part, value in key.items())]
        rows = [row for row in rows if variant_of(row) != variant]
        if same and (not keep or finished(folder)):
            rows += same
        else:
            task = prepare(source, calibration=sample, **machine, **selection, **variant.flags)
            rows.append(key | _row(task, folder, dense, text, machine, partial(notify, titles[variant])))
        save(target, report := comparison(dense, text, arguments, settings, rows))
        if not keep and (folder / JOB).exists():
            shutil.rmtree(folder)
    return report


def variant_of(row: Mapping[str, Any]) -> Variant:
    """What a row of a report is of."""
    return Variant(**{field.name: row[field.name] for field in fields(Variant)})


def _as_sampled(variant: Variant, samples: Samples) -> Variant:
    """With as many sequences as the text gave: a short one holds fewer than were asked for."""
    sample = samples.get((variant.sequences, variant.seed))
    return replace(variant, sequences=len(sample.tokens)) if sample else variant


def _row(
    task: Task,
    folder: Path,
    dense: Work,
    text: Windows,
    machine: Mapping[str, Any],
    notify: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One pruning and what it costs."""
    made = prune(task, folder, notify)
    result = evaluate(open_work(folder, **machine), text, dense, notify)
    return {
        **{key: result[key] for key in FIGURES},
        "dense": result["dense"],
        "sparsity": made["summary"]["sparsity"],
        "seconds": made["summary"]["seconds"],
        "eval_seconds": result["seconds"],
        "host_bytes": made["peak_memory"]["host_measured"],
        "device_bytes": made["peak_memory"]["device_measured"],
        "blocks": [{key: block[key] for key in ("index", "relative_error")} for block in result["blocks"]],
    }


def _settings(dense: Work, text: Windows) -> dict[str, Any]:
    """All that rows must have in common to stand in one table."""
    return {
        "source fingerprint": fingerprint(dense.checkpoint),
        "windows sha256": text.sha256,
        "convention": text.convention,
        "device": describe_device(dense.device),
        "dtype": dense.dtype_name,
        "versions": versions(),
    }


def _samples(dense: Work, chosen: Sequence[Variant], texts: Sequence[str], length: int) -> Samples:
    """{(sequences, seed): calibration}; each seed's text is read once, and fewer sequences are the first of more."""
    wanted = {(variant.sequences, variant.seed) for variant in chosen if variant.sequences and variant.seed is not None}
    most: dict[int, int] = {}
    for count, seed in wanted:
        most[seed] = max(most.get(seed, 0), count)
    if not most:
        return {}
    encode = dense.encoder(texts)
    size = {"length": dense.window(length), "vocabulary": dense.hollow.vocabulary}
    whole = {seed: calibrate(texts, encode, sequences=count, seed=seed, **size) for seed, count in most.items()}
    return {(count, seed): replace(whole[seed], tokens=whole[seed].tokens[:count]) for count, seed in wanted}
