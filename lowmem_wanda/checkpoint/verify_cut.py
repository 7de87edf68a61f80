"""Proves by bytes that a checkpoint is another one without some of its experts.

Which experts each layer keeps is what report.json says; that its tensors are then the source's is found from their
names, shapes and bytes alone, without torch, transformers or the code that made them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.companions import REPORT, companions, differing
from lowmem_wanda.checkpoint.cut import MEMBER, cut, renamed, stem_of
from lowmem_wanda.checkpoint.directory import CONFIG, Checkpoint
from lowmem_wanda.checkpoint.pruned import differing_values
from lowmem_wanda.checkpoint.reader import Tensor, nonfinite
from lowmem_wanda.errors import CheckpointError

OF_EXPERTS = re.compile(r"\bexperts\.|block_sparse_moe\.")  # in the names of what a refit may change


class Removal:
    """What the report of a removal says of it.

    `kept` are {how the names of a layer's tensors begin, up to its number: ids that it keeps}, of `count` experts in
    each. `moved` are tensors of experts whose values are no longer the source's, and `without` those that were left out
    with layers that predict further tokens.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        try:
            self.kept = {str(layer["stem"]): tuple(map(int, layer["kept"])) for layer in report["layers"]}
            self.layers = {int(layer["layer"]): tuple(map(int, layer["kept"])) for layer in report["layers"]}
            self.count, self.left = int(report["experts"]["before"]), int(report["experts"]["kept"])
            self.without = {str(name) for name in report["without"]}
            moved = (name for layer in report["layers"] for name in layer.get("refit", {}).get("tensors", ()))
            self.moved = {name for name in moved if OF_EXPERTS.search(name)}
            self.quantized = not report["arguments"].get("dequantize")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                f"{REPORT}: is not what shrink wrote; remove it to look at the tensors alone"
            ) from None


@dataclass
class CutFindings:
    """The numbers of tensors that are the source's to the byte, that are slices of it, and whose values were moved.

    In `masked` tensors weights are zero that are not in the source, `zeroed` of them in all. `problems` are all that
    differs otherwise, in words.
    """

    identical: int = 0
    cut: int = 0
    moved: int = 0
    masked: int = 0
    zeroed: int = 0
    problems: list[str] = field(default_factory=list)


def compare_cut(ours: Checkpoint, source: Checkpoint, removal: Removal, pruned: Collection[str] = ()) -> CutFindings:
    """What is found where a checkpoint is compared with its source, of which some experts were removed.

    In the `pruned` tensors weights may be zero instead of the source's.
    """
    findings, left = CutFindings(), set(ours.tensors)
    for tensor, expected in _expected(source, ours, removal):
        left.discard(expected.name)
        found = ours.tensors.get(expected.name)
        if found is None:
            findings.problems.append(f"{expected.name}: is missing in {ours.path}")
        elif (found.dtype, found.shape) != (expected.dtype, expected.shape):
            findings.problems.append(f"{found.name}: is {found.dtype} {list(found.shape)}, not {list(expected.shape)}")
        elif found.name in removal.moved:
            findings.moved += 1
            if any(nonfinite(piece, found.dtype) for piece in found.pieces()):
                findings.problems.append(f"{found.name}: holds NaN or infinity")
        else:
            _compare(found, expected, tensor.name, found.name in pruned, findings)
    findings.problems += [f"{name}: is not in the source" for name in sorted(left)]
    findings.problems += _small_files(ours, source, removal)
    return findings


def _compare(found: Tensor, expected: Tensor, name: str, pruned: bool, findings: CutFindings) -> None:
    """Compares the bytes of a tensor with what is left of the source's tensor `name`."""
    zeroed, changed = differing_values(found, expected)
    if changed or (zeroed and not pruned):
        findings.problems.append(f"{found.name}: its bytes are not those of the source's {name}")
    elif zeroed:
        findings.masked, findings.zeroed = findings.masked + 1, findings.zeroed + zeroed
    else:
        findings.identical += not expected.is_made
        findings.cut += expected.is_made


def _expected(source: Checkpoint, ours: Checkpoint, removal: Removal) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tensor of the source, what should be left of it)."""
    for tensor in source.tensors.values():
        stem, number, _ = stem_of(tensor.name)
        kept, match = removal.kept.get(f"{stem}{number}."), MEMBER.fullmatch(tensor.name)
        if kept is None:
            if tensor.name not in removal.without:
                yield tensor, tensor
        elif match is None:
            yield tensor, _slices(tensor, ours.tensors.get(tensor.name), kept, removal.count)
        elif int(match[2]) >= removal.count:
            yield tensor, renamed(tensor, int(match[2]) - removal.count + len(kept))
        elif int(match[2]) in kept:
            yield tensor, renamed(tensor, kept.index(int(match[2])))


def _slices(tensor: Tensor, found: Tensor | None, kept: tuple[int, ...], count: int) -> Tensor:
    """What should be left of a tensor: all of it, or the rows of kept experts along the axis that is shorter."""
    shapes = zip(tensor.shape, found.shape if found is not None else tensor.shape, strict=False)
    axes = [(axis, was, now) for axis, (was, now) in enumerate(shapes) if was != now]
    if len(axes) != 1:
        return tensor
    ((axis, was, now),) = axes
    each, rest = divmod(was - now, count - len(kept))
    if rest or each < 1 or was < each * count:
        return tensor
    rows = [expert * each + row for expert in kept for row in range(each)]
    return cut(tensor, axis, [*rows, *range(each * count, was)])


def fewer_experts(ours: Checkpoint, source: Checkpoint) -> str:
    """What to say of a checkpoint that has fewer experts than its source, where no report tells which; else ""."""
    before, after = (dict(_flat(one.config())) for one in (source, ours))
    for key, was in before.items():
        now = after.get(key)
        if "expert" in key[-1] and type(was) is int and type(now) is int and now < was:
            left = f"{'.'.join(key)} is {now}, in the source {was}"
            return f"{left}, and there is no {REPORT} that says which experts are kept; get that of shrink, too"
    return ""


def _small_files(ours: Checkpoint, source: Checkpoint, removal: Removal) -> Iterator[str]:
    """Yields what differs in the small files, but for the number of experts and of layers that were left out."""
    files = [file for file in companions(source.path).files if file != Path(CONFIG)]
    for file in differing(files, source.path, ours.path):
        yield f"{file}: is missing or differs from the source's"
    before, after = (dict(_flat(one.config())) for one in (source, ours))
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key), after.get(key)
        if was == now or (was, now) == (removal.count, removal.left):
            continue
        if not (removal.without and now == 0 and any(word in key[-1] for word in ("mtp", "nextn"))):
            yield f"{CONFIG}: {'.'.join(key)} is {now}, in the source {was}"


def _flat(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path of keys, value) of nested objects."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value
