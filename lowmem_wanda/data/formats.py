"""What a file is, told by its first bytes, and its content as UTF-8: plain text, or JSON lines.

Other encodings, compressed files, JSON lists and Parquet are copied to a temporary file in one of these two forms, a
piece at a time, so that no file is in memory whole.
"""

import codecs
import gzip
import json
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lowmem_wanda.checkpoint.reader import MAX_HEADER, opened
from lowmem_wanda.errors import CalibrationError, CheckpointError, first_line

PIECE = 1 << 20  # bytes that are read at a time
MOST = 64 << 30  # bytes of a file after it is decompressed
MOST_ROW = (
    64 << 20
)  # bytes of a line of JSON lines, or of an element of a JSON list; in memory it takes 9 times as much
MARKS = (  # a byte order mark, the encoding, and its name
    (codecs.BOM_UTF8, "utf-8", "UTF-8 text"), (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32 text"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32 text"), (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16 text"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16 text"),
)  # fmt: skip
GZIP, ZSTD, PARQUET, NUMPY = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"\x93NUMPY"
PICKLE = ("a pickle, which is never opened", "save its text or token ids (.npy)")
TABLE = ("an Arrow file", "save it as .parquet or .jsonl (datasets: to_parquet, to_json)")
OTHERS = {  # what a file begins with, what it is, and what to do
    b"GGUF\1\0\0": ("a GGUF file", "give a text"), b"GGUF\2\0\0": ("a GGUF file", "give a text"),
    b"GGUF\3\0\0": ("a GGUF file", "give a text"),
    b"PK\3\4": ("a zip archive, as torch.save and .npz are", "give what is in it"),
    b"\x80\2": PICKLE, b"\x80\3": PICKLE, b"\x80\4": PICKLE, b"\x80\5": PICKLE, b"ARROW1\0\0": TABLE,
    b"\xff\xff\xff\xff": TABLE, b"SQLite format 3\0": ("an SQLite database", "export its text"),
    b"%PDF-": ("a PDF", "export its text"), b"\x89PNG": ("an image", "give a text"),
    b"\xff\xd8\xff": ("an image", "give a text"), b"\x89HDF": ("an HDF5 file", "export its text"),
    b"\xfd7zXZ": ("compressed by xz", "decompress it first"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
}  # fmt: skip


@dataclass(frozen=True)
class Content:
    """The content of a text file as UTF-8 in the file `path`, from byte `start` on; `lines` says that it is JSON lines.

    `how` says how it was read. A temporary file lives as long as this object.
    """

    path: Path
    start: int
    lines: bool
    how: str
    held: Any = None


def is_ids(path: Path) -> bool:
    """Whether a file holds token ids: it is .npy or .safetensors by its name or its content."""
    if path.suffix in (".npy", ".safetensors") or not path.is_file():
        return path.suffix in (".npy", ".safetensors")
    head, size = _head(path)
    length = int.from_bytes(head[:8], "little")
    return head.startswith(NUMPY) or (2 <= length <= min(MAX_HEADER, size - 8) and head[8:9] == b"{")


def content_of(path: Path) -> Content:
    """The content of a text file of any form that is read. Raises CalibrationError, which names what else it is."""
    head, size = _head(path)
    if size == 0:
        raise CalibrationError(f"{path}: is empty; give a text file")
    if head.startswith(PARQUET) and _tail(path) == PARQUET:
        return _spooled(path, _parquet(path), True, "Parquet")
    if head.startswith((GZIP, ZSTD)):
        kind = "gzip" if head.startswith(GZIP) else "zstd"
        inner = _spooled(path, _decompressed(path, kind), False, kind)
        return _understood(inner.path, path, f"{kind}, ", inner.held)
    return _understood(path, path, "")


def _understood(file: Path, named: Path, before: str, held: Any = None) -> Content:
    """The content of a file that is not compressed; messages name the file `named`."""
    head, _ = _head(file)
    for start, (what, move) in OTHERS.items():
        if head.startswith(start):
            raise CalibrationError(f"{named}: is {what}; {move}")
    if head[257:262] == b"ustar" or (head.startswith(b"BZh") and head[4:10] == b"1AY&SY"):
        raise CalibrationError(f"{named}: is a tar or bzip2 archive; unpack it first")
    mark, encoding, name = next(((m, e, n) for m, e, n in MARKS if head.startswith(m)), (b"", "utf-8", "UTF-8 text"))
    if encoding != "utf-8":
        inner = _spooled(named, _transcoded(file, named, encoding, len(mark)), False, name)
        file, held, mark = inner.path, inner.held, b""
    else:
        for _ in _transcoded(file, named, encoding, len(mark)):  # which proves that all of it is UTF-8
            pass
    return _structured(Content(file, len(mark), False, before + name, held), named)


def _structured(content: Content, named: Path) -> Content:
    """The content as JSON lines, where it is a JSON list, an object or a line of one each; else as it is."""
    json_name = any(suffix in (".json", ".jsonl", ".ndjson") for suffix in named.suffixes)
    with opened(content.path) as file:
        file.seek(content.start)
        head = file.read(PIECE).lstrip()
    if head[:1] == b"{" and _is_object(head.split(b"\n", 1)[0]):
        return Content(content.path, content.start, True, content.how.replace("text", "JSON lines"), content.held)
    if head[:1] in (b"[", b"{"):
        try:
            how = content.how.replace("text", "JSON")
            return _spooled(named, _elements(content, named), True, how)
        except CalibrationError:
            if json_name:
                raise
    elif json_name:
        raise CalibrationError(
            f"{named}: is not JSON, as its name says; one object a line, or a list of objects, is read"
        )
    return content


def _is_object(line: bytes) -> bool:
    """Whether a line is a JSON object by itself, or begins one that is too long to tell."""
    try:
        return len(line) >= PIECE - 1 or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _elements(content: Content, named: Path) -> Iterator[bytes]:
    """Yields a line for each element of a JSON list, or for the one object. Raises CalibrationError."""
    decode, text, begun, ended = json.JSONDecoder().raw_decode, "", False, False
    for piece in _texts(content.path, "utf-8", content.start):
        text += piece
        while text := text.lstrip(", \t\r\n" if begun else " \t\r\n"):
            if not begun and text[0] == "[":
                begun, text = True, text[1:]
                continue
            if ended or (begun and text[0] == "]"):
                if ended or text[1:].strip():
                    raise CalibrationError(
                        f"{named}: goes on after the end of its JSON; give one list, or a line for each object"
                    )
                ended, text = True, ""
                break
            try:
                value, end = decode(text)
            except json.JSONDecodeError as error:
                if error.msg.startswith(("Expecting", "Invalid")) and error.pos < len(text) - 16:
                    raise CalibrationError(
                        f"{named}: is not JSON ({error.msg}); give a list, or one object a line"
                    ) from None
                break  # it goes on in the next piece
            except RecursionError:
                raise CalibrationError(f"{named}: its JSON is nested too deeply; give plainer rows") from None
            begun_alone = not begun
            yield json.dumps(value).encode() + b"\n"
            text, begun, ended = text[end:], True, begun_alone
        if len(text) > MOST_ROW:
            raise CalibrationError(
                f"{named}: an element of its JSON is longer than {MOST_ROW >> 20} MiB, or is no JSON"
            )
    if text.strip() or not begun or not ended:
        raise CalibrationError(f"{named}: is not whole JSON; download it again, or give one object a line")


def _transcoded(file: Path, named: Path, encoding: str, start: int) -> Iterator[bytes]:
    """Yields the text as UTF-8. Raises CalibrationError with the place of what is not text in this encoding."""
    at = start
    try:
        for text in _texts(file, encoding, start):
            if "\0" in text:
                raise CalibrationError(f"{named}: holds a NUL after byte {at}, so it is no text; {_what_is_read()}")
            at += PIECE
            yield text.encode("utf-8")
    except UnicodeError as error:
        place = getattr(error, "start", 0)
        raise CalibrationError(
            f"{named}: is not {encoding.upper()} near byte {at + place} ({error.args[-1] if error.args else error}); "
            f"convert it (iconv -t UTF-8); {_what_is_read()}"
        ) from None


def _texts(file: Path, encoding: str, start: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    with opened(file) as content:
        content.seek(start)
        while piece := content.read(PIECE):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)


def _what_is_read() -> str:
    return "read are text in UTF-8, -16 or -32, JSON lines and lists, Parquet, .npy and .safetensors of token ids"


def _decompressed(path: Path, kind: str) -> Iterator[bytes]:
    """Yields what is in a gzip or zstd file. Raises CalibrationError."""
    try:
        with opened(path) as file, _opener(kind)(file) as stream:
            while piece := stream.read(PIECE):
                yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise CalibrationError(f"{path}: is not a whole {kind} file ({error}); download it again") from None
    except Exception as error:  # zstandard's error is its own
        if type(error).__name__ != "ZstdError":
            raise
        raise CalibrationError(f"{path}: is not a whole {kind} file ({error}); download it again") from None


def _opener(kind: str) -> Callable[[BinaryIO], Any]:
    if kind == "gzip":
        return lambda file: gzip.GzipFile(fileobj=file)
    try:
        from compression import zstd  # Python 3.14

        return lambda file: zstd.ZstdFile(file)
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise CalibrationError("a .zst file needs a package that is not installed: pip install zstandard") from None
    return lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _parquet(path: Path) -> Iterator[bytes]:
    """Yields a JSON line for each row of a Parquet file. Raises CalibrationError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(
            f"{path}: is Parquet, which needs a package that is not installed: pip install pyarrow"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield json.dumps(row, default=str).encode() + b"\n"
    except (ArrowException, OSError, ValueError) as error:
        raise CalibrationError(
            f"{path}: is not a whole Parquet file ({first_line(error)}); download it again"
        ) from None


class _Unpacked:
    """A temporary file, which is removed when nothing needs it any more."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="lowmem-wanda-")
        self.file, self.path = open(handle, "wb"), Path(name)  # noqa: SIM115  closed by `_spooled`
        weakref.finalize(self, partial(self.path.unlink, missing_ok=True))


def _spooled(named: Path, pieces: Iterator[bytes], lines: bool, how: str) -> Content:
    """The pieces in a temporary file. Raises CalibrationError if they are too many, or do not fit on its disk."""
    held, size = _Unpacked(), 0
    try:
        with held.file as file:
            for piece in pieces:
                size += file.write(piece)
                if size > MOST:
                    raise CalibrationError(
                        f"{named}: has more than {MOST >> 30} GiB when it is unpacked; give a part of it"
                    )
    except OSError as error:
        raise CalibrationError(
            f"{named}: cannot be unpacked to {held.path} ({error.strerror}); set TMPDIR to a folder with more room"
        ) from None
    if not size:
        raise CalibrationError(f"{named}: is empty when it is unpacked; download it again")
    return Content(held.path, 0, lines, how, held)


def _tail(path: Path) -> bytes:
    with opened(path) as file:
        file.seek(max(0, file.seek(0, 2) - 4))
        return file.read(4)


def _head(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size. Raises CalibrationError."""
    try:
        with opened(path, "give a text file to --text") as file:
            head = file.read(512)
            return head, file.seek(0, 2)
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None
