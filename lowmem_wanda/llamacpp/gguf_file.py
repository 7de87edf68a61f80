"""Reads and writes GGUF files by bytes: metadata as it stands, and the place of every tensor.

A file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) has a header (magic, version, counts), keys with
values, the names, dimensions, types and offsets of the tensors, and their bytes, each tensor aligned. The gguf package
makes Python objects of every element of an array; here the bytes of a value stay as they are, so that a tokenizer of
150,000 tokens is read and written in a moment. What llama.cpp does not load, such as gaps between tensors, is refused.
"""

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowmem_wanda.checkpoint.reader import Tensor, opened, stamp
from lowmem_wanda.errors import CheckpointError
from lowmem_wanda.llamacpp.gguf_values import NUMBERS, STRING, WHOLE, Cursor, Field
from lowmem_wanda.llamacpp.names import package

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where general.alignment does not say otherwise
MAX_DIMENSIONS = 4
REMOVED = (4, 5, 31, 32, 33, 36, 37, 38)  # numbers of types (ggml.h): Q4_2, Q4_3, Q4_0_4_4 and alike, IQ4_NL_4_4
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUF:
    """A GGUF, in one file or several.

    `fields` are {key: value} of the first file without those that say how it is split. `tensors` are {name: tensor} in
    the order of the files; a tensor's `dtype` is the name of its type, such as Q4_K, and its `shape` has the outermost
    dimension first, so that a stack of experts is (experts, outputs, inputs). `nbytes` are those of all files,
    `headers` those of each file's header without the padding after it.
    """

    path: Path
    files: tuple[Path, ...]
    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, Tensor]
    nbytes: int
    headers: tuple[int, ...]

    def text(self, key: str) -> str:
        """The string of a key; "" where there is none. Raises CheckpointError for another type."""
        field = self.fields.get(key)
        if field is None:
            return ""
        if field.kind != STRING:
            raise CheckpointError(f"{self.path}: {key} is not a string; download the file again")
        return str(field.value)

    def number(self, key: str, default: int = 0) -> int:
        """The whole number of a key. Raises CheckpointError for a value of another type."""
        field = self.fields.get(key)
        if field is None:
            return default
        if NUMBERS.get(field.kind, "?") not in WHOLE:
            raise CheckpointError(f"{self.path}: {key} is not one whole number, which is not supported")
        return int(field.value)


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF: it ends in .gguf, or is a file that begins as one.

    Example:
        >>> from lowmem_wanda import is_gguf
        >>> is_gguf("model.gguf")
        True
    """
    path = Path(path)
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with opened(path) as file:
        return file.read(4) == MAGIC


def read_gguf(path: str | Path) -> GGUF:
    """The GGUF of a file, or of all files whose first is given. Raises CheckpointError for anything else."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give a .gguf file, of a split one the first")
    first, split = _read_part(path)
    count = split.get("split.count", 1)
    if count <= 1:
        return first
    match = PART.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf; rename it back"
        )
    if split.get("split.no", 0):
        raise CheckpointError(f"{path}: is not the first part; give {part_name(path, 0, count)}")
    parts = [first]
    for index in range(1, count):
        file = path.with_name(part_name(path, index, count))
        part, said = _read_part(file)
        if (said.get("split.no"), said.get("split.count")) != (index, count):
            raise CheckpointError(f"{file}: is not part {index + 1} of {count} of {path.name}; download it again")
        parts.append(part)
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    held = sum(len(part.tensors) for part in parts)
    if len(tensors) != held or split.get("split.tensors.count", held) != held:
        raise CheckpointError(f"{path}: its {count} parts do not hold each tensor once; download them again")
    return replace(
        first,
        files=tuple(part.path for part in parts),
        tensors=tensors,
        nbytes=sum(part.nbytes for part in parts),
        headers=tuple(part.headers[0] for part in parts),
    )


def mapped(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's rows, uint8 (rows, bytes of a row), which stay in the file until they are used."""
    rows = math.prod(tensor.shape[:-1])
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))


def part_name(path: Path, index: int, count: int) -> str:
    """The file name of part `index`, counted from 0, of a GGUF in `count` files, as llama.cpp looks for it."""
    match = PART.fullmatch(path.name)
    stem = match[1] if match else path.name.removesuffix(".gguf")
    return f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def header_of(fields: Mapping[str, Field], tensors: Iterable[Tensor], version: int, alignment: int) -> bytes:
    """All of a file before its tensors' bytes; each begins at the first multiple of `alignment` after the last one."""
    kinds = package("writing a GGUF").GGMLQuantizationType
    entries, end, count = [], 0, 0
    for tensor in tensors:
        name = tensor.name.encode()
        dims = tensor.shape[::-1]
        place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kinds[tensor.dtype], end)
        entries.append(struct.pack("<Q", len(name)) + name + place)
        end, count = padded(end + tensor.nbytes, alignment), count + 1
    head = MAGIC + struct.pack("<IQQ", version, count, len(fields))
    keys = [
        struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<I", field.kind) + field.raw
        for key, field in fields.items()
    ]
    content = head + b"".join(keys) + b"".join(entries)
    return content.ljust(padded(len(content), alignment), b"\0")


