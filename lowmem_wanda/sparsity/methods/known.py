"""The methods, refinements and updates by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowmem_wanda.errors import PatternError
from lowmem_wanda.sparsity import METHODS as NAMES
from lowmem_wanda.sparsity.gram import Gram
from lowmem_wanda.sparsity.methods.alps import alps
from lowmem_wanda.sparsity.methods.least_squares import least_squares
from lowmem_wanda.sparsity.methods.method import Method
from lowmem_wanda.sparsity.methods.scores import magnitude, ria, wanda
from lowmem_wanda.sparsity.methods.sparsegpt import sparsegpt
from lowmem_wanda.sparsity.methods.swaps import swaps
from lowmem_wanda.sparsity.methods.variant import variant
from lowmem_wanda.sparsity.statistics import SquaredNorm

METHODS = {
    "wanda": Method(wanda, SquaredNorm, group="row", name="wanda", by_rows=True),
    "wanda-variant": Method(wanda, SquaredNorm, group="variant", name="wanda-variant", by_rows=True, solve=variant),
    "magnitude": Method(magnitude, None, group="matrix", name="magnitude", by_rows=True),
    "ria": Method(ria, SquaredNorm, group="row", name="ria", by_rows=True),
    "sparsegpt": Method(wanda, Gram, group="columns", name="sparsegpt", by_rows=True, solve=sparsegpt),
    "alps": Method(wanda, Gram, group="row", name="alps", by_rows=True, solve=alps),
}
REFINEMENTS: dict[str, Callable[..., Any]] = {"swaps": swaps}
UPDATES: dict[str, Callable[..., Any]] = {"lsq": least_squares}


def find_method(method: str | Method, refine: str = "none", update: str = "none") -> Method:
    """The method with a name, or the method itself, with a refinement and an update of the mask that it makes.

    "wanda+swaps+lsq" is a name for all three. Raises PatternError for a name that is not known, and for what does not
    go together.
    """
    base, *more = method.split("+") if isinstance(method, str) else (method,)
    if isinstance(base, str) and base not in METHODS:
        raise PatternError(f"--method {method}: there is no such method; give one of {', '.join(NAMES)}")
    found = METHODS[base] if isinstance(base, str) else base
    for word in (*more, refine, update):
        if word != "none":
            found = _with(found, str(word))
    return found


def _with(method: Method, word: str) -> Method:
    """A method with one more part, which needs the Gram matrix of the inputs."""
    known = {**dict.fromkeys(REFINEMENTS, "refine"), **dict.fromkeys(UPDATES, "update")}
    if word not in known:
        last = " (+recover comes last)" if word == "recover" else ""
        raise PatternError(f"{method}+{word}: {word} is none of {' and '.join(known)}{last}; leave it out")
    part = known[word]
    if part == "refine" and not method.keeps_bits:
        raise PatternError(f"--refine {word}: {method} updates the weights, so there is no mask alone to refine")
    if getattr(method, part) is not None:
        raise PatternError(f"--{part} {word}: {method} has its own {part}; leave it out")
    if method.statistic not in (None, SquaredNorm, Gram):
        raise PatternError(f"--{part} {word}: {method} has a statistic of its own, where {word} needs X^T X")
    function = {**REFINEMENTS, **UPDATES}[word]
    return replace(method, statistic=Gram, name=f"{method}+{word}", **{part: function})  # type: ignore[arg-type]
