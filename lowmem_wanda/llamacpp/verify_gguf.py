"""Proves by bytes that a GGUF is another one without some of its experts, and that nothing else differs."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.reader import PIECE, Tensor
from lowmem_wanda.checkpoint.writer import sha256_of
from lowmem_wanda.errors import CheckpointError
from lowmem_wanda.llamacpp.expert_layers import ExpertLayers, expert_layers
from lowmem_wanda.llamacpp.gguf_file import GGUF, PART, read_gguf
from lowmem_wanda.llamacpp.shrink import report_path

NOTE = "general.description"


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
    checksums are compared, too. Every tensor of both is read once, 16 MiB at a time.

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
    cut = ours.tensors.keys() & theirs.tensors.keys()
    for name in sorted(small.tensors.keys() ^ source.tensors.keys()):
        findings.problems.append(f"{name}: is missing in {small.path if name in source.tensors else source.path}")
    if ours.layers.keys() != theirs.layers.keys() or ours.count > theirs.count:
        findings.problems.append(f"{small.path}: its experts are not some of those of {source.path}")
        return findings
    for name, tensor in small.tensors.items():
        if name not in cut and (other := source.tensors.get(name)) is not None:
            same = (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
            if same and all(mine == its for mine, its in zip(tensor.pieces(), other.pieces(), strict=True)):
                findings.identical += 1
            else:
                findings.problems.append(f"{name}: is not the source's")
    for block, names in ours.layers.items():
        pairs = [(small.tensors[name], source.tensors[name]) for name in names if name in cut]
        findings.kept[block] = _kept_of(block, pairs, findings)
        findings.cut += len(pairs)
        _require_groups(block, findings.kept[block], theirs, findings)
    _compare_report(small, findings)
    return findings


def _compare_metadata(small: GGUF, source: GGUF, findings: GGUFFindings) -> None:
    """Every key must be the source's, except the number of experts and what is added to the description."""
    count = f"{source.text('general.architecture')}.expert_count"
    for key in sorted(small.fields.keys() | source.fields.keys()):
        mine, its = small.fields.get(key), source.fields.get(key)
        noted = key == NOTE and mine is not None and small.text(key).startswith(source.text(key))
        if mine != its and not noted and not (key == count and mine is not None):
            findings.problems.append(f"{key}: is not the source's")


def _kept_of(block: int, pairs: Sequence[tuple[Tensor, Tensor]], findings: GGUFFindings) -> list[int]:
    """The source's ids of the experts of a layer; what is no expert of the source becomes a problem, and -1."""
    for mine, its in pairs:
        if (mine.dtype, mine.shape[1:]) != (its.dtype, its.shape[1:]):
            findings.problems.append(
                f"{mine.name}: is {mine.dtype} {list(mine.shape)}, the source's {its.dtype} {list(its.shape)}"
            )
            return []
    sums = [(mine.name, list(_digests(mine)), list(_digests(its))) for mine, its in pairs]
    kept: list[int] = []
    for expert in range(pairs[0][0].shape[0]):
        votes = Counter(id_ for _, mine, its in sums for id_, digest in enumerate(its) if digest == mine[expert])
        whole = [id_ for id_, count in sorted(votes.items()) if count == len(sums)]
        unused = [id_ for id_ in whole if id_ not in kept]
        kept.append(unused[0] if unused else -1)
        if whole and not unused:
            findings.problems.append(f"blk.{block}: expert {expert} is the source's {whole[0]} once more")
        elif not whole and not votes:
            findings.problems.append(f"blk.{block}: expert {expert} is none of the source's")
        elif not whole:
            likely = votes.most_common(1)[0][0]
            wrong = next(name for name, mine, its in sums if mine[expert] != its[likely])
            findings.problems.append(f"{wrong}: expert {expert} is not the source's {likely}, as other tensors say")
    return kept


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


def _compare_report(small: GGUF, findings: GGUFFindings) -> None:
    """Compares the kept ids and the checksums with the report beside the file, if there is one."""
    path = next((file for file in map(report_path, _names(small.path)) if file.is_file()), None)
    if path is None:
        return
    try:
        report: Any = json.loads(path.read_bytes())
        said = {int(layer["layer"]): layer["kept"] for layer in report["layers"]}
        before = report["experts"]["before"]
        sums = {file["name"]: file["sha256"] for file in report["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({str(error)[:100]}); remove it to check without it") from None
    known = said.keys() | findings.kept.keys() if before == findings.experts else ()  # else it is a cut of a cut
    for block in sorted(known):
        if said.get(block) != findings.kept.get(block):
            findings.problems.append(f"blk.{block}: does not hold the experts that {path.name} says it kept")
    for file in small.files:
        if sums.get(file.name) != sha256_of(file):
            findings.problems.append(f"{file.name}: is not the file whose checksum {path.name} gives")
    findings.report_verified = True


def _names(path: Path) -> Iterator[Path]:
    """A GGUF's name, and that without its part, by which `shrink` was called."""
    yield path
    if match := PART.fullmatch(path.name):
        yield path.with_name(f"{match[1]}.gguf")
