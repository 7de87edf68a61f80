"""Calibration data: files, the built-in text or a named data set become token ids, int64 (sequences, length).

Sampling follows the paper's code (`lib/data.py` of locuslab/wanda): it draws a random document, then a random sequence
of it. A document that is shorter than the sequence is joined with those after it. The paper's code draws again instead,
and never ends if every document is short (its issue 82).
"""

import hashlib
import json
import mmap
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tokenize import TokenError

import numpy as np

from lowmem_wanda.checkpoint.reader import read, read_header
from lowmem_wanda.errors import CalibrationError

BUILT_IN = Path(__file__).parent / "texts"
DATASETS = ("c4", "wikitext2")
SEPARATOR = b"<|endoftext|>"
LONGEST = 1 << 20  # bytes of a plain text that are tokenized at once; a longer document is split at a line

Encode = Callable[[str], list[int]]  # a text -> its token ids


@dataclass(frozen=True)
class Calibration:
    """Token ids, int64 (sequences, length), and the file names of the texts that they come from."""

    tokens: np.ndarray
    sources: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The SHA-256 in hex of the token ids."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i8").tobytes()).hexdigest()


def calibrate(
    texts: Sequence[str], encode: Encode, *, sequences: int, length: int, vocabulary: int, seed: int = 0
) -> Calibration:
    """Calibration data of at most `sequences` rows of at most `length` tokens, each id below `vocabulary`.

    `texts` are files (plain text, .jsonl with a "text" field, .npy or .safetensors of token ids), or "c4" or
    "wikitext2", which are downloaded. Without `texts` the built-in text is used, which may hold fewer rows.
    Two-dimensional ids are used row by row as they are. `encode` is called for texts only. Raises CalibrationError.
    """
    require_counts({"--sequences": sequences, "--length": length})
    if holds_ids(texts):
        tokens = _from_ids([Path(name) for name in texts], sequences, length, seed)
    elif texts:
        readers = [reader for text in texts for reader in _training(text)]
        encoded = [partial(lambda read: np.array(encode(read()), dtype=np.int64), reader) for reader in readers]
        tokens = _sampled(encoded, sequences, length, seed, " and ".join(texts))
    else:
        tokens = _built_in(encode, sequences, length, seed)
    require_ids(tokens, vocabulary, " and ".join(texts) or "the built-in text")
    return Calibration(tokens, tuple(Path(text).name for text in texts) or ("built-in text",))


def require_counts(counts: Mapping[str, int | None]) -> None:
    """Raises CalibrationError for a {flag: number} below 1; None stands for a flag that is not given."""
    for flag, number in counts.items():
        if number is not None and number < 1:
            raise CalibrationError(f"{flag} {number}: give a whole number above 0")


def require_ids(tokens: np.ndarray, vocabulary: int, name: str) -> None:
    """Raises CalibrationError for a token id that is not in the model's vocabulary."""
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise CalibrationError(f"{name}: token id {wrong} is outside the model's vocabulary of {vocabulary}")


def name_list(names: str | Path | Sequence[str | Path]) -> list[str]:
    """One name or several ones as a list."""
    return [str(names)] if isinstance(names, (str, Path)) else [str(name) for name in names]


def holds_ids(texts: Sequence[str]) -> bool:
    """Whether `texts` are files of token ids, which need no tokenizer. Raises CalibrationError for a mixture."""
    ids = [text for text in texts if text.endswith((".npy", ".safetensors"))]
    if ids and len(ids) < len(texts):
        raise CalibrationError(
            f"{ids[0]} holds token ids and {next(t for t in texts if t not in ids)} text: give one kind"
        )
    return bool(ids)


def in_batches(tokens: np.ndarray, batch: int) -> list[np.ndarray]:
    """A list of batches of token ids (sequences, length), each of `batch` rows; the last may have fewer."""
    return [tokens[start : start + batch] for start in range(0, len(tokens), batch)]


def _built_in(encode: Encode, sequences: int, length: int, seed: int) -> np.ndarray:
    """Token ids of the built-in text (sequences, length).

    The documents are shuffled, joined and cut into sequences one after the other, so that no token is used twice.
    """
    readers = [reader for path in sorted(BUILT_IN.glob("*.txt")) for reader in documents(path)]
    random.Random(seed).shuffle(readers)
    stream = np.array([token for reader in readers for token in encode(reader())], dtype=np.int64)
    held = len(stream) // length
    if held == 0:
        raise CalibrationError(
            f"the built-in text holds {len(stream)} tokens, fewer than --length {length}: give --text or a "
            "smaller --length"
        )
    return stream[: held * length].reshape(held, length)[:sequences]


