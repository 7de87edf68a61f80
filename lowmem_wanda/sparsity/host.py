"""Prunes a matrix on the host, in numpy: some rows at a time are scored, compared, zeroed and counted in the cache.

Scores are compared as unsigned integers, their keys: the bits of floats that are at least 0 sort as the floats do. The
magnitude of a bfloat16 or float16 weight is its own key of 16 bits, and all other scores are float32. The selections
are those of `selection`, bit for bit.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lowmem_wanda.sparsity.patterns import Group, Pattern
from lowmem_wanda.sparsity.selection import CPU_CHUNK, UNSHARED, Scaled, Score, row_chunks

INFINITE = {torch.bfloat16: 0xFF << 7, torch.float16: 0x1F << 10, torch.float32: 0xFF << 23}  # the key of infinity
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an item
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
WIDEST = 16  # weights of a group whose pairs are all compared; larger groups are partitioned
Keys = Callable[[slice], np.ndarray]  # some rows of a matrix -> their keys, uint16 or uint32 (rows, columns)
Lowest = Callable[[np.ndarray], np.ndarray]  # keys -> the mask of those to prune, bool of the same shape


def prune_(weight: torch.Tensor, score: Score, pattern: Pattern, chunk: int) -> tuple[bool, int, bool]:
    """Zeroes the weights of the lowest scores in a `weight` (rows, columns), in place, about `chunk` at a time.

    Returns whether all scores are finite, and what `survey` of `masks` says of the weight afterwards: the number of
    zeros, and whether they hold the pattern. For these the weights are read again, as they stand.
    """
    rows, columns = weight.shape
    bits, group = bits_of(weight), pattern.groups(columns)
    keys, infinite, most = _keys(weight, score)
    parts = row_chunks(rows, columns, min(chunk, most))
    finite, holds, zeros = True, True, 0
    with np.errstate(all="ignore"):  # a product may overflow; it is found as a key
        lowest = _selection(pattern, group, lambda: map(keys, parts), rows * columns)
        for part in parts:
            ones = keys(part)
            finite &= bool(ones.max() < infinite)
            chosen = lowest(ones)
            np.multiply(bits[part], np.logical_not(chosen, out=chosen), out=bits[part])
            more, all_hold = count_zeros(bits[part], group)
            zeros, holds = zeros + more, holds & all_hold
    return finite, zeros, holds and zeros >= pattern.zeros_in_all(rows * columns)


def lowest_mask(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask of the scores that the pattern prunes, bool (rows, columns); they are float32 and at least 0."""
    keys, group = scores.contiguous().numpy().view(np.uint32), pattern.groups(scores.shape[1])
    parts, pruned = row_chunks(len(keys), keys.shape[1], CPU_CHUNK), np.empty(keys.shape, np.bool_)
    lowest = _selection(pattern, group, lambda: (keys[part] for part in parts), keys.size)
    for part in parts:
        pruned[part] = lowest(keys[part])
    return torch.from_numpy(pruned)


def bits_of(weight: torch.Tensor) -> np.ndarray:
    """The weight as signed integers of its item size, a view."""
    return weight.view(SIGNED[weight.element_size()]).numpy()


def count_zeros(bits: np.ndarray, group: Group | None) -> tuple[int, bool]:
    """The zeros of either sign among floats (rows, columns) as integers, and whether each group has enough of them."""
    zero = (np.left_shift(bits, 1) == 0).reshape(-1)
    found = int(np.count_nonzero(zero))
    if group is None or not found:
        return found, group is None or not group.zeros
    if group.size > WIDEST:
        return found, bool(np.count_nonzero(zero.reshape(-1, group.size), axis=1).min() >= group.zeros)
    ones = zero.view(np.uint8)
    if word := WORDS.get(group.size):  # one integer for each group, whose bytes are added up by a product
        counts = ones.view(word)
        counts = (counts * word(sum(1 << 8 * place for place in range(group.size)))) >> word(8 * (group.size - 1))
    else:
        counts = sum(ones[place :: group.size] for place in range(group.size))
    return found, bool(counts.min() >= group.zeros)


def lowest_of_rows(keys: np.ndarray, count: int) -> np.ndarray:
    """The mask of exactly the `count` lowest keys of each row, bool (rows, columns); of equal keys, the first.

    Keys of 16 bits are often equal, so the column follows in their lower bits. Of others, equal ones are counted.
    """
    if keys.itemsize == 2 and keys.shape[1] <= 1 << 16:
        keys = keys.astype(np.uint32) << 16 | np.arange(keys.shape[1], dtype=np.uint32)
    kth = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    lowest: np.ndarray = keys <= kth
    if np.count_nonzero(lowest) > count * len(keys):
        surplus = np.count_nonzero(lowest, axis=1) - count
        row, column = np.nonzero(keys == kth)  # row by row, and within a row from the left
        equal = np.bincount(row, minlength=len(keys))
        place = np.arange(len(row)) - (np.cumsum(equal) - equal)[row]
        late = place >= (equal - surplus)[row]
        lowest[row[late], column[late]] = False
    return lowest


