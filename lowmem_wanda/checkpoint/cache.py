"""Where a source is: a folder, a model in a Hugging Face cache, or one named as on the Hub. No network is used."""

import os
import re
from pathlib import Path

from lowmem_wanda.errors import CheckpointError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint.

    The root of a model in a Hugging Face cache becomes its snapshot: that of the branch main, or the only one. A name
    such as "org/name", where there is no such folder, is looked up in the local cache. Raises CheckpointError where it
    is not there, or where it is not clear which snapshot is meant.
    """
    path = Path(source)
    if path.name.startswith("models--") and (path / "snapshots").is_dir():
        return _snapshot(path)
    if path.exists() or not NAME.fullmatch(str(source)):
        return path
    root = cache() / f"models--{str(source).replace('/', '--')}"
    if root.is_dir():
        return _snapshot(root)
    raise CheckpointError(
        f"{source}: is neither a folder nor a model in the local cache {cache()}; give the folder that it was "
        "downloaded to, or get it from the Hugging Face Hub with --download"
    )


def cache() -> Path:
    """The folder of the local Hugging Face cache, as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(given)).expanduser()


def _snapshot(root: Path) -> Path:
    """The snapshot of a model in a cache. Raises CheckpointError."""
    found = sorted(path for path in (root / "snapshots").glob("*") if path.is_dir())
    main = root / "refs" / "main"
    wanted = root / "snapshots" / main.read_text("utf-8", "replace").strip()[:64] if main.is_file() else None
    if wanted in found or len(found) == 1:
        return wanted if wanted in found and wanted is not None else found[0]
    names = ", ".join(str(path.relative_to(root)) for path in found[:4])
    move = f"give the folder of one: {names}" if found else "download it again"
    raise CheckpointError(f"{root}: holds {len(found)} snapshots; {move}")
