"""A checkpoint's directory: which tensor lies in which safetensors file, and the small files beside them."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.cache import locate
from lowmem_wanda.checkpoint.companions import ADAPTER, differing, pieces_of, require_files
from lowmem_wanda.checkpoint.quantized import KINDS, dequantized, kind_of
from lowmem_wanda.checkpoint.reader import FLOATS, QUANTIZED, Tensor, advise, opened, read_header, read_json
from lowmem_wanda.errors import CheckpointError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
WHOLE = 256 << 20  # bytes; the fingerprint of a larger source is made of samples
STEP, SAMPLE = 4 << 20, 64 << 10  # bytes: of each step of a large source, a sample is read


class Checkpoint:
    """The tensors of a directory of safetensors by name: every header is checked, no data is read.

    `tensors` is {name: tensor}; a tensor has its name, dtype ("BF16"), shape, file, and place in that file. `path` is
    the directory, `files` are its safetensors files in the order of their names.

    Args:
        path: the folder of a Hugging Face checkpoint, with model.safetensors or with several shards and their index; or
            "org/name" of a model in the local Hugging Face cache.
        dequantize: read what is quantized, as fp8 with block scales or MXFP4, as bfloat16 (default: False). Then
            `dequantized` is True if something is.

    Raises:
        CheckpointError: the folder holds no safetensors, a shard is missing or truncated, a header is wrong, the index
            disagrees with its shards, or it names a file outside the folder. The message names the file.

    Example:
        >>> from lowmem_wanda import Checkpoint
        >>> Checkpoint("source").tensors["model.norm.weight"].shape
        (128,)
    """

    def __init__(self, path: str | Path, dequantize: bool = False) -> None:
        self.path, self.dequantized = locate(path), False
        if self.path.is_file():
            raise CheckpointError(
                f"{path}: is a file; give the folder of a safetensors checkpoint (`shrink`, `plan` and `check` take "
                "the file of a GGUF)"
            )
        if not self.path.is_dir():
            raise CheckpointError(f"{path}: no such directory; give the folder that a checkpoint was downloaded to")
        weight_map = self._weight_map()
        self.files = [self.path / name for name in sorted(set(weight_map.values()) or {SINGLE})]
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            for name, tensor in read_header(file).items():
                if weight_map and weight_map.get(name) != file.name:
                    where = f"says {weight_map[name]}" if name in weight_map else "does not list it"
                    raise CheckpointError(f"{file.name}: holds tensor {name}, but {INDEX} {where}; download both again")
                self.tensors[name] = tensor
        for name, shard in weight_map.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{INDEX}: lists tensor {name} in {shard}, which does not hold it; download both again"
                )
        if not self.tensors:
            raise CheckpointError(f"{self.path}: its safetensors hold no tensor; download the checkpoint again")
        self.dequantized = dequantize and bool(kind_of(self.config()))
        if self.dequantized:
            self.tensors = dequantized(self.tensors, read_json(self.path / CONFIG))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """The content of config.json, without what it says of quantization where that is undone.

        Raises CheckpointError if the file is missing or not a JSON object.
        """
        content = read_json(self.path / CONFIG)
        if self.dequantized:
            del content["quantization_config"]
        return content

    def written_config(self) -> bytes | None:
        """The config.json that is written beside its tensors; None where it is a copy."""
        if not self.dequantized:
            return None
        return (json.dumps(self.config(), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    def differing(self, files: Collection[Path], target: Path) -> list[Path]:
        """Those of its small files that are missing in `target`, or are not what is written of them."""
        config, changed = self.written_config(), Path(CONFIG)
        if config is None or changed not in files:
            return differing(files, self.path, target)
        found = differing((file for file in files if file != changed), self.path, target)
        if not ((target / CONFIG).is_file() and read_json(target / CONFIG) == self.config()):
            found.append(changed)
        return found

    def _weight_map(self) -> dict[str, str]:
        """{tensor: shard} of the index; {} if one file holds everything. Raises CheckpointError."""
        single, index = self.path / SINGLE, self.path / INDEX
        if not index.exists():
            if not single.exists():
                raise CheckpointError(f"{self.path}: {_what_instead(self.path)}")
            return {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX}: has no weight_map; download it again")
        for name, shard in weight_map.items():
            if (
                not isinstance(shard, str)
                or Path(shard).name != shard
                or "\\" in shard
                or "\0" in shard
                or not shard.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{INDEX}: puts tensor {name} in {shard!r}, which is not a safetensors file of this directory; put "
                    "all shards beside the index, and their names alone into it"
                )
        if single.exists() and SINGLE not in weight_map.values():
            raise CheckpointError(
                f"{self.path}: holds both {SINGLE} and {INDEX}, so it is unclear which one counts; remove one"
            )
        return weight_map


def _what_instead(path: Path) -> str:
    """The part of a message that says what a directory without model.safetensors holds, and the next move."""
    names = sorted(file.name for file in path.iterdir())
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"holds {pickled[0]} but no safetensors, and pickled weights are never opened; "
            "get the safetensors, or convert with save_pretrained"
        )
    if any(name.startswith("adapter_") for name in names):
        return f"holds an adapter{_base(path)}, not a model; merge it (peft: merge_and_unload) and give the result"
    if native := [name for name in names if name.startswith("consolidated") or name == "params.json"]:
        return (
            f"holds {native[0]}, the vendor's own format; get the model in Hugging Face's format (config.json and "
            f"{SINGLE}, or shards with an index)"
        )
    if other := [name for name in names if name.endswith(".safetensors")]:
        return f"holds {other[0]} but neither {SINGLE} nor {INDEX}; download the index or rename the single file"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds {gguf[0]} but no safetensors; give that file itself to `shrink`, or get what it was made of"
    return f"neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint"


def _base(path: Path) -> str:
    """The words that name the model which an adapter belongs to, as far as the adapter says it."""
    try:
        base = read_json(path / ADAPTER).get("base_model_name_or_path")
    except CheckpointError:
        return ""
    return f" of {base[:100]}" if isinstance(base, str) and base else ""


def require_prunable(checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
    """Raises CheckpointError for a quantized source, and for one with Python code of its own that is not trusted."""
    require_files(checkpoint.path)
    config = checkpoint.config()
    require_trust(checkpoint, trust_remote_code)
    with opened(checkpoint.path / CONFIG) as file:
        if file.read(3) == b"\xef\xbb\xbf":
            raise CheckpointError(
                f"{CONFIG}: begins with a byte order mark, which transformers does not read; save it without"
            )
    if kind := kind_of(config):
        move = "prune the unquantized checkpoint and quantize after"
        move = f"give --dequantize to read it as bfloat16, or {move}" if kind in KINDS else move
        raise CheckpointError(f"{CONFIG}: quantization_config says {kind}; {move}")
    for tensor in checkpoint.tensors.values():
        packed = tensor.dtype not in FLOATS and len(tensor.shape) == 2 and "weight" in tensor.name.rsplit(".", 1)[-1]
        if checkpoint.dequantized and tensor.dtype in QUANTIZED:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype}, and no tensor {tensor.name}_scale_inv "
                "has its scales; download it again, or get or make the bf16 checkpoint"
            )
        if tensor.dtype in QUANTIZED or packed:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is quantized ({tensor.dtype}); prune the "
                "unquantized checkpoint and quantize after"
            )


def require_trust(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Raises CheckpointError for a checkpoint with Python code of its own that is not trusted."""
    if checkpoint.config().get("auto_map") and not trust_remote_code:
        raise CheckpointError(
            f"{CONFIG}: auto_map names Python code of the checkpoint's own; read it, then give --trust-remote-code"
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """The SHA-256 in hex of config.json and the shards.

    Shards of at most 256 MiB together are read whole. Of larger ones, 64 KiB of every 4 MiB are read (`seen_share`).
    """
    digest = hashlib.sha256(b"".join(pieces_of(checkpoint.path / CONFIG)))
    sizes = {file: file.stat().st_size for file in checkpoint.files}
    step, length = (STEP, STEP) if sum(sizes.values()) <= WHOLE else (STEP, SAMPLE)
    for file, size in sizes.items():
        digest.update(f"{file.name} {size}".encode())
        with opened(file) as handle:
            if length < step:
                advise(handle, 0, 0, "RANDOM")  # else the system reads what lies behind each sample, too
            for start in range(0, size, step):
                handle.seek(start)
                digest.update(handle.read(length))
    return digest.hexdigest()


def seen_share(checkpoint: Checkpoint) -> float:
    """The share of the shards' bytes that `fingerprint` reads, by which another run of a job knows its source again."""
    return 1.0 if sum(file.stat().st_size for file in checkpoint.files) <= WHOLE else SAMPLE / STEP
