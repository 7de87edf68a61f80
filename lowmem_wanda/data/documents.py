"""The documents of a text: functions that each read one of them, so that no file is held in memory."""

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.reader import opened
from lowmem_wanda.data.chats import Render, no_template, text_of
from lowmem_wanda.data.formats import MOST_ROW, Content, content_of
from lowmem_wanda.errors import CalibrationError

SEPARATOR = b"<|endoftext|>"
LONGEST = 1 << 20  # bytes of a plain text that are tokenized at once; a longer document is split at a line
SPACE = 1 << 12  # bytes that are looked at for something else than space


@dataclass
class Documents:
    """The documents of one text: `readers` each read one. `how` says how the text was read.

    Once documents are read, `forms` are those of the rows, such as "field text", and `tokens` are the tokens that were
    made of them, in `read` documents.
    """

    name: str
    how: str
    readers: Sequence[Callable[[], str]]
    forms: set[str] = field(default_factory=set)
    tokens: int = 0
    read: int = 0

    def facts(self) -> dict[str, Any]:
        """What the report says of this text."""
        how = ", ".join([self.how, *sorted(self.forms)])
        return {"name": self.name, "how": how, "documents": len(self.readers), "read": self.read, "tokens": self.tokens}


def documents_of(
    path: Path, render: Render = no_template, strip: bool | None = True, longest: int | None = None
) -> Documents:
    """The documents of a file. Raises CalibrationError for what is no text.

    Documents of a plain text lose the space around them with `strip` (None: only where there are several), and are
    split if they have more than `longest` bytes (default: LONGEST).
    """
    content = content_of(path)
    with opened(content.path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        ends = _spans(mapped, content.start, b"\n" if content.lines else SEPARATOR)
        spans = [span for span in ends if _holds_text(mapped, *span)]
    found = Documents(path.name, content.how, ())
    if content.lines:
        readers = [partial(_row, content, path, span, render, found) for span in spans]
    else:
        strip = len(spans) > 1 if strip is None else strip
        pieces = [piece for start, stop in spans for piece in _split(content, start, stop, longest or LONGEST)]
        readers = [partial(_plain, content, piece, strip) for piece in pieces]
    found.readers = readers
    return found


def _spans(mapped: mmap.mmap, start: int, separator: bytes) -> Iterator[tuple[int, int]]:
    """Yields the first byte of each part between separators, and the byte after its last."""
    while (stop := mapped.find(separator, start)) >= 0:
        yield start, stop
        start = stop + len(separator)
    yield start, len(mapped)


def _holds_text(mapped: mmap.mmap, start: int, stop: int) -> bool:
    return any(mapped[at : min(at + SPACE, stop)].strip() for at in range(start, stop, SPACE))


def _split(content: Content, start: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yields the start and stop of pieces of at most `longest` bytes.

    They end with a line, unless a line is longer, and never within a character.
    """
    with opened(content.path) as file:
        while stop - start > longest:
            file.seek(start)
            piece = file.read(longest + 1)
            cut = piece.rfind(b"\n", 0, longest) + 1 or longest
            while cut > 1 and piece[cut] & 0xC0 == 0x80:  # the next byte goes on with a character
                cut -= 1
            yield start, start + cut
            start += cut
    yield start, stop


def _bytes(content: Content, span: tuple[int, int]) -> bytes:
    with opened(content.path) as file:
        file.seek(span[0])
        return file.read(span[1] - span[0])


def _plain(content: Content, span: tuple[int, int], strip: bool) -> str:
    text = _bytes(content, span).decode("utf-8")
    return text.strip() if strip else text


def _row(content: Content, path: Path, span: tuple[int, int], render: Render, found: Documents) -> str:
    """The text of a line of JSON lines. Raises CalibrationError for one that holds no text."""
    if span[1] - span[0] > MOST_ROW:
        raise CalibrationError(f"{path}: the line at byte {span[0]} is longer than {MOST_ROW >> 20} MiB; split it")
    try:
        text, form = text_of(json.loads(_bytes(content, span)), render)
    except RecursionError:
        raise CalibrationError(f"{path}: the line at byte {span[0]} is nested too deeply; give plainer rows") from None
    except ValueError as error:
        said = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f'{path}: the line at byte {span[0]} is not a JSON object with a "text" or a chat: {said}'
        ) from None
    found.forms.add(form)
    return text.encode("utf-8", errors="replace").decode("utf-8")  # tokenizers refuse lone surrogates
