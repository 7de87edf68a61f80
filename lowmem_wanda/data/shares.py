"""Texts with shares, as in `code.jsonl:4096 chats.jsonl:2048`: sequences are divided among them."""

from collections.abc import Sequence
from pathlib import Path

from lowmem_wanda.errors import CalibrationError

MOST = 1e12  # of a share


def shares_of(texts: Sequence[str]) -> list[tuple[str, float | None]]:
    """(name, share or None) of each text. A file whose own name ends like a share has none.

    Raises CalibrationError for a share that is not above 0.
    """
    return [_share_of(text) for text in texts]


def _share_of(text: str) -> tuple[str, float | None]:
    name, colon, tail = text.rpartition(":")
    if not (colon and name) or Path(text).exists():
        return text, None
    try:
        share = float(tail)
    except ValueError:
        return text, None
    if not 0 < share < MOST:
        raise CalibrationError(f"--text {text}: a share is a number above 0 and below 1e12, as in {name}:2")
    return name, share


def divided(total: int, shares: Sequence[float]) -> list[int]:
    """`total` sequences by shares: whole numbers that add up to it, the largest remainders rounded up.

    Raises CalibrationError where a share would get none.
    """
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    if 0 in counts:
        raise CalibrationError(
            f"--sequences {total}: one of the texts would get none by its share; give more sequences, or leave it out"
        )
    return counts
