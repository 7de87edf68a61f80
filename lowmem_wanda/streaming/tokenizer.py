"""The checkpoint's own tokenizer, and what to do where it cannot be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.reader import opened
from lowmem_wanda.errors import CalibrationError, first_line


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False, **settings: Any) -> Any:
    """The checkpoint's own tokenizer as transformers makes it. Raises CalibrationError where it cannot be loaded."""
    try:
        with _named_in_utf8(checkpoint.path) as path:
            tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code, **settings
            )
        if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):  # made of no file
            raise ValueError("no file of it holds a vocabulary")
        return tokenizer
    except Exception as error:  # tokenizers raises plain Exception, and odd files anything
        cause = _cause_in_pieces(checkpoint.path) or f"({first_line(error)}); add a tokenizer.json that is whole"
        raise CalibrationError(
            f"{checkpoint.path}: its tokenizer cannot be loaded {cause}, or give token ids (.npy) to --text"
        ) from None


@contextmanager
def _named_in_utf8(path: Path) -> Iterator[Path]:
    """The folder, or a link to it where its path is not UTF-8, which `tokenizers` cannot open."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as folder:
            link = Path(folder) / "checkpoint"
            link.symlink_to(path.absolute(), target_is_directory=True)
            yield link
        return
    yield path


def _cause_in_pieces(folder: Path) -> str:
    """What hinders where the vocabulary is only in `tokenizer.model*` or `*.spm`, and what to do; "" if nothing.

    transformers tries such a file as a SentencePiece model and then as tiktoken's, and names the last alone.
    """
    pieces = sorted(file for kind in ("tokenizer.model*", "*.spm") for file in folder.glob(kind))
    if not pieces or (folder / "tokenizer.json").exists():
        return ""
    name = pieces[0].name
    with opened(pieces[0]) as file:
        beginning = file.read(1 << 10)
    if beginning[:1] == b"\n":  # the protocol buffer's tag of the first piece
        package = "" if find_spec("sentencepiece") else "sentencepiece protobuf"
    elif len(first := beginning.partition(b"\n")[0].split()) == 2 and first[1].isdigit():  # base64 of a token, its rank
        package = "" if find_spec("tiktoken") else "tiktoken"
    else:
        return f"({name} holds neither a SentencePiece model nor tiktoken's ranks); download it again"
    return f"(it is in {name}, which needs another package); pip install {package}" if package else ""
