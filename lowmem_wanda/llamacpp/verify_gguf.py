"""Proves by bytes that a GGUF is another one without some of its experts, and that nothing else differs."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.checksum import sha256_of
from lowmem_wanda.checkpoint.reader import PIECE, Tensor, opened
from lowmem_wanda.errors import CheckpointError
from lowmem_wanda.llamacpp.expert_layers import ExpertLayers, expert_layers
from lowmem_wanda.llamacpp.gguf_file import GGUF, PART, read_gguf
from lowmem_wanda.llamacpp.shrink import report_path

DESCRIPTION = "general.description"
NOTES = re.compile(
    r"( ?lowmem-wanda \S+ kept (\d+) of \d+ experts in each of \d+ layers, chosen by .+?; their bytes are unchanged\.)*"
)


@dataclass
class GGUFFindings:
    """What `check_gguf` found. The GGUF is the source without some experts if there are no `problems`.

    In each layer `experts_kept` of the source's `experts` were found; `kept` are {layer: their ids in the source}.
    `identical` tensors have the source's bytes, `cut` tensors have those of the kept experts.
    """

    experts: int
    experts_kept: int
    kept: dict[int, list[int]] = field(default_factory=dict)
    identical: int = 0
    cut: int = 0
    report_verified: bool = False
    problems: list[str] = field(default_factory=list)


def check_gguf(path: str | Path, against: str | Path) -> GGUFFindings:
    """Whether a GGUF holds the source's bytes of the experts that it kept, their rows of the router, and all the rest.

    The ids of the kept experts are found from the bytes. If `shrink` left a report beside the file, its ids and
    checksums are compared, too. Every tensor of both is read once, 16 MiB at a time, and no byte of the smaller one may
    lie outside its header and tensors but for padding.

    Args:
        path: the smaller GGUF; of a split one, the first file.
        against: the GGUF that it was made of.

    Returns:
        `GGUFFindings`. Its `problems` are empty if all is as it should be.

    Raises:
        CheckpointError: a file is not a whole GGUF.
        ModelError: a model has no experts, or experts in a form that is not supported.

    Example:
        >>> from lowmem_wanda import check_gguf
        >>> check_gguf("small.gguf", against="model.gguf").problems
        []
    """
    small, source = read_gguf(path), read_gguf(against)
    ours, theirs = expert_layers(small), expert_layers(source)
    findings = GGUFFindings(theirs.count, ours.count)
    _compare_metadata(small, source, findings)
    _require_padding(small, findings)
    for name in sorted(small.tensors.keys() ^ source.tensors.keys()):
        findings.problems.append(f"{name}: is missing in {small.path if name in source.tensors else source.path}")
    if ours.layers.keys() != theirs.layers.keys() or ours.count > theirs.count:
        findings.problems.append(f"{small.path}: its experts are not some of those of {source.path}")
        return findings
    for name, tensor in small.tensors.items():
        if name not in theirs.tensors and (other := source.tensors.get(name)) is not None:
            same = (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
            if same and all(mine == its for mine, its in zip(tensor.pieces(), other.pieces(), strict=True)):
                findings.identical += 1
            else:
                findings.problems.append(f"{name}: is not the source's")
    report = _Report.beside(small, theirs.count)
    for block, names in theirs.layers.items():
        pairs = [(small.tensors[name], source.tensors[name]) for name in names if name in small.tensors]
        findings.kept[block] = _kept_of(block, pairs, theirs, report.kept.get(block, ()) if report else (), findings)
        findings.cut += len(pairs)
        _require_groups(block, findings.kept[block], theirs, findings)
    if report:
        _compare_report(report, small, findings)
    return findings


def _compare_metadata(small: GGUF, source: GGUF, findings: GGUFFindings) -> None:
    """Every key must be the source's, except the number of experts and what `shrink` adds to the description."""
    count = f"{source.text('general.architecture')}.expert_count"
    for key in sorted(small.fields.keys() | source.fields.keys()):
        mine, its = small.fields.get(key), source.fields.get(key)
        noted = key == DESCRIPTION and mine is not None and _noted(small.text(key), source.text(key), findings)
        if mine != its and not noted and not (key == count and mine is not None):
            findings.problems.append(f"{key}: is not the source's")
    if (small.version, small.alignment) != (source.version, source.alignment):
        findings.problems.append(
            f"{small.path}: is version {small.version}, aligned to {small.alignment} bytes, the source is "
            f"{source.version} and {source.alignment}"
        )


def _noted(mine: str, its: str, findings: GGUFFindings) -> bool:
    """Whether a description is the source's with notes of `shrink`, the last of which gives these numbers."""
    notes = NOTES.fullmatch(mine.removeprefix(its)) if mine.startswith(its) else None
    return notes is not None and notes[2] in (None, str(findings.experts_kept))


def _require_padding(small: GGUF, findings: GGUFFindings) -> None:
    """Between header and tensors, between tensors and after them there may be nothing but zeros for the alignment."""
    for file, header in zip(small.files, small.headers, strict=True):
        tensors = sorted((one for one in small.tensors.values() if one.file == file), key=lambda one: one.offset)
        starts = [header, *(one.offset + one.nbytes for one in tensors)]
        with opened(file) as content:
            ends = [*(one.offset for one in tensors), content.seek(0, 2)]
            for start, end in zip(starts, ends, strict=True):
                content.seek(start)
                if end - start >= small.alignment or any(content.read(end - start)):
                    findings.problems.append(f"{file.name}: bytes {start} to {end} belong to no tensor")


