"""The variants of pruning that a comparison makes, each of them once, and their titles."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from lowmem_wanda.errors import PatternError
from lowmem_wanda.pruning import ORDERS
from lowmem_wanda.sparsity import GROUPS
from lowmem_wanda.sparsity.methods.known import find_method
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.sparsity.patterns import Unstructured, parse


@dataclass(frozen=True)
class Variant:
    """One way of pruning. A field that does not matter to it is None.

    N:M has groups of its own, and a method without calibration has no order, no sequences and no seed.
    """

    method: str
    pattern: str
    group: str | None
    statistics: str | None
    sequences: int | None
    seed: int | None

    @property
    def keywords(self) -> dict[str, Any]:
        """The variant as keywords of `prepare`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def variants_of(
    methods: Sequence[str],
    patterns: Sequence[str],
    groups: Sequence[str | None] = (None,),
    orders: Sequence[str] = ("block",),
    sequences: Sequence[int] = (128,),
    seeds: Sequence[int] = (0,),
) -> tuple[Variant, ...]:
    """All distinct variants. Raises PatternError for an unknown word, and for a number of sequences below 1."""
    for flag, words, known in (
        ("--groups", groups, (None, "row", "matrix")),
        ("--statistics", orders, ORDERS),
    ):
        for word in words:
            if word not in known:
                raise PatternError(f"{flag} {word}: give one of {', '.join(filter(None, known))}")
    if not sequences or min(sequences) < 1:
        raise PatternError(f"--sequences {min(sequences, default='')}: give whole numbers above 0")
    known_methods = {method: _method(method) for method in methods}
    made = []
    for pattern, method, group, order, count, seed in product(patterns, methods, groups, orders, sequences, seeds):
        parsed, chosen = parse(pattern), known_methods[method]
        if chosen.group == "variant" and not isinstance(parsed, Unstructured):
            raise PatternError(f"--methods {method}: is of a share such as 50%, and {pattern} has groups of its own")
        own = chosen.group if chosen.group not in GROUPS else group or chosen.group
        compared = own if isinstance(parsed, Unstructured) else None
        measured = (order, count, seed) if chosen.statistic or method.endswith("+recover") else (None, None, None)
        made.append(Variant(method, str(parsed), compared, *measured))
    return tuple(dict.fromkeys(made))


def _method(name: str) -> Method:
    """The method of a name such as "alps+recover", without recovery. Raises PatternError."""
    try:
        return find_method(name.removesuffix("+recover"))
    except PatternError as error:
        raise PatternError(str(error).replace("--method ", "--methods ", 1)) from None


def titles_of(chosen: Sequence[Variant]) -> dict[Variant, str]:
    """A title for each: its method, its pattern, and what else sets variants of that method and pattern apart."""
    words = {"group": "per {}", "statistics": "{}", "sequences": "{} sequences", "seed": "seed {}"}

    def name(variant: Variant) -> str:
        alike = [other for other in chosen if (other.method, other.pattern) == (variant.method, variant.pattern)]
        varied = [key for key in words if len({getattr(other, key) for other in alike}) > 1]
        rest = [words[key].format(getattr(variant, key)) for key in varied]
        return " ".join([variant.method, variant.pattern, *rest])

    return {variant: name(variant) for variant in chosen}


def variant_of(row: Mapping[str, Any]) -> Variant:
    """The variant of a row of a report."""
    return Variant(**{field.name: row[field.name] for field in fields(Variant)})
