"""The text that a model is evaluated on becomes windows of token ids. There are three conventions:

windows     Windows follow each other. All tokens but a window's first are evaluated (the paper's code, `lib/eval.py`).
stride      Windows overlap. Each evaluates the tokens that no window before it has evaluated.
llama.cpp   Windows follow each other. Each begins with the special token that the tokenizer puts before a text, if it
            does. The second half of its tokens is evaluated (the `perplexity` tool).

Tokens at the end of the text that do not fill a window are dropped.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.data.calibration import Encode, download, encoded, require_counts
from lowmem_wanda.data.chats import Render, no_template
from lowmem_wanda.data.documents import Documents, documents_of
from lowmem_wanda.data.token_ids import facts_of_ids, holds_ids, load_ids, require_ids
from lowmem_wanda.errors import CalibrationError

CONVENTIONS = ("windows", "llama.cpp")
C4_DOCUMENTS, C4_WINDOWS = 1100, 256  # what the paper's code takes of C4's validation set
WHOLE = 8 << 20  # bytes of a document that are tokenized at once


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, int64 (windows, length), and which of their tokens are evaluated.

    In each window these are the tokens from index `first` on, int64 (windows,). `sources` are the file names of the
    texts, `files` the facts of each, as those of a calibration.
    """

    tokens: np.ndarray
    first: np.ndarray
    convention: str
    sources: tuple[str, ...]
    files: tuple[dict[str, Any], ...] = ()

    @property
    def sha256(self) -> str:
        """The SHA-256 in hex of the token ids and of `first`."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.first, dtype="<i8").tobytes())
        return digest.hexdigest()

    @property
    def evaluated(self) -> int:
        """The number of tokens that are evaluated."""
        return int((self.tokens.shape[1] - self.first).sum())


def windows(
    texts: Sequence[str],
    encode: Encode,
    *,
    length: int,
    vocabulary: int,
    stride: int | None = None,
    convention: str = "windows",
    most: int | None = None,
    render: Render = no_template,
) -> Windows:
    """The first `most` windows (default: all) of `length` tokens, each id below `vocabulary`.

    `texts` are as in `calibrate`, but read from their beginning; the documents of one text follow each other.
    "wikitext2" is the test set and "c4" the validation set, as the paper's code takes them. Rows of ids stay rows.
    `stride` is the number of tokens from one window to the next if windows overlap. Raises CalibrationError.
    """
    name = " and ".join(texts)
    if convention not in CONVENTIONS:
        raise CalibrationError(f"--convention {convention}: give one of {', '.join(CONVENTIONS)}")
    require_counts({"--length": length, "--windows": most, "--stride": stride})
    if stride is not None and (convention != "windows" or stride >= length):
        raise CalibrationError(f"--stride {stride} must be below --length {length}, and --convention must be windows")
    tokens, files = _stream(texts, encode, render, most)
    step = stride or length
    if tokens.ndim == 2:
        if stride is not None:
            raise CalibrationError(f"{name}: holds rows of token ids, which --stride cannot overlap; give text")
        tokens = np.array(tokens[:most, :length])
    elif len(tokens) < length:
        raise CalibrationError(f"{name}: {len(tokens)} tokens, which do not fill a window of --length {length}")
    else:
        starts = np.arange(0, len(tokens) - length + 1, step)[: most or _paper_windows(texts)]
        tokens = tokens[starts[:, None] + np.arange(length)]
    require_ids(tokens, vocabulary, name, made=not holds_ids(texts))
    first = np.full(len(tokens), 1 if stride is None else tokens.shape[1] - stride)
    first[0] = 1
    if convention == "llama.cpp":
        first[:] = tokens.shape[1] // 2 + 1
        special = [] if holds_ids(texts) else _first_special(encode)
        tokens[:, : len(special)] = special
    if (tokens.shape[1] - first).sum() < 2:
        raise CalibrationError(f"{name}: --length {length} leaves no tokens to evaluate; give a larger one")
    sources = tuple(Path(text).name for text in texts)
    return Windows(tokens, first, "stride" if stride else convention, sources, tuple(files))


def _stream(
    texts: Sequence[str], encode: Encode, render: Render, most: int | None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """All token ids of the texts, int64, in one row or in the first `most` rows of two dimensions; their facts."""
    if holds_ids(texts):
        arrays = [load_ids(Path(text)) for text in texts]
        if len({array.shape[1:] for array in arrays}) > 1:
            raise CalibrationError(f"{' and '.join(texts)}: rows of different lengths; give files of one width")
        files = [facts_of_ids(Path(text), array) for text, array in zip(texts, arrays, strict=True)]
        return np.concatenate([array[:most] if array.ndim == 2 else array for array in arrays]).astype(np.int64), files
    read: list[Documents] = []
    for text in texts:
        if text == "wikitext2":
            rows = download(text, "test")
            read.append(Documents(text, "downloaded", [partial("\n\n".join, [row() for row in rows])]))
        elif text == "c4":
            rows = download(text, "validation")[:C4_DOCUMENTS]
            read.append(Documents(text, "downloaded", [partial(" ".join, [row() for row in rows])]))
        else:
            read.append(documents_of(Path(text), render, strip=None, longest=WHOLE))
    ids = [encoded(one, reader, encode) for one in read for reader in one.readers]
    return np.concatenate(ids or [np.empty(0, np.int64)]), [one.facts() for one in read]


def _paper_windows(texts: Sequence[str]) -> int | None:
    """The number of windows that the paper's code takes of C4; None (all windows) for other texts."""
    return C4_WINDOWS if list(texts) == ["c4"] else None


def _first_special(encode: Encode) -> list[int]:
    """A list of the token that the tokenizer puts before every text; [] if it puts none."""
    alone, before = encode("")[:1], encode("a")[:1]
    return alone if alone == before else []