def _kept_of(
    block: int,
    pairs: Sequence[tuple[Tensor, Tensor]],
    source: ExpertLayers,
    said: Sequence[int],
    findings: GGUFFindings,
) -> list[int]:
    """The source's ids of the experts of a layer; what is no expert of the source becomes a problem, and -1.

    `said` are the ids that a report gives, which are taken where the bytes agree: experts may be alike.
    """
    for mine, its in pairs:
        if (mine.dtype, mine.shape[1:]) != (its.dtype, its.shape[1:]):
            findings.problems.append(
                f"{mine.name}: is {mine.dtype} {list(mine.shape)}, the source's {its.dtype} {list(its.shape)}"
            )
            return []
    ours, theirs = (list(zip(*(list(_digests(pair[at])) for pair in pairs), strict=True)) for at in (0, 1))
    if len(said) == len(ours) and all(theirs[id_] == mine for id_, mine in zip(said, ours, strict=True)):
        return list(said)
    alike = defaultdict(list)
    for id_, digests in enumerate(theirs):
        alike[digests].append(id_)
    size, each = source.count // source.groups, max(1, len(ours) // source.groups)
    kept: list[int] = []
    for place, digests in enumerate(ours):
        unused = [id_ for id_ in alike.get(digests, ()) if id_ not in kept]
        unused.sort(key=lambda id_: id_ // size != place // each)  # its own group first
        kept.append(unused[0] if unused else -1)
        if not unused:
            findings.problems.append(_unknown(block, place, digests, theirs, [mine.name for mine, _ in pairs]))
    return kept


def _unknown(
    block: int, place: int, digests: Sequence[bytes], theirs: Sequence[Sequence[bytes]], names: Sequence[str]
) -> str:
    """What is wrong with an expert that is none of the source's, or one of them twice."""
    votes = Counter({id_: sum(map(bytes.__eq__, digests, its)) for id_, its in enumerate(theirs)})
    likely, count = votes.most_common(1)[0]
    if count == len(names):
        return f"blk.{block}: expert {place} is the source's {likely} once more"
    if not count:
        return f"blk.{block}: expert {place} is none of the source's"
    wrong = next(name for name, mine, its in zip(names, digests, theirs[likely], strict=True) if mine != its)
    return f"{wrong}: expert {place} is not the source's {likely}, as other tensors say"


def _digests(tensor: Tensor) -> Iterator[bytes]:
    """Yields the checksum of each expert's slice."""
    size = tensor.nbytes // tensor.shape[0]
    pieces = tensor.pieces(min(PIECE, size), [(at, at + size) for at in range(0, tensor.nbytes, size)])
    for _ in range(tensor.shape[0]):
        digest, left = hashlib.sha256(), size
        while left:
            piece = next(pieces)
            digest.update(piece)
            left -= len(piece)
        yield digest.digest()


def _require_groups(block: int, kept: Sequence[int], source: ExpertLayers, findings: GGUFFindings) -> None:
    """Every group of the source must have kept as many experts, in its place."""
    if source.groups > 1 and kept and min(kept) >= 0:
        size, each = source.count // source.groups, len(kept) / source.groups
        if any(id_ // size != int(place // each) for place, id_ in enumerate(kept)):
            findings.problems.append(
                f"blk.{block}: its experts are not those of the source's groups, equally many of each"
            )


@dataclass(frozen=True)
class _Report:
    """What the report beside a shrunk GGUF says: {layer: kept ids} and the checksums of the files."""

    path: Path
    kept: Mapping[int, list[int]]
    sums: Sequence[str]

    @classmethod
    def beside(cls, small: GGUF, count: int) -> "_Report | None":
        """The report of a GGUF, if there is one; it has no ids if its source did not have `count` experts.

        Raises CheckpointError if it is damaged.
        """
        path = next((file for file in map(report_path, _names(small.path)) if file.is_file()), None)
        if path is None:
            return None
        try:
            report: Any = json.loads(path.read_bytes())
            kept = {int(layer["layer"]): [int(one) for one in layer["kept"]] for layer in report["layers"]}
            whole = report["experts"]["before"] == count  # else it is a cut of a cut
            within = whole and all(0 <= one < count for ids in kept.values() for one in ids)
            return cls(path, kept if within else {}, [str(file["sha256"]) for file in report["files"]])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is damaged ({str(error)[:100]}); remove it to check without it") from None


def _compare_report(report: _Report, small: GGUF, findings: GGUFFindings) -> None:
    """Compares the kept ids and the checksums with those of the report; files may have been renamed."""
    for block in sorted(report.kept.keys() | findings.kept.keys() if report.kept else ()):
        if report.kept.get(block) != findings.kept.get(block):
            findings.problems.append(f"blk.{block}: does not hold the experts that {report.path.name} says it kept")
    if len(report.sums) != len(small.files):
        findings.problems.append(
            f"{small.path.name}: is {len(small.files)} files, {report.path.name} has {len(report.sums)}"
        )
    for file, said in zip(small.files, report.sums, strict=False):
        if said != sha256_of(file):
            findings.problems.append(f"{file.name}: is not the file whose checksum {report.path.name} gives")
    findings.report_verified = True


def _names(path: Path) -> Iterator[Path]:
    """A GGUF's name, and that without its part, by which `shrink` was called."""
    yield path
    if match := PART.fullmatch(path.name):
        yield path.with_name(f"{match[1]}.gguf")
