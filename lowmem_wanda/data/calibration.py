"""Calibration data: files, the built-in text or a named data set become token ids, int64 (sequences, length).

Sampling follows the paper's code (`lib/data.py` of locuslab/wanda): it draws a random document, then a random sequence
of it. A document that is shorter than the sequence is joined with those after it. The paper's code draws again instead,
and never ends if every document is short (its issue 82).
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_wanda.data.chats import Messages, Render, no_template
from lowmem_wanda.data.documents import Documents, documents_of
from lowmem_wanda.data.shares import divided, shares_of
from lowmem_wanda.data.token_ids import facts_of_ids, holds_ids, load_ids, padded_rows, require_ids
from lowmem_wanda.errors import CalibrationError

BUILT_IN = Path(__file__).parent / "texts"
DATASETS = ("c4", "wikitext2")

Encode = Callable[[str], list[int]]  # a text -> its token ids


@dataclass(frozen=True)
class Calibration:
    """Token ids, int64 (sequences, length), and the file names of the texts that they come from.

    `files` are the facts of each text: its name, how it was read, its documents, how many of these, as how many tokens,
    were read, and its share of the sequences. `warnings` are sentences.
    """

    tokens: np.ndarray
    sources: tuple[str, ...]
    files: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of it before the work."""
        sequences, length = self.tokens.shape
        found = {"text": list(self.sources), "files": list(self.files), "warnings": list(self.warnings)}
        return found | {"sequences": sequences, "length": length}

    @property
    def sha256(self) -> str:
        """The SHA-256 in hex of the token ids."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i8").tobytes()).hexdigest()


def calibrate(
    texts: Sequence[str],
    encode: Encode,
    *,
    sequences: int,
    length: int,
    vocabulary: int,
    seed: int = 0,
    render: Render = no_template,
) -> Calibration:
    """Calibration data of at most `sequences` rows of at most `length` tokens, each id below `vocabulary`.

    `texts` are files of text (see `formats`), of chats that `render` makes texts of, or of token ids; or "c4" or
    "wikitext2", which are downloaded. With shares (`code.jsonl:3`) the rows are divided among them. Without `texts` the
    built-in text is used, which may hold fewer rows. Two-dimensional ids are used row by row as they are. `encode` is
    called for texts only. Raises CalibrationError.
    """
    require_counts({"--sequences": sequences, "--length": length})
    named = shares_of(texts)
    if any(share for _, share in named):
        given = {"encode": encode, "length": length, "vocabulary": vocabulary, "seed": seed, "render": render}
        return _by_shares([(name, share or 1.0) for name, share in named], sequences, given)
    name, ids = " and ".join(texts) or "the built-in text", holds_ids(texts)
    read, shares = list[Documents](), np.empty(0)
    files: list[dict[str, Any]] = []
    if ids:
        tokens, files = _from_ids([Path(text) for text in texts], sequences, length, seed)
    elif texts:
        read = [_training(text, render) for text in texts]
        documents = [partial(encoded, one, reader, encode) for one in read for reader in one.readers]
        tokens, drawn = _sampled(documents, sequences, length, seed, name)
        owners = [index for index, one in enumerate(read) for _ in one.readers]
        shares = np.bincount([owners[document] for document in drawn], minlength=len(read)) / len(drawn)
    else:
        tokens, read = _built_in(encode, render, sequences, length, seed)
        shares = np.array([one.tokens for one in read]) / max(1, sum(one.tokens for one in read))
    require_ids(tokens, vocabulary, name, made=not ids)
    count, repeated = padded_rows(tokens) if ids else (0, 0)
    warnings = [
        f"{count} of {len(tokens)} rows of token ids end in one repeated id ({repeated}), as padding does; it is "
        "measured like any text: give rows without it"
    ]
    files += [{**one.facts(), "share": float(share)} for one, share in zip(read, shares, strict=True)]
    sources = tuple(Path(text).name for text in texts) or ("built-in text",)
    return Calibration(tokens, sources, tuple(files), tuple(warnings if count else ()))


def _by_shares(texts: Sequence[tuple[str, float]], sequences: int, given: dict[str, Any]) -> Calibration:
    """The calibration of (text, share) pairs: each is sampled alone, and then the rows of all are shuffled."""
    counts = divided(sequences, [share for _, share in texts])
    parts = [calibrate([name], sequences=count, **given) for (name, _), count in zip(texts, counts, strict=True)]
    for (name, _), count, part in zip(texts, counts, parts, strict=True):
        if part.tokens.shape != (count, parts[0].tokens.shape[1]):
            rows, width = part.tokens.shape
            raise CalibrationError(
                f"{name}: {rows} rows of {width} tokens, where its share is {count} of {parts[0].tokens.shape[1]}: "
                "give files that hold as much, or other shares"
            )
    tokens = np.concatenate([part.tokens for part in parts])
    np.random.default_rng(given["seed"]).shuffle(tokens)
    files = [
        {**facts, "share": count / sequences} for count, part in zip(counts, parts, strict=True) for facts in part.files
    ]
    warnings = tuple(warning for part in parts for warning in part.warnings)
    return Calibration(tokens, tuple(name for part in parts for name in part.sources), tuple(files), warnings)


def encoded(read: Documents, reader: Callable[[], str], encode: Encode) -> np.ndarray:
    """The token ids of a document, which are counted."""
    ids = np.array(encode(reader()), dtype=np.int64)
    read.tokens, read.read = read.tokens + len(ids), read.read + 1
    return ids


def require_counts(counts: Mapping[str, int | None]) -> None:
    """Raises CalibrationError for a {flag: number} below 1; None stands for a flag that is not given."""
    for flag, number in counts.items():
        if number is not None and number < 1:
            raise CalibrationError(f"{flag} {number}: give a whole number above 0")


def name_list(names: str | Path | Sequence[str | Path]) -> list[str]:
    """One name or several ones as a list."""
    return [str(names)] if isinstance(names, (str, Path)) else [str(name) for name in names]


def in_batches(tokens: np.ndarray, batch: int) -> list[np.ndarray]:
    """A list of batches of token ids (sequences, length), each of `batch` rows; the last may have fewer."""
    return [tokens[start : start + batch] for start in range(0, len(tokens), batch)]


def _built_in(
    encode: Encode, render: Render, sequences: int, length: int, seed: int
) -> tuple[np.ndarray, list[Documents]]:
    """Token ids of the built-in text (sequences, length), and its documents.

    Its conversations are rendered by the model's chat template. The documents are shuffled, joined and cut into
    sequences one after the other, so that no token is used twice.
    """
    texts = [path for path in sorted(BUILT_IN.iterdir()) if path.suffix in (".txt", ".jsonl")]
    renders = [_Lenient(render) for _ in texts]
    read = [documents_of(path, one) for path, one in zip(texts, renders, strict=True)]
    readers = [partial(encoded, one, reader, encode) for one in read for reader in one.readers]
    random.Random(seed).shuffle(readers)
    stream = np.concatenate([reader() for reader in readers])
    for one, how in zip(read, renders, strict=True):
        if how.refused:
            one.forms.add(f"{how.refused} of them as plain lines, because the model's template does not take them")
    held = len(stream) // length
    if held == 0:
        raise CalibrationError(
            f"the built-in text holds {len(stream)} tokens, fewer than --length {length}: give --text or a "
            "smaller --length"
        )
    return stream[: held * length].reshape(held, length)[:sequences], read


class _Lenient:
    """A render of the built-in conversations, which not every template takes: some know no tools, or no system."""

    def __init__(self, render: Render) -> None:
        self.render, self.refused = render, 0

    def __call__(self, messages: Messages, tools: Any) -> str:
        try:
            return self.render(messages, tools)
        except CalibrationError:
            self.refused += 1
            return ""


def _sampled(
    documents: Sequence[Callable[[], np.ndarray]], sequences: int, length: int, seed: int, name: str
) -> tuple[np.ndarray, list[int]]:
    """Random sequences of random documents (sequences, length), and the documents that they begin in.

    `documents` are functions that read token ids.
    """

    @lru_cache(maxsize=32)  # a long document may be drawn many times
    def ids(index: int) -> np.ndarray:
        return documents[index]()

    rng = random.Random(seed)
    rows, starts = [], []
    for _ in range(sequences):
        start = rng.randrange(len(documents)) if documents else 0
        starts.append(start)
        tokens = np.empty(0, np.int64)
        for offset in range(len(documents)):
            document = ids((start + offset) % len(documents))
            tokens = np.concatenate([tokens, document]) if len(tokens) else document
            if len(tokens) >= length:
                break
        else:
            raise CalibrationError(
                f"{name}: {len(tokens)} tokens in all, fewer than --length {length}: give more text or a "
                "smaller --length"
            )
        first = rng.randint(0, len(tokens) - length)
        rows.append(np.array(tokens[first : first + length], dtype=np.int64))  # a view would keep the whole document
    return np.array(rows, dtype=np.int64), starts


def _training(text: str, render: Render) -> Documents:
    """The documents of a file or data set. WikiText-2 is one document, as in the paper's code."""
    if text not in DATASETS:
        return documents_of(Path(text), render)
    rows = download(text, "train")
    joined = [lambda: " ".join(row() for row in rows)]
    return Documents(text, "downloaded", joined if text == "wikitext2" else rows)


