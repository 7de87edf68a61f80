"""A directory of safetensors: which tensor lies where, and its bytes when they are asked for.

Needs numpy alone. The format (https://github.com/huggingface/safetensors#format): eight bytes of
little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors' bytes.
"""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.reader import Tensor, stamp
from lowmem_wanda.errors import CheckpointError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
QUANTIZED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
ITEMSIZE = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
ITEMSIZE |= dict.fromkeys(QUANTIZED, 1)
IN_BLOCK = re.compile(r"(^|\.)\d+\.")  # in the name of a tensor that lies in a block
MAX_HEADER = 100_000_000  # the limit of the safetensors library


class Checkpoint:
    """The tensors of a directory by name, every header checked, none of the data read.

    Raises CheckpointError, naming the file, for: no safetensors, a missing or truncated shard, a header
    that lies, an index that disagrees with its shards, a path that leaves the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """config.json. Raises CheckpointError where it is missing or no JSON object."""
        return read_json(self.path / CONFIG)

    def _weight_map(self) -> dict[str, str]:
        """{tensor: shard} of the index; empty where one file holds everything."""
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
                or not shard.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{INDEX}: puts tensor {name} in {shard!r}, which is no safetensors file of this directory"
                )
        if single.exists() and SINGLE not in weight_map.values():
            raise CheckpointError(
                f"{self.path}: holds both {SINGLE} and {INDEX}, so which counts is unclear; remove one"
            )
        return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises CheckpointError unless they fill it exactly, without overlap."""
    try:
        with open(file, "rb") as handle:
            size, _ = when = stamp(handle)
            (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file.name}: no safetensors header ({length} bytes of {size}); the file is truncated "
                    "or no safetensors"
                )
            header = json.loads(handle.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror}); download it to {file.parent}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: its header is no valid JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: its header is no JSON object; download it again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, name, entry, 8 + length, when) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file.name}: tensor {tensor.name} starts at byte {tensor.offset} instead of {end}; download it again"
            )
        end += tensor.nbytes
    if end != size:
        kind = "truncated" if size < end else "too long"
        raise CheckpointError(
            f"{file.name}: is {kind}, {size} bytes where its header promises {end}; download it again"
        )
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{file.name}: cannot be read in {file.parent} ({error.strerror}); download it too"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: no valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name}: no JSON object; download it again")
    return content


def _tensor(file: Path, name: str, entry: Any, data: int, when: tuple[int, int]) -> Tensor:
    """One header entry, checked; `data` is the byte at which the tensors start."""

    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if _naturals(*shape, start, stop):
            pass
        case _:
            raise CheckpointError(f"{file.name}: the header entry of tensor {name} is malformed; download it again")
    if dtype not in ITEMSIZE:
        raise CheckpointError(
            f"{file.name}: tensor {name} has dtype {dtype}, which is not read; get the unquantized (bf16, "
            "fp16, fp32) checkpoint"
        )
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if stop - start != nbytes:
        raise CheckpointError(
            f"{file.name}: tensor {name}, {dtype} {shape}, needs {nbytes} bytes but has "
            f"{stop - start}; download it again"
        )
    return Tensor(name, file, dtype, tuple(shape), data + start, nbytes, when)


def _naturals(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands in it twice")
    return content


def _what_instead(path: Path) -> str:
    """Why a directory without model.safetensors cannot be read."""
    names = sorted(file.name for file in path.iterdir())
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"holds {pickled[0]} but no safetensors, and pickled weights are never opened; "
            "get the safetensors, or convert with save_pretrained"
        )
    if other := [name for name in names if name.endswith(".safetensors")]:
        return f"holds {other[0]} but neither {SINGLE} nor {INDEX}; download the index or rename the single file"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds {gguf[0]}, and GGUF files are not read; get the safetensors that it was made of"
    return f"neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint"


def refuse_unprunable(checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
    """Raises CheckpointError for a quantized source and for one that brings code of its own."""
    config = checkpoint.config()
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        kind = kind.get("quant_method", "unknown") if isinstance(kind, dict) else kind
        raise CheckpointError(
            f"{CONFIG}: quantization_config says {kind}; prune the unquantized checkpoint and quantize after"
        )
    if config.get("auto_map") and not trust_remote_code:
        raise CheckpointError(
            f"{CONFIG}: auto_map names Python code of the checkpoint's own; read it, then give --trust-remote-code"
        )
    for tensor in checkpoint.tensors.values():
        packed = tensor.dtype not in FLOATS and len(tensor.shape) == 2 and "weight" in tensor.name.rsplit(".", 1)[-1]
        if tensor.dtype in QUANTIZED or packed:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is quantized ({tensor.dtype}); prune the "
                "unquantized checkpoint and quantize after"
            )
