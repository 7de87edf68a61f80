"""The output directory as the state of a job: what it was asked to do, and which shards are done.

`job.json` is written once, before anything else. Each finished shard adds a line to `.progress.jsonl`;
a shard is done when it stands under its final name with the checksum of its line (a valid header and
the right size prove nothing: a kill inside a save leaves both).
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lowmem_wanda.checkpoint.directory import CONFIG, Checkpoint, read_json
from lowmem_wanda.checkpoint.writer import PARTIAL, explained, sha256_of, sync_directory, write_json
from lowmem_wanda.errors import CheckpointError, OutputError

JOB, REPORT, PROGRESS, LOCK = "job.json", "report.json", ".progress.jsonl", ".lock"
WHOLE = 256 << 20  # bytes; a larger source is fingerprinted by samples


class Job:
    """One pruning in `path`, begun or taken up again, while no other process is at work there (see `working`).

    `arguments` is all that can change a bit of the result, as {flag or property: value}. Raises OutputError
    for the same job with other arguments.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self.path, self.arguments = path, arguments
        self.resumed = (path / JOB).exists()
        self.finished: dict[str, dict[str, Any]] = {}
        if self.resumed:
            self._compare(begun(path), arguments)

    def begin(self, needed: int, shards: Collection[str]) -> None:
        """Writes job.json, or finds which of `shards` are done. Raises OutputError where `needed` bytes do not fit."""
        self._take_up(shards)
        check_disk(self.path, needed - sum(record["nbytes"] for record in self.finished.values()))
        if not self.resumed:
            write_json(self.path / JOB, self.arguments)

    def record(self, shard: str, entry: dict[str, Any]) -> None:
        """Notes a finished shard; `entry` holds its nbytes and sha256 and goes into the report."""
        with explained(self.path / PROGRESS), open(self.path / PROGRESS, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"shard": shard, **entry}) + "\n")  # a kill may have cut the line before
            file.flush()
            os.fsync(file.fileno())
        if not self.finished:
            sync_directory(self.path)
        self.finished[shard] = entry

    def end(self) -> None:
        """Removes what only an unfinished job needs."""
        (self.path / PROGRESS).unlink(missing_ok=True)

    def _take_up(self, shards: Collection[str]) -> None:
        """Finds the finished shards of an interrupted run and clears away its half-written files."""
        for partial in list(self.path.rglob(f".*{PARTIAL}")):
            partial.unlink()
        progress = self.path / PROGRESS
        for line in progress.read_bytes().splitlines() if progress.exists() else ():
            entry = _json_or_none(line)
            name = str(entry.pop("shard", "")) if isinstance(entry, dict) else ""
            if name in shards and (self.path / name).exists() and sha256_of(self.path / name) == entry.get("sha256"):
                self.finished[name] = entry

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        now = json.loads(json.dumps(now))
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                raise OutputError(
                    f"{self.path}: holds a job with {key} = {_brief(before.get(key))}, this one has "
                    f"{_brief(now.get(key))}; "
                    "repeat the first command or give another directory"
                )


def begun(path: Path) -> dict[str, Any]:
    """The arguments of the job in a directory, none where there is no job. Raises OutputError."""
    return _ours(path / JOB) if (path / JOB).exists() else {}


def finished(path: Path) -> bool:
    """Whether nothing is left to do in a job's directory: config.json is the last file to be written."""
    return (path / JOB).exists() and (path / CONFIG).exists()


def refuse_unfinished(path: Path) -> None:
    """Raises CheckpointError for the directory of a job that is not done."""
    if (path / JOB).exists() and not (path / CONFIG).exists():
        raise CheckpointError(f"{path}: is an unfinished job; run its prune command again to complete it")


def refuse(path: str | Path, source: str | Path) -> None:
    """Raises OutputError if the target is the source, lies within it, or holds something else."""
    refuse_within(path, source)
    target = Path(path).resolve()
    with explained(Path(path)):
        if (target / JOB).exists() or not target.exists():
            return
        begun = {LOCK, f".{JOB}{PARTIAL}"}  # all that a kill in the first moment leaves
        if not target.is_dir() or any(entry.name not in begun for entry in target.iterdir()):
            raise OutputError(f"{path}: exists and is not a job of this program; give a new or empty directory")


def refuse_within(path: str | Path, source: str | Path) -> None:
    """Raises OutputError if the target is the source or lies within it."""
    target, inside = Path(path).resolve(), Path(source).resolve()
    if target == inside or inside in target.parents:
        raise OutputError(f"{path}: is or lies in the source {source}, which is never written to; give another one")


@contextmanager
def working(path: Path) -> Iterator[None]:
    """Makes the directory and keeps a second process out of it. Raises OutputError in the second.

    The lock is a file that is removed in the end; who opened one that was removed meanwhile tries again.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        while True:
            handle = open(path / LOCK, "ab")  # noqa: SIM115  closed below
            if not _locked(handle):
                handle.close()
                raise OutputError(f"{path}: another process is at work in it; wait for it or end it")
            if (path / LOCK).exists() and os.path.samestat(os.fstat(handle.fileno()), os.stat(path / LOCK)):
                break
            handle.close()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file, so there it stays
            (path / LOCK).unlink()
        handle.close()


def check_disk(path: Path, needed: int) -> None:
    """Raises OutputError where fewer than `needed` bytes are free."""
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise OutputError(
            f"{path}: needs {needed / 1e9:.2f} GB but {free / 1e9:.2f} GB are free there; "
            "free some or give another disk"
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 in hex over config.json and the shards: all bytes, or of more than 256 MiB 64 KiB of every 4 MiB."""
    digest = hashlib.sha256((checkpoint.path / CONFIG).read_bytes())
    sizes = {file: file.stat().st_size for file in checkpoint.files}
    step, length = (4 << 20, 4 << 20) if sum(sizes.values()) <= WHOLE else (4 << 20, 64 << 10)
    for file, size in sizes.items():
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb", buffering=0) as handle:
            for start in range(0, size, step):
                handle.seek(start)
                digest.update(handle.read(length))
    return digest.hexdigest()


def _locked(handle: BinaryIO) -> bool:
    """Whether no other process holds the lock; Windows and some network file systems have none to hold."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _ours(path: Path) -> dict[str, Any]:
    """A JSON file that this program wrote. Raises OutputError where it is no longer that."""
    try:
        return read_json(path)
    except CheckpointError:
        raise OutputError(f"{path}: is damaged; delete {path.parent} and prune again") from None


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # an empty line, or one that a kill cut short
        return None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