def padded(nbytes: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def _read_part(path: Path) -> tuple[GGUF, dict[str, int]]:
    """The GGUF of one file, and the numbers that say which part of a split one it is."""
    gguf = package("reading a GGUF file")
    with opened(path) as file:
        try:
            return _parsed(path, file, gguf)
        except (ValueError, struct.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path}: is not a whole GGUF file ({str(error)[:200]}); download it again") from None


def _parsed(path: Path, file: BinaryIO, gguf: Any) -> tuple[GGUF, dict[str, int]]:
    """`_read_part` of an open file. Raises ValueError, which says what is wrong."""
    when = stamp(file)
    cursor = Cursor(file.read, when[0])
    magic, version = cursor.taken(4), cursor.unpacked("I")
    if magic != MAGIC:
        raise ValueError("it does not begin with GGUF")
    if version not in VERSIONS:
        raise CheckpointError(f"{path}: {_other_version(version)}")
    tensor_count, field_count = cursor.unpacked("Q"), cursor.unpacked("Q")
    fields: dict[str, Field] = {}
    for _ in range(field_count):
        key = cursor.string()
        kind = cursor.unpacked("I")
        if key in fields:
            raise ValueError(f"{key} stands in it twice")
        fields[key] = Field(kind, cursor.skipped(kind))
    whole = {key: int(field.value) for key, field in fields.items() if NUMBERS.get(field.kind, "?") in WHOLE}
    alignment = whole.get("general.alignment", ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1) or ("general.alignment" in fields) > ("general.alignment" in whole):
        raise ValueError("its alignment is not a power of two")
    entries = [_entry(cursor, gguf) for _ in range(tensor_count)]
    header = cursor.at
    tensors = _placed(path, entries, padded(header, alignment), alignment, when)
    split = {key: number for key, number in whole.items() if key.startswith("split.")}
    kept = {key: field for key, field in fields.items() if not key.startswith("split.")}
    return GGUF(path, (path,), version, alignment, kept, tensors, when[0], (header,)), split


def _other_version(version: int) -> str:
    """Why a version is not read, and what to do."""
    if version in [int.from_bytes(one.to_bytes(4, "little"), "big") for one in VERSIONS]:
        return "is big-endian, which is not read; get the little-endian file"
    if version < min(VERSIONS):
        return f"is GGUF version {version}, of 2023; convert the model again with a llama.cpp of today"
    return f"is GGUF version {version}, which is not read; download it again, or use a newer lowmem-wanda"


def _entry(cursor: "Cursor", gguf: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape (outermost first), bytes and offset of one tensor."""
    name, dimensions = cursor.string(), cursor.unpacked("I")
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    dims = [cursor.unpacked("Q") for _ in range(dimensions)]
    number, offset = cursor.unpacked("I"), cursor.unpacked("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        move = (
            "llama.cpp has removed it: get the model in another quantization"
            if number in REMOVED
            else "pip install --upgrade gguf"
        )
        raise CheckpointError(
            f"tensor {name}: is of type {number}, which the gguf package does not know; {move}"
        ) from None
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if min(dims) < 1 or dims[0] % block:
        raise ValueError(f"tensor {name} is {dims}, which {kind.name} cannot be")
    return name, kind.name, tuple(reversed(dims)), math.prod(dims) // block * nbytes, offset


def _placed(path: Path, entries: Sequence[Any], start: int, alignment: int, when: tuple[int, ...]) -> dict[str, Tensor]:
    """{name: tensor}; each must begin where llama.cpp expects it, and the file must hold them all."""
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, kind, shape, nbytes, offset in entries:
        if name in tensors:
            raise ValueError(f"tensor {name} stands in it twice")
        if offset != padded(end, alignment):
            raise ValueError(f"tensor {name} begins at byte {offset} instead of {padded(end, alignment)}")
        end = offset + nbytes
        if start + end > when[0]:
            raise ValueError(f"it has {when[0]} bytes, and tensor {name} ends at byte {start + end}")
        tensors[name] = Tensor(name, path, kind, shape, start + offset, nbytes, when)
    return tensors
