"""Which experts of a layer are kept: their scores from what is known of them, and the choice of the highest.

Scores are of one layer, float64 (experts,), and the highest are kept. A layer's experts may lie in groups that the
router chooses among (DeepSeek-V3); then each group keeps as many.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from lowmem_wanda.errors import PatternError


def kept_count(count: int, drop: str | float | None = None, keep: int | None = None) -> int:
    """How many of `count` experts are kept, of "25%", 0.25 or 32 to `drop`, or of a number to `keep`.

    A share is rounded down to whole dropped experts, as REAP does. Raises PatternError.
    """
    if (drop is None) == (keep is None):
        raise PatternError("say how many experts are dropped or how many are kept, one of both: 25%, 32")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int)):
        raise PatternError(f"{keep!r} experts cannot be kept; give a whole number, such as 32")
    kept = count - _dropped(drop, count) if drop is not None else keep or 0
    if kept >= count:
        raise PatternError(f"of {count} experts in each layer, {kept} would be kept, so none is removed: drop more")
    if kept < 1:
        raise PatternError(f"of {count} experts in each layer, none would be kept: drop fewer")
    return kept


def require_kept(count: int, keep: int, used: int, groups: int = 1, groups_used: int = 1) -> None:
    """Raises PatternError if a model that keeps `keep` of `count` experts would not work, or would be the same.

    The router chooses `used` of them for a token, from `groups_used` of `groups` groups.
    """
    each = keep / groups
    if not 0 < keep < count:
        raise PatternError(f"{keep} of {count} experts would be kept; give a number from 1 to {count - 1}")
    if keep < used:
        raise PatternError(
            f"{keep} experts would be kept, but the router chooses {used} for every token: keep at least that"
        )
    if groups > 1 and (keep % groups or each < 2 or groups_used * each < used):
        least = max(2, -(-used // max(1, groups_used)))
        fitting = [groups * size for size in range(least, count // groups)]
        near = sorted(fitting, key=lambda number: abs(number - keep))[:2]
        numbers = " or ".join(map(str, sorted(near)))
        raise PatternError(
            f"{keep} experts would be kept, but they lie in {groups} groups, which must stay equal and have at "
            f"least {least} each: " + (f"--keep-experts {numbers}" if near else "no smaller number does this")
        )


def _dropped(drop: str | float, count: int) -> int:
    """The number of experts of a share or a number."""
    text = str(drop).strip()
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text)
    if not match:
        raise PatternError(f"{text!r} is neither a share of the experts, such as 25% or 0.25, nor a number, such as 32")
    number = Fraction(match[1]) / (100 if match[2] else 1)
    if match[2] or "." in match[1]:
        if not 0 < number < 1:
            raise PatternError(f"{text!r}: a share of the experts lies between 0 and 1, such as 25% or 0.25")
        return int(number * count)
    return int(number)


def highest(scores: np.ndarray, keep: int, groups: int = 1) -> tuple[int, ...]:
    """The ids of the `keep` highest scores, ascending, as many in each of `groups`; of equal scores the lower id."""
    grouped = np.argsort(-scores.reshape(groups, -1), axis=1, kind="stable")[:, : keep // groups]
    ids = grouped + np.arange(groups)[:, None] * (len(scores) // groups)
    return tuple(int(one) for one in np.sort(ids, axis=None))


def output_norms(counts: np.ndarray, squares: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The sum over its tokens of each expert's output norm, estimated without a forward pass, float64 (experts,).

    `counts` (experts,) are the tokens that an expert saw, `squares` (experts, width) the mean squares of what enters
    its down projection, and `columns` (experts, width) the squared norms of this projection's columns. If the entries
    of that input were uncorrelated, the mean square of the output's norm would be their product, summed. It estimates
    the sum of activation norms (EAN, a baseline of arXiv 2510.13999).
    """
    return np.asarray(counts * np.sqrt((squares * columns).sum(axis=1)))


def measured(sums: Mapping[str, Sequence[float]], score: str) -> np.ndarray:
    """The scores of a layer's experts, float64 (experts,), from sums of what they put out (see `expert_sums`).

    reap          mean of g |f| over its tokens (arXiv 2510.13999, equation 9)
    weighted      sum of g |f|
    squares       sum of (g |f|)^2, what the layer's output loses where those of experts are not correlated
    ean           sum of |f|
    man, msan     mean of |f|, of |f|^2 (arXiv 2606.15716)
    frequency     number of tokens

    An expert without tokens has 0.
    """
    name, divided = {
        "reap": ("gated", True), "weighted": ("gated", False), "squares": ("gated_squares", False),
        "ean": ("norms", False), "man": ("norms", True), "msan": ("squares", True), "frequency": ("tokens", False),
    }[score]  # fmt: skip
    found, tokens = (np.asarray(sums[one], np.float64) for one in (name, "tokens"))
    return found / np.maximum(tokens, 1) if divided else found


def super_experts(largest: Mapping[int, np.ndarray], depth: int) -> dict[int, tuple[int, ...]]:
    """{layer: ids} of experts that put out outlying values ("super experts", arXiv 2507.23279).

    `largest` holds the largest |value| that each expert put out, (experts,) for each measured layer of a model of
    `depth` blocks. As in REAP's code an expert is one if that is above the 99.5th percentile of all experts and above
    a tenth of the largest, and its layer is in the first three quarters.
    """
    values = np.concatenate(list(largest.values()))
    threshold = max(np.quantile(values, 0.995), values.max() / 10)
    first = (layer for layer in largest if layer < 0.75 * depth)
    found = {layer: tuple(int(one) for one in np.flatnonzero(largest[layer] > threshold)) for layer in first}
    return {layer: ids for layer, ids in found.items() if ids}


def aimer(absolute: np.ndarray, squares: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Minus mean |w| over root mean square of each expert's weights, which needs no data (arXiv 2603.18492).

    `absolute` and `squares` are the sums of |w| and of w^2 over an expert's `weights`, all (experts,). Experts whose
    weights are all alike in size are dropped first, and before them experts that are all zeros.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (absolute / weights) / np.sqrt(squares / weights)
    return np.where(squares > 0, -ratio, -np.inf)
