"""The small files beside the weights: configuration, tokenizer, licence and model card, which are copied as they are.

Links are followed within the folder and into the `blobs` of a Hugging Face cache, and nowhere else: what people publish
must not hold a file of theirs that a checkpoint pointed to.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowmem_wanda.checkpoint.reader import opened, require_no_pointer
from lowmem_wanda.errors import CheckpointError

JOB, REPORT = "job.json", "report.json"  # files that a pruning writes beside the checkpoint
WEIGHT_INDEX = ".index.json"
COPIED = (".json", ".jinja", ".model", ".txt", ".md", ".tiktoken", ".spm")
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "README", "USE_POLICY")
NEEDED = ("config.json", "tokenizer", "vocab", "merges", "special_tokens", "chat_template")  # how such names begin
ADAPTER = "adapter_config.json"
PIECE = 1 << 20  # bytes that are compared at a time


@dataclass(frozen=True)
class Companions:
    """The relative paths of the small files that are copied, and {file: why not} of those that are left out."""

    files: tuple[Path, ...]
    left_out: dict[str, str]


def companions(source: Path, code: bool = False) -> Companions:
    """The small files of a checkpoint; Python files with `code`.

    Files that a pruning writes (job.json, report.json, the index) are not among them. Raises CheckpointError for a file
    that the model needs but that is a link out of the folder, or a pointer of Git LFS in place of the file.
    """
    left_out = {}
    files = []
    for path in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]):
        if not path.is_file() or not _is_copied(path, code):
            continue
        if not _within(path, source):
            if path.name.lower().startswith(NEEDED):
                raise CheckpointError(
                    f"{path}: is a link to {os.path.realpath(path)}, out of the folder, and is not followed; put the "
                    "file itself there"
                )
            left_out[path.name] = "is a link out of the folder"
        elif path.name == ADAPTER:
            left_out[path.name] = "belongs to the adapter beside the model, which is not merged into it"
        else:
            require_no_pointer(path)
            files.append(path.relative_to(source))
    return Companions(tuple(files), left_out)


def require_files(source: Path) -> None:
    """Raises CheckpointError for what is in the place of a small file: a pipe or a device, or a pointer of Git LFS."""
    for path in sorted(source.iterdir()):
        if not _is_copied(path, code=True) or not path.exists() or path.is_dir():
            continue
        if not path.is_file():
            raise CheckpointError(f"{path}: is a pipe or a device, not a file; put the file itself in its place")
        require_no_pointer(path)


def differing(files: Iterable[Path], source: Path, target: Path) -> list[Path]:
    """Those of the relative paths `files` whose file is missing in `target` or has other bytes than in `source`."""
    return [file for file in files if not (target / file).is_file() or not _same(target / file, source / file)]


def _same(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    return all(mine == its for mine, its in zip(pieces_of(one), pieces_of(other), strict=True))


def pieces_of(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, a piece at a time. Raises CheckpointError."""
    with opened(path) as file:
        while piece := file.read(PIECE):
            yield piece


def _within(path: Path, source: Path) -> bool:
    """Whether a file lies in the folder once all links are followed, or in the blobs of its Hugging Face cache."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    return any(place in real.parents for place in allowed)


def _is_copied(path: Path, code: bool) -> bool:
    """Whether a file of the source is copied to the output; Python files only with `code`."""
    if path.name in (JOB, REPORT) or path.name.endswith(WEIGHT_INDEX) or path.name.startswith("."):
        return False
    if path.suffix in COPIED or path.name.startswith("tokenizer.") or (code and path.suffix == ".py"):
        return not path.name.endswith((".safetensors", ".gguf", ".bin"))
    return path.name.upper().startswith(COPIED_NAMES) and path.suffix in ("", ".rst", ".pdf", ".html")
