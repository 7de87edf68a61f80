"""Token ids in files: .npy (never pickled), or .safetensors with one tensor; they stay there until they are used."""

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from lowmem_wanda.checkpoint.reader import opened, read_header
from lowmem_wanda.data.formats import NUMPY, is_ids
from lowmem_wanda.errors import CalibrationError, CheckpointError

KINDS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U16": "<u2", "U32": "<u4"}
PADDED = 4  # equal ids at the end of a row from which on they are taken for padding


def holds_ids(texts: Sequence[str]) -> bool:
    """Whether `texts` are files of token ids, which need no tokenizer. Raises CalibrationError for a mixture."""
    ids = [text for text in texts if is_ids(Path(text))]
    if ids and len(ids) < len(texts):
        raise CalibrationError(
            f"{ids[0]} holds token ids and {next(t for t in texts if t not in ids)} text: give one kind"
        )
    return bool(ids)


def require_ids(tokens: np.ndarray, vocabulary: int, name: str, made: bool) -> None:
    """Raises CalibrationError for a token id that is not in the model's vocabulary.

    `made` says that the model's own tokenizer made them of a text.
    """
    if tokens.min() >= 0 and tokens.max() < vocabulary:
        return
    wrong = tokens.min() if tokens.min() < 0 else tokens.max()
    move = "make the ids by this model's tokenizer"
    if made:
        move = "its tokenizer is not this model's; put the right one into its folder"
    elif wrong == -100:
        move = "that is a label which no loss is taken of; give input ids, not labels"
    raise CalibrationError(f"{name}: token id {wrong} is outside the model's vocabulary of {vocabulary}: {move}")


def padded_rows(tokens: np.ndarray) -> tuple[int, int]:
    """(number of rows that end in one repeated id, that id in most of them) of token ids (rows, length)."""
    if tokens.ndim != 2 or tokens.shape[1] <= PADDED:
        return 0, 0
    padded = (tokens[:, -PADDED:] == tokens[:, -1:]).all(axis=1)
    ids, counts = np.unique(tokens[padded, -1], return_counts=True)
    return int(padded.sum()), int(ids[counts.argmax()]) if len(ids) else 0


def facts_of_ids(path: Path, array: np.ndarray) -> dict[str, Any]:
    """What a report says of a file of token ids."""
    rows, how = (len(array), "rows of token ids") if array.ndim == 2 else (1, "token ids")
    return {"name": path.name, "how": how, "documents": rows, "read": rows, "tokens": int(array.size)}


def load_ids(path: Path) -> np.ndarray:
    """Token ids in one or two dimensions, mapped from the file. Raises CalibrationError."""
    try:
        with opened(path, "give a file of token ids") as file:
            numpy = file.read(len(NUMPY)) == NUMPY
        array = np.load(path, mmap_mode="r", allow_pickle=False) if numpy or path.suffix == ".npy" else _mapped(path)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays (.npz)")
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, OverflowError, TokenError, TypeError,
            AttributeError, RecursionError) as error:  # fmt: skip
        said = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{path}: is not an array of token ids ({said}); give a .npy or .safetensors") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise CalibrationError(
            f"{path}: holds {array.dtype} of shape {array.shape}; token ids are integers in one or two dimensions"
        )
    return array


def _mapped(path: Path) -> np.ndarray:
    tensors = read_header(path)
    if len(tensors) != 1:
        raise CalibrationError(f"{path}: holds {len(tensors)} tensors; give one of token ids")
    (tensor,) = tensors.values()
    if tensor.dtype not in KINDS or not tensor.nbytes:
        return np.empty(tensor.shape, np.float32)  # which is no array of ids
    return np.memmap(path, KINDS[tensor.dtype], "r", tensor.offset, tensor.shape)