def _sampled(
    documents: Sequence[Callable[[], np.ndarray]], sequences: int, length: int, seed: int, name: str
) -> np.ndarray:
    """Random sequences of random documents (sequences, length). `documents` are functions that read token ids."""

    @lru_cache(maxsize=32)  # a long document may be drawn many times
    def ids(index: int) -> np.ndarray:
        return documents[index]()

    rng = random.Random(seed)
    rows = []
    for _ in range(sequences):
        start = rng.randrange(len(documents)) if documents else 0
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
    return np.array(rows, dtype=np.int64)


def _training(text: str) -> list[Callable[[], str]]:
    """Functions that each read a document of a file or data set. WikiText-2 is one document, as in the paper's code."""
    if text not in DATASETS:
        return documents(Path(text))
    rows = download(text, "train")
    return [lambda: " ".join(row() for row in rows)] if text == "wikitext2" else rows


def documents(path: Path, strip: bool = True, longest: int | None = None) -> list[Callable[[], str]]:
    """Functions that each read a document of a text file, which itself is not held in memory. Raises CalibrationError.

    Documents of a plain text lose the space around them with `strip`, and are split if they have more than `longest`
    bytes (default: LONGEST).
    """
    jsonl = path.suffix == ".jsonl"
    try:
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise CalibrationError(f"{path}: is empty; give a text file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                spans = [
                    span for span in _spans(mapped, b"\n" if jsonl else SEPARATOR) if mapped[span[0] : span[1]].strip()
                ]
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); give a text file to --text") from None
    if not jsonl:
        spans = [piece for start, stop in spans for piece in _split(path, start, stop, longest or LONGEST)]
    return [partial(_read, path, start, stop, jsonl, strip) for start, stop in spans]


def _spans(mapped: mmap.mmap, separator: bytes) -> Iterator[tuple[int, int]]:
    """Yields the first byte of each part between separators, and the byte after its last."""
    start = 0
    while (stop := mapped.find(separator, start)) >= 0:
        yield start, stop
        start = stop + len(separator)
    yield start, len(mapped)


def _split(path: Path, start: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yields the start and stop of pieces of at most `longest` bytes, which end with a line unless a line is longer."""
    with open(path, "rb") as file:
        while stop - start > longest:
            file.seek(start)
            piece = file.read(longest)
            cut = piece.rfind(b"\n") + 1 or longest
            yield start, start + cut
            start += cut
    yield start, stop


def _read(path: Path, start: int, stop: int, jsonl: bool, strip: bool) -> str:
    """The text of one document. Raises CalibrationError for a line of a .jsonl that does not hold a text."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(stop - start)
    if not jsonl:
        # a piece may be cut within a character, so bytes that are not UTF-8 become U+FFFD
        text = content.decode("utf-8", errors="replace")
        return text.strip() if strip else text
    try:
        line = json.loads(content)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        line = None
    if not isinstance(line, str):
        raise CalibrationError(
            f'{path}: the line at byte {start} is not a JSON object with a "text"; give one per line'
        )
    return line.encode("utf-8", errors="replace").decode("utf-8")  # tokenizers refuse lone surrogates


def _from_ids(paths: list[Path], sequences: int, length: int, seed: int) -> np.ndarray:
    """Token ids (sequences, length): the rows of two-dimensional ids, or random sequences of one-dimensional ids."""
    arrays = [load_ids(path) for path in paths]
    widths = {array.shape[1] for array in arrays if array.ndim == 2}
    if widths and (len(widths) > 1 or any(array.ndim == 1 for array in arrays)):
        raise CalibrationError(f"{' and '.join(map(str, paths))}: rows of different lengths; give files of one width")
    if widths:
        return np.concatenate(arrays)[:sequences, :length].astype(np.int64)
    return _sampled(
        [partial(np.asarray, array) for array in arrays], sequences, length, seed, " and ".join(map(str, paths))
    )


def load_ids(path: Path) -> np.ndarray:
    """Token ids in one or two dimensions, from a .npy (never pickled) or from a .safetensors with one tensor.

    Raises CalibrationError.
    """
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tensors = read_header(path)
            if len(tensors) != 1:
                raise CalibrationError(f"{path}: holds {len(tensors)} tensors; give one of token ids")
            (tensor,) = tensors.values()
            kind = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U16": "<u2", "U32": "<u4"}.get(tensor.dtype, "V1")
            buffer = np.empty(tensor.nbytes, np.uint8)
            read([(tensor, buffer)])
            array = buffer.view(kind).reshape(tensor.shape if kind != "V1" else -1)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); give a file of token ids") from None
    except (ValueError, EOFError, SyntaxError, MemoryError, OverflowError, TokenError) as error:
        raise CalibrationError(f"{path}: is not an array of token ids ({error})") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise CalibrationError(
            f"{path}: holds {array.dtype} of shape {array.shape}; token ids are integers in one or two dimensions"
        )
    return np.asarray(array)


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