def _from_ids(paths: list[Path], sequences: int, length: int, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Token ids (sequences, length) and the facts of their files.

    They are the first rows of two-dimensional ids, or random sequences of one-dimensional ids.
    """
    arrays, name = [load_ids(path) for path in paths], " and ".join(map(str, paths))
    widths = {array.shape[1] for array in arrays if array.ndim == 2}
    if widths and (len(widths) > 1 or any(array.ndim == 1 for array in arrays)):
        raise CalibrationError(f"{name}: rows of different lengths; give files of one width")
    facts: list[dict[str, Any]] = []
    for path, array in zip(paths, arrays, strict=True):
        facts.append(facts_of_ids(path, array))
    if not widths:
        rows, drawn = _sampled([partial(np.asarray, array) for array in arrays], sequences, length, seed, name)
        return rows, [{**one, "share": drawn.count(index) / len(drawn)} for index, one in enumerate(facts)]
    wanted: list[np.ndarray] = []
    for array in arrays:
        wanted.append(np.array(array[: sequences - sum(map(len, wanted)), :length], np.int64))
    total = sum(map(len, wanted))
    return np.concatenate(wanted), [
        {**one, "share": len(rows) / total} for one, rows in zip(facts, wanted, strict=True)
    ]


def download(name: str, split: str) -> list[Callable[[], str]]:
    """Functions that each read a row of C4 or WikiText-2, the same rows as in the paper's code.

    They are downloaded with the package `datasets`. Raises CalibrationError.
    """
    try:
        import datasets  # of the extra "datasets"; nothing else here needs the network
    except ImportError:
        raise CalibrationError(
            f"--text {name} downloads through a package that is not installed: pip install datasets"
        ) from None
    pieces = {"train": 1024, "validation": 8}
    try:
        if name == "c4":
            files = {split: f"en/c4-{split}.00000-of-{pieces[split]:05d}.json.gz"}
            rows = datasets.load_dataset("allenai/c4", data_files=files, split=split)
        else:
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"--text {name} could not be downloaded ({error}); give a file of text instead"
        ) from None
    return [partial(lambda index: str(rows[index]["text"]), index) for index in range(len(rows))]
