"""Downloads a model from the Hugging Face Hub, which is done only where it is asked for."""

from pathlib import Path

from lowmem_wanda.checkpoint.cache import NAME
from lowmem_wanda.errors import CheckpointError

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.model.*", "*.spm", "*.tiktoken", "*.txt", "*.md",
         "LICENSE*", "*.py")  # fmt: skip


def download(name: str) -> Path:
    """Downloads the safetensors and small files of a model from the Hub into the local cache.

    Args:
        name: its name there, such as "org/name".

    Returns:
        The folder in the cache, which all functions take as a source.

    Raises:
        CheckpointError: there is no such model, no network, or no room.

    Example:
        >>> from lowmem_wanda import download
        >>> download("org/name")  # doctest: +SKIP
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if not NAME.fullmatch(name):
        raise CheckpointError(f"{name}: is not the name of a model on the Hugging Face Hub, such as org/name")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: cannot be downloaded ({said}); look at its name and the connection") from None
