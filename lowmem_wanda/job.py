"""The output directory as the state of a job: what it was asked to do, and which shards are done.

`job.json` is written once, before anything else. Each finished shard adds a line to `.progress.jsonl`;
a shard is done when it stands under its final name with the checksum of its line (a valid header and
the right size prove nothing: a kill inside a save leaves both).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lowmem_wanda.checkpoint import CONFIG, Checkpoint, read_json
from lowmem_wanda.errors import OutputError
from lowmem_wanda.writer import PARTIAL, sha256_of, sync_directory, write_json

JOB, REPORT, PROGRESS = "job.json", "report.json", ".progress.jsonl"
WHOLE = 4 << 30  # bytes; a larger source is fingerprinted by samples


class Job:
    """One pruning, begun or taken up again in `path`.

    `arguments` is all that can change a bit of the result, as {flag or property: value}. Raises OutputError
    for a directory that holds something else, or the same job with other arguments.
    """

    def __init__(self, path: Path, source: Path, arguments: dict[str, Any]) -> None:
        self.path = path
        self.refuse(path, source)
        found = path / JOB
        if found.exists():
            self._compare(read_json(found), arguments)
        self.resumed = found.exists()
        self.arguments = arguments
        self.finished: dict[str, dict[str, Any]] = {}

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: config.json is the last file to be written."""
        return (self.path / CONFIG).exists()

    @staticmethod
    def refuse(path: str | Path, source: str | Path) -> None:
        """Raises OutputError if the target is the source, lies within it, or holds something else."""
        target, inside = Path(path).resolve(), Path(source).resolve()
        if target == inside or inside in target.parents:
            raise OutputError(f"{path}: is or lies in the source {source}, which is never written to; give another one")
        if (target / JOB).exists() or not target.exists():
            return
        begun = f".{JOB}{PARTIAL}"  # all that a kill in the first moment leaves
        if not target.is_dir() or any(entry.name != begun for entry in target.iterdir()):
            raise OutputError(f"{path}: exists and is not a job of this program; give a new or empty directory")

    @contextmanager
    def at_work(self, needed: int) -> Iterator[None]:
        """Creates the directory and job.json, or takes up what is done, and keeps other processes out meanwhile.

        Raises OutputError where `needed` bytes do not fit on the disk, or another process is at work.
        """
        if not self.resumed:
            self._check_disk(needed)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be created ({error.strerror}); give another one") from None
            write_json(self.path / JOB, self.arguments)
        with open(self.path / JOB, "rb") as handle:
            if not _locked(handle):
                raise OutputError(f"{self.path}: another process is at work in it; wait for it or end it")
            self._take_up()
            self._check_disk(needed - sum(record["nbytes"] for record in self.finished.values()))
            yield

    def _check_disk(self, needed: int) -> None:
        existing = next(parent for parent in (self.path, *self.path.resolve().parents) if parent.exists())
        if (free := shutil.disk_usage(existing).free) < needed:
            raise OutputError(
                f"{self.path}: needs {needed / 1e9:.2f} GB but {free / 1e9:.2f} GB are free there; "
                "free some or give another disk"
            )

    def record(self, shard: str, entry: dict[str, Any]) -> None:
        """Notes a finished shard; `entry` holds its nbytes and sha256 and goes into the report."""
        with open(self.path / PROGRESS, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"shard": shard, **entry}) + "\n")  # a kill may have cut the line before
            file.flush()
            os.fsync(file.fileno())
        if not self.finished:
            sync_directory(self.path)
        self.finished[shard] = entry

    def end(self) -> None:
        """Removes what only an unfinished job needs."""
        (self.path / PROGRESS).unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Finds the finished shards of an interrupted run and clears away its half-written files."""
        for partial in list(self.path.rglob(f".*{PARTIAL}")):
            partial.unlink()
        progress = self.path / PROGRESS
        for line in progress.read_text(encoding="utf-8").splitlines() if progress.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # an empty line, or one that a kill cut short
                continue
            shard = self.path / entry.pop("shard")
            if shard.exists() and sha256_of(shard) == entry["sha256"]:
                self.finished[shard.name] = entry

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        now = json.loads(json.dumps(now))
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                raise OutputError(
                    f"{self.path}: holds a job with {key} = {_brief(before.get(key))}, this one has "
                    f"{_brief(now.get(key))}; "
                    "repeat the first command or give another directory"
                )


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 in hex over config.json and the shards: all bytes, or of more than 4 GiB 64 KiB of every 4 MiB."""
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
    """Whether this process now holds the file's lock; always so on Windows, which has no such locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError:
        return False
    return True


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
