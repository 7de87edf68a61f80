"""The lines of a progress file, each with its checksum, of which a kill may cut the last."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.reader import opened

MOST = 1 << 30  # bytes of a progress file that are read; those of 126 blocks take 200 KB


def line_of(entry: Mapping[str, Any]) -> bytes:
    """The line that says what is done; it begins anew where a kill cut the one before."""
    text = json.dumps(entry).encode()
    return b"\n" + text + b" " + _sum(text) + b"\n"


def entries_in(progress: Path) -> Iterator[Any]:
    """Yields what the lines of a progress file say; None for one that was cut short, or is not what was written."""
    if not progress.exists():
        return
    with opened(progress) as file:
        lines = file.read(MOST).splitlines()
    for line in lines:
        text, _, checksum = line.rpartition(b" ")
        yield json.loads(text) if text and _sum(text) == checksum else None


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
