"""The output directory of a job: what the job was asked to do, which shards are done, and how it becomes a checkpoint.

`job.json` is written once, before anything else. Each finished shard adds a line to `.progress.jsonl`. A shard is done
when it has its final name and the checksum of its line. A valid header and the right size prove nothing, because a kill
in the middle of a save leaves both. `config.json` is written last, so no program loads an unfinished directory.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lowmem_wanda.checkpoint.checksum import checksum_in, matches
from lowmem_wanda.checkpoint.companions import JOB, REPORT
from lowmem_wanda.checkpoint.directory import CONFIG, INDEX, Checkpoint
from lowmem_wanda.checkpoint.progress import entries_in, line_of
from lowmem_wanda.checkpoint.reader import read_header, read_json, require_regular
from lowmem_wanda.checkpoint.writer import PARTIAL, copy_file, explained, sync_directory, write_bytes, write_json
from lowmem_wanda.errors import CheckpointError, OutputError

FORMAT = 1  # the format number of job.json and report.json
PROGRESS, LOCK = ".progress.jsonl", ".lock"
PACKAGES = ("lowmem_wanda", "torch", "transformers")  # arguments of a job that are versions


class Output:
    """The output directory of one job, new or resumed; `working` keeps other processes out of it meanwhile.

    `arguments` are {name: JSON value} for everything that can change a bit of the result. `label` turns such a name
    into the words that messages use. Raises OutputError if the directory holds a job with other arguments or of another
    format.
    """

    def __init__(self, path: Path, arguments: dict[str, Any], label: Callable[[str], str] = str) -> None:
        self.path, self.arguments = path, {"format": FORMAT, **arguments}
        self.resumed = (path / JOB).exists()
        self.finished: dict[str, dict[str, Any]] = {}
        if self.resumed:
            self._require_same(begun(path), label)

    def begin(self, needed: int, shards: Collection[str]) -> None:
        """Writes job.json of a new job; of a resumed one, finds which of its `shards` are done.

        The finished job takes `needed` bytes. Raises OutputError if the disk cannot hold those that are still missing.
        """
        self._take_up(shards)
        require_disk(self.path, needed - sum(entry["nbytes"] for entry in self.finished.values()))
        if not self.resumed:
            write_json(self.path / JOB, self.arguments)

    def add(self, shard: str, entry: dict[str, Any]) -> None:
        """Records a finished shard. `entry` holds its nbytes and checksum and goes into the report."""
        with explained(self.path / PROGRESS), _appended(self.path / PROGRESS) as file:
            file.write(line_of({"shard": shard, **entry}))
            os.fsync(file.fileno())
            if not self.finished:
                sync_directory(self.path)
        self.finished[shard] = entry

    def publish_files(self, source: Checkpoint, files: Sequence[Path]) -> None:
        """Copies the small files of the source except config.json, byte for byte, and writes the index of the shards.

        Raises OutputError if the shards do not hold the same tensors as the source.
        """
        for shard in self.finished:
            if not (self.path / shard).exists():
                raise OutputError(f"{self.path / shard}: was removed while the job ran; run the same command again")
        weight_map = {
            name: shard.name for shard in sorted(self.path.glob("model-*.safetensors")) for name in read_header(shard)
        }
        if weight_map.keys() != source.tensors.keys():
            missing = sorted(weight_map.keys() ^ source.tensors.keys())
            raise OutputError(f"{self.path}: tensor {missing[0]} is not in both source and output; report this bug")
        for file in files:
            if file.name != CONFIG:
                (self.path / file).parent.mkdir(exist_ok=True)
                self._copy(source, file)
        index = {"metadata": {"total_size": source.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.path / INDEX, index)

    def publish_config(self, source: Checkpoint) -> None:
        """Writes config.json, which completes the checkpoint: as it is, or as it describes what was made."""
        if made := source.written_config():
            write_bytes(self.path / CONFIG, made)
        else:
            self._copy(source, Path(CONFIG))

    def end(self) -> None:
        """Removes the file that only an unfinished job needs."""
        (self.path / PROGRESS).unlink(missing_ok=True)

    def verified(self, source: Checkpoint, files: Sequence[Path]) -> dict[str, Any]:
        """The report of a finished job. Raises OutputError if a file differs from this report or from the source."""
        again = f"delete {self.path} and run again"
        try:
            report = read_json(self.path / REPORT)
            shards = {shard["name"]: checksum_in(shard) for shard in report["shards"]}
            index = read_json(self.path / INDEX)["weight_map"]
            report["summary"]["sparsity"], dict(report.get("imatrix") or {})
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            raise OutputError(f"{self.path}: its {REPORT} or {INDEX} is damaged; {again}") from None
        if wrong := next((name for name, checksum in shards.items() if not matches(self.path / name, checksum)), ""):
            raise OutputError(f"{self.path / wrong}: is not the shard that was written; {again}")
        if index != {name: shard for shard in shards for name in read_header(self.path / shard)}:
            raise OutputError(f"{self.path / INDEX}: does not say where the tensors are; {again}")
        for file in source.differing(files, self.path):
            raise OutputError(f"{self.path / file}: is not the source's; {again}")
        return report

    def _copy(self, source: Checkpoint, file: Path) -> None:
        """Copies a small file, which must have the checksum that the job began with."""
        copy_file(source.path / file, self.path / file, self.arguments["small_files"][str(file)])

    def _take_up(self, shards: Collection[str]) -> None:
        """Finds the finished shards of an interrupted run and removes its half-written files."""
        for partial in list(self.path.rglob(f".*{PARTIAL}")):
            partial.unlink()
        for entry in entries_in(self.path / PROGRESS):
            name = str(entry.pop("shard", "")) if isinstance(entry, dict) else ""
            if name in shards and matches(self.path / name, entry):
                self.finished[name] = entry

    def _require_same(self, before: dict[str, Any], label: Callable[[str], str]) -> None:
        """Raises OutputError if the arguments of the job in the directory, `before`, are not those of this job."""
        now = json.loads(json.dumps(self.arguments))
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                move = "repeat the first command or give another directory"
                if key == "threads":
                    move = f"set OMP_NUM_THREADS={before.get(key)} or give another directory"
                if key in PACKAGES:
                    version = before.get(key)
                    move = f"continue it with it (pip install {label(key)}=={version}) or give another directory"
                raise OutputError(
                    f"{self.path}: holds a job with {label(key)} = {_brief(before.get(key))}, this one has "
                    f"{_brief(now.get(key))}; {move}"
                )


def shard_names(depth: int) -> list[str]:
    """The file names of the shards: first that of all tensors outside the blocks, then one for each block.

    They are Hugging Face's. Of shards with other names, llama.cpp's converter makes an empty GGUF without an error.
    """
    return [f"model-{index + 1:05d}-of-{depth + 1:05d}.safetensors" for index in range(depth + 1)]


def begun(path: Path) -> dict[str, Any]:
    """The arguments of the job in a directory; {} if there is no job.

    Raises OutputError if job.json is damaged or of another format, because its arguments and the bits of its shards may
    then have another meaning.
    """
    if not (path / JOB).exists():
        return {}
    try:
        arguments = read_json(path / JOB)
    except CheckpointError:
        raise OutputError(f"{path / JOB}: is damaged; delete {path} and run again") from None
    if arguments.get("format") != FORMAT:
        raise OutputError(
            f"{path}: holds a job that another version of lowmem-wanda began ({JOB} has format "
            f"{_brief(arguments.get('format', 0))}, this version {FORMAT}); continue it with that version, or give "
            "another directory, or delete this one and run again"
        )
    return arguments


def finished(path: Path) -> bool:
    """Whether the job in a directory is done. config.json is the last file that it writes."""
    return (path / JOB).exists() and (path / CONFIG).exists()


def require_finished(path: Path) -> None:
    """Raises CheckpointError for the directory of a job that is not done."""
    if (path / JOB).exists() and not (path / CONFIG).exists():
        raise CheckpointError(f"{path}: is an unfinished job; run its prune command again to complete it")


def require_target(path: str | Path, source: str | Path) -> None:
    """Raises OutputError if the target is the source, lies within it, or holds anything other than a job."""
    require_outside(path, source)
    target = Path(path).resolve()
    with explained(Path(path)):
        if (target / JOB).exists() or not target.exists():
            return
        left = {LOCK, f".{JOB}{PARTIAL}"}  # a kill in the first moment leaves no other file
        if not target.is_dir() or any(entry.name not in left for entry in target.iterdir()):
            raise OutputError(f"{path}: exists and is not a job of this program; give a new or empty directory")


def require_outside(path: str | Path, source: str | Path) -> None:
    """Raises OutputError if the target is the source or lies within it."""
    target, inside = Path(path).resolve(), Path(source).resolve()
    if target == inside or inside in target.parents:
        raise OutputError(f"{path}: is or lies in the source {source}, which is never written to; give another one")


def report_folder(path: str | Path, kind: str) -> Path:
    """The folder for a report. Raises OutputError unless it is new, empty, or holds a report of the same kind."""
    folder = Path(path)
    with explained(folder):
        if folder.is_symlink() and not folder.exists():
            raise OutputError(f"{folder}: is a link that leads nowhere; give another directory, or remove the link")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            held = folder / REPORT
            if not held.is_file() or read_json(held).get("kind") != kind:
                raise OutputError(f"{folder}: exists and holds no report of {kind}; give a new or empty directory")
    return folder


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Creates the directory and keeps a second process out of it, which gets an OutputError.

    The lock is a file that is removed in the end. A process that opened the file just before it was removed tries
    again.
    """
    with explained(path):
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{path}: is a link to a folder that is not there; make that folder, or remove the link")
        path.mkdir(parents=True, exist_ok=True)
        while True:
            handle = _appended(path / LOCK)
            if not _locked(handle):
                handle.close()
                raise OutputError(f"{path}: another process is at work in it; wait for it or end it")
            if (path / LOCK).exists() and os.path.samestat(os.fstat(handle.fileno()), os.stat(path / LOCK)):
                break
            handle.close()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file, so it stays there
            (path / LOCK).unlink()
        handle.close()


def require_disk(path: Path, needed: int) -> None:
    """Raises OutputError if fewer than `needed` bytes of disk are free."""
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        unit, name = (1e9, "GB") if needed >= 1e9 else (1e6, "MB")
        raise OutputError(
            f"{path}: needs {needed / unit:.2f} {name} but {free / unit:.2f} {name} are free there; "
            "free some or give another disk"
        )


def _locked(handle: BinaryIO) -> bool:
    """Whether this process may work: it took the lock, or the system has no locks (Windows, some network disks)."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _appended(path: Path) -> BinaryIO:
    """A file to append to without a buffer. Raises OutputError for anything but a file in its place."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    try:
        require_regular(path, handle)
    except CheckpointError as error:
        os.close(handle)
        raise OutputError(str(error)) from None
    return open(handle, "ab", buffering=0)  # type: ignore[return-value]


def _brief(value: Any) -> str:
    """A value as JSON of at most 60 characters, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
