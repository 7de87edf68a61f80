"""Writes a GGUF with fewer experts: slices of tensors are copied byte for byte, in one file or in several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.checkpoint.writer import COPIED_PIECE, Growing, ShardFile, replacing
from lowmem_wanda.errors import OutputError
from lowmem_wanda.llamacpp.gguf_file import GGUF, header_of, padded, part_name
from lowmem_wanda.llamacpp.gguf_values import I32, U16, Field

MOST_PARTS = 9999
Stacks = Mapping[str, int]  # {name of a tensor that has a slice for each expert: number of its block}


@dataclass(frozen=True)
class Part:
    """A file to write: its path, its header, its tensors in their new shapes, and its size in bytes."""

    path: Path
    header: bytes
    tensors: tuple[Tensor, ...]
    nbytes: int


@dataclass(frozen=True)
class Copy:
    """A GGUF to write without some experts: its files, the source, and which of the source's tensors are cut."""

    parts: Sequence[Part]
    source: GGUF
    stacks: Stacks

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(part.nbytes for part in self.parts)


def copy_of(
    target: Path, source: GGUF, fields: Mapping[str, Field], stacks: Stacks, keep: int, split_size: int | None = None
) -> Copy:
    """The GGUF with `keep` experts in each of the `stacks`, in files of at most `split_size` bytes (None: one file).

    `fields` are its metadata. Raises OutputError if one tensor alone is larger than that.
    """
    tensors = [_cut(tensor, keep) if tensor.name in stacks else tensor for tensor in source.tensors.values()]
    return Copy(_parts(target, source, fields, tensors, split_size), source, stacks)


def _parts(
    target: Path, source: GGUF, fields: Mapping[str, Field], tensors: Sequence[Tensor], split_size: int | None
) -> list[Part]:
    """The files of a GGUF whose tensors have their new shapes."""
    whole = _part(target, source, fields, tensors)
    if split_size is None or whole.nbytes <= split_size:
        return [whole]
    later = {key: field for key, field in fields.items() if key == "general.alignment"}  # as llama.cpp: no other
    groups = _grouped(tensors, split_size, source.alignment, _metadata_bytes(fields), _metadata_bytes(later))
    if len(groups) > MOST_PARTS:
        raise OutputError(f"--split-size {split_size}: would make {len(groups)} files; give a larger size")
    parts = []
    for index, group in enumerate(groups):
        place = _place(index, len(groups), len(tensors))
        path = target.with_name(part_name(target, index, len(groups)))
        parts.append(_part(path, source, {**(later if index else fields), **place}, group))
    if (largest := max(part.nbytes for part in parts)) > split_size:
        raise OutputError(
            f"--split-size {split_size}: one tensor with its header takes {largest} bytes; give at least that"
        )
    return parts


def _place(index: int, count: int, tensors: int) -> dict[str, Field]:
    """What a part says of its place among `count` parts, which hold so many tensors in all."""
    return {
        "split.no": Field.number(U16, index),
        "split.count": Field.number(U16, count),
        "split.tensors.count": Field.number(I32, tensors),
    }


def write_copy(
    stack: ExitStack, copy: Copy, kept: Callable[[int], tuple[int, ...]], moved: Callable[[int], None]
) -> Callable[[], list[ShardFile]]:
    """Writes the files under temporary names; they appear when the stack closes without an error, the first at last.

    `kept` gives the ids that a block keeps, in ascending order, when they are needed. `moved` is called with the bytes
    of each piece. Gives a function for the names, sizes and checksums.
    """
    files: list[Growing] = []
    for part in copy.parts:
        file = stack.enter_context(replacing(part.path, part.nbytes))
        files.append(file)
        file.write(part.header)
        for tensor in part.tensors:
            block = copy.stacks.get(tensor.name)
            for piece in _pieces(copy.source.tensors[tensor.name], None if block is None else kept(block)):
                file.write(piece)
                moved(len(piece))
            file.write(bytes(padded(file.size, copy.source.alignment) - file.size))
        if file.size != part.nbytes:
            raise OutputError(f"{part.path}: {file.size} bytes were written instead of {part.nbytes}; report this bug")
    return lambda: [
        ShardFile(part.path.name, file.size, {"sha256": file.digest.hexdigest()})
        for part, file in zip(copy.parts, files, strict=True)
    ]


def _cut(tensor: Tensor, keep: int) -> Tensor:
    """A stack in its new shape; its place stays that in the source."""
    return replace(tensor, shape=(keep, *tensor.shape[1:]), nbytes=tensor.nbytes // tensor.shape[0] * keep)


def _part(path: Path, source: GGUF, fields: Mapping[str, Field], tensors: Sequence[Tensor]) -> Part:
    header = header_of(fields, tensors, source.version, source.alignment)
    data = sum(padded(tensor.nbytes, source.alignment) for tensor in tensors)
    return Part(path, header, tuple(tensors), len(header) + data)


def _grouped(tensors: Sequence[Tensor], most: int, alignment: int, first: int, later: int) -> list[list[Tensor]]:
    """The tensors of each part in their order; `first` and `later` are the bytes of metadata in a part."""
    groups: list[list[Tensor]] = [[]]
    header, data = first, 0
    for tensor in tensors:
        entry = 24 + len(tensor.name.encode()) + 8 * len(tensor.shape)
        nbytes = padded(tensor.nbytes, alignment)
        if groups[-1] and padded(header + entry, alignment) + data + nbytes > most:
            groups.append([])
            header, data = later, 0
        groups[-1].append(tensor)
        header, data = header + entry, data + nbytes
    return groups


def _metadata_bytes(fields: Mapping[str, Field]) -> int:
    """The bytes of a part's header beside the entries of its tensors: magic, counts, fields, and the part's place."""
    return len(header_of({**fields, **_place(0, 0, 0)}, (), 0, 1))


def _pieces(tensor: Tensor, ids: Sequence[int] | None) -> Iterator[bytearray]:
    """Yields the bytes of a tensor, or of some slices of it."""
    if ids is None:
        return tensor.pieces(COPIED_PIECE)
    size = tensor.nbytes // tensor.shape[0]
    ends = [place for place, (one, other) in enumerate(pairwise(ids), 1) if other != one + 1]
    runs = zip([0, *ends], [*ends, len(ids)], strict=True)
    return tensor.pieces(COPIED_PIECE, [(ids[start] * size, (ids[stop - 1] + 1) * size) for start, stop in runs])