def lowest_of_groups(keys: np.ndarray, of: int, count: int) -> np.ndarray:
    """The mask of exactly the `count` lowest keys of each `of` consecutive columns, bool (rows, columns).

    A weight's rank is the number of weights of its group that come before it. Each weight is compared with the one that
    lies `apart` columns later, all at once, and pairs of two groups are masked out: the operations run over memory that
    lies together. This takes 0.9 ns per weight for 2:4 of 16-bit keys (one thread, AVX-512); on places that are copied
    next to each other it took 2.2.
    """
    later, within = _pairs(keys.shape[1], of)
    flat = keys.reshape(-1).view(np.float32 if keys.itemsize == 4 else np.uint16)  # which are compared faster
    ranks, goes_first = np.empty(keys.shape, np.int8), np.empty(keys.shape, np.bool_)
    ranks[:] = later  # as if all later ones came first
    first, flat_ranks = goes_first.reshape(-1), ranks.reshape(-1)
    for apart in range(1, of):
        np.less_equal(flat[:-apart], flat[apart:], out=first[:-apart])
        np.logical_and(goes_first, within[apart - 1], out=goes_first)
        flat_ranks[apart:] += first[:-apart].view(np.int8)
        flat_ranks[:-apart] -= first[:-apart].view(np.int8)
    return np.less(ranks, count, out=goes_first)


def kth_key(chunks: Callable[[], Iterator[np.ndarray]], k: int) -> int:
    """The key that is at index k when the keys of all chunks are sorted; the chunks are counted, not held.

    Keys of 16 bits are read once; of 32 bits the upper halves are counted first, then the lower ones below the one.
    """
    upper, wide = 0, next(chunks()).itemsize == 4
    for half in (0, 1) if wide else (1,):
        counts = np.zeros(1 << 16, np.int64)
        for keys in chunks():
            digits = keys.reshape(-1)
            if wide:
                digits = digits[digits >> 16 == upper] & 0xFFFF if half else digits >> 16
            counts += np.bincount(digits, minlength=1 << 16)
        below = counts.cumsum()
        digit = int((below <= k).sum())
        k -= int(below[digit - 1]) if digit else 0
        upper = upper << 16 | digit
    return upper


def _keys(weight: torch.Tensor, score: Score) -> tuple[Keys, int, int]:
    """What gives the keys of some rows, the key of infinity, and how many weights it may be asked for at a time."""
    if not isinstance(score, Scaled) or score.weight is not weight or weight.dtype not in INFINITE:
        return (lambda part: _absolute(score(part).numpy().view(np.uint32))), INFINITE[torch.float32], UNSHARED
    bits, norms = bits_of(weight).view(f"u{weight.element_size()}"), score.norms
    if norms is None:
        return (lambda part: _absolute(bits[part])), INFINITE[weight.dtype], weight.numel()
    scale: np.ndarray = norms.abs().numpy()

    def products(part: slice) -> np.ndarray:
        scores = _floats(_absolute(bits[part]), weight.dtype)
        scores *= scale
        return scores.view(np.uint32)

    return products, INFINITE[torch.float32], weight.numel()


def _absolute(bits: np.ndarray) -> np.ndarray:
    """The bits of floats without their signs, contiguous."""
    without: np.ndarray = np.ascontiguousarray(bits) & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    return without


def _floats(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Floats of a dtype, given as bits, as float32."""
    if dtype == torch.bfloat16:
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == torch.float16 else bits.view(np.float32)


def _selection(
    pattern: Pattern, group: Group | None, chunks: Callable[[], Iterator[np.ndarray]], weights: int
) -> Lowest:
    """What selects the keys to prune among some rows' keys."""
    if group is None:
        threshold = kth_key(chunks, pattern.zeros_in_all(weights) - 1)
        return lambda keys: keys <= threshold
    if group.size > WIDEST:
        return lambda keys: lowest_of_rows(keys.reshape(-1, group.size), group.zeros).reshape(keys.shape)
    return lambda keys: lowest_of_groups(keys, group.size, group.zeros)


@lru_cache(maxsize=64)
def _pairs(columns: int, of: int) -> tuple[np.ndarray, Any]:
    """Of each column, how many columns of its group are later; and whether the one `apart` columns later is of them."""
    place = np.arange(columns) % of
    return (of - 1 - place).astype(np.int8), [place < of - apart for apart in range(1, of)]
