"""Checksums of files.

BLAKE3 tells whether a shard is still the file that was written: it takes a fifth of the time of SHA-256, which would
bound the writing. SHA-256 is for what people compare with published digests. A record of a file says which it has.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.reader import PIECE, opened
from lowmem_wanda.errors import CheckpointError

KINDS: dict[str, Any] = {"sha256": hashlib.sha256}
try:
    from blake3 import blake3
except ImportError:  # it has no wheel for this machine; a job that began with one kind goes on with the other
    pass
else:
    KINDS = {"blake3": blake3, **KINDS}
FASTEST = next(iter(KINDS))


class MissingPackageError(CheckpointError):
    """The package of a checksum is not installed."""


def digest_of(path: Path, kind: str) -> str:
    """The digest of a file in hex. The file is read 16 MiB at a time. Raises CheckpointError without the package."""
    if kind not in KINDS:
        raise MissingPackageError(f"{path}: its checksum needs a package that is not installed: pip install {kind}")
    digest = KINDS[kind]()
    with opened(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return str(digest.hexdigest())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    return digest_of(path, "sha256")


def checksum_in(record: Mapping[str, Any]) -> dict[str, str]:
    """{kind: digest in hex} of the checksum in a record of a file. Raises KeyError or ValueError without one."""
    found = {kind: record[kind] for kind in ("blake3", "sha256") if kind in record}
    if not found:
        raise KeyError("blake3")
    if not all(isinstance(digest, str) for digest in found.values()):
        raise ValueError("blake3")
    return found


def matches(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is there and has the checksum that a record of it holds. Raises as the two above."""
    return path.is_file() and all(digest_of(path, kind) == digest for kind, digest in checksum_in(record).items())
