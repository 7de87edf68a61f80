"""Where the experts of a checkpoint lie, and what else has a row for each of them.

Nothing here knows a model family. The model is built twice on `meta`, with all experts and with fewer: what changes its
shape is cut, and the number in config.json that makes the difference is the one to change. Experts that lie in tensors
of their own are found by the number in their names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowmem_wanda.checkpoint.cut import (
    MEMBER,
    CutCheckpoint,
    changed_text,
    config_text,
    cut,
    numbers_in,
    renamed,
    stem_of,
)
from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import LowmemError, ModelError
from lowmem_wanda.streaming.skeleton import build_model

KEY = re.compile(r"expert")  # in the name of a number of experts
STACK = re.compile(r"(^|\.)experts\.")  # in the name of a parameter of all experts
# what quantized tensors add to the names of those that they stand for
ADDED = re.compile(r"(_scale_inv|_blocks|_scales|_packed|_scale|_shape|_zero_point|_g_idx)$")
USED = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
INTEGERS = ("I64", "I32", "I16", "U8")
PREDICTING = re.compile(r"nextn|mtp")  # in the name of a number of layers that predict further tokens


@dataclass(frozen=True)
class Rows:
    """A file tensor with `each` rows for each expert along an axis, and `more` rows behind them."""

    layer: int
    axis: int
    each: int
    more: int


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """The experts of a checkpoint: `count` in each layer, of which `used` work for a token (0: not known).

    A router may choose `groups_used` of `groups` of them first. `key` is the path of their number in config.json.
    `rows` are the file tensors that have rows for all of them, and `members` {file tensor: (layer, expert)} those that
    are of one. Layers are numbered as decoder blocks; the `predicting` ones behind them predict further tokens (MTP),
    and `predicted` are all of their file tensors. `blocks` is {file tensor: its decoder block}.
    """

    checkpoint: Checkpoint
    count: int
    used: int
    groups: int
    groups_used: int
    key: tuple[str, ...]
    rows: Mapping[str, Rows]
    members: Mapping[str, tuple[int, int]]
    predicting: tuple[int, ...]
    predicted: tuple[str, ...]
    blocks: Mapping[str, int]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts."""
        return tuple(sorted({layer for layer, _ in self.members.values()} | {one.layer for one in self.rows.values()}))

    @property
    def running(self) -> tuple[int, ...]:
        """The numbers of those that run in a forward pass."""
        return tuple(layer for layer in self.layers if layer not in self.predicting)

    def stem(self, layer: int) -> str:
        """How the names of a layer's tensors begin: up to its number, with a point."""
        names = [name for name, one in self.rows.items() if one.layer == layer]
        names += [name for name, one in self.members.items() if one[0] == layer]
        return "{}{}.".format(*stem_of(names[0]))

    def tensors(self, kept: Mapping[int, Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (file tensor, what is left of it) of all that is left of the layers in `kept`, and of all else.

        `kept` has the ids that each layer keeps, ascending. Layers without an entry are left out, as a whole where they
        predict further tokens.
        """
        new = {layer: {expert: place for place, expert in enumerate(ids)} for layer, ids in kept.items()}
        gone = set(self.predicted) if not any(layer in kept for layer in self.predicting) else set()
        for tensor in self.checkpoint.tensors.values():
            if tensor.name in self.members:
                layer, expert = self.members[tensor.name]
                if layer in kept and expert >= self.count:  # none, as the router counts on behind them
                    yield tensor, renamed(tensor, expert - self.count + len(kept[layer]))
                elif expert in new.get(layer, {}):
                    yield tensor, renamed(tensor, new[layer][expert])
            elif tensor.name in self.rows:
                rows = self.rows[tensor.name]
                if rows.layer in kept:
                    yield tensor, cut(tensor, rows.axis, self.left(rows, kept[rows.layer]))
            elif tensor.name not in gone:
                yield tensor, tensor

    def left(self, rows: Rows, kept: Sequence[int]) -> list[int]:
        """The rows that are left of a tensor."""
        wanted = [expert * rows.each + row for expert in kept for row in range(rows.each)]
        return [*wanted, *range(self.count * rows.each, self.count * rows.each + rows.more)]

    def cut(self, kept: Mapping[int, Sequence[int]]) -> CutCheckpoint:
        """The checkpoint with the experts that are `kept`, in each layer as many."""
        text = changed_text(config_text(self.checkpoint), self.key, len(next(iter(kept.values()))))
        if self.predicting and not any(layer in kept for layer in self.predicting):
            for path, value in numbers_in(self.checkpoint.config()):
                text = changed_text(text, path, 0) if PREDICTING.search(path[-1]) and value else text
        left = {made.name: made for _, made in self.tensors(kept)}
        return CutCheckpoint(self.checkpoint, left, text)


def expert_layout(
    model: torch.nn.Module, checkpoint: Checkpoint, blocks: str, trust_remote_code: bool = False
) -> ExpertLayout:
    """The layout of the experts of a `model`, whose decoder blocks are at the path `blocks`.

    Raises ModelError where it is not found.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    groups, chosen = (one if type(one := getattr(config, name, 1)) is int else 1 for name in ("n_group", "topk_group"))
    key, count, changed = _changed(model, checkpoint, groups, trust_remote_code)
    depth = len(model.get_submodule(blocks))  # type: ignore[arg-type]
    files = _Files(model, checkpoint, blocks)
    members = _members(files, count, depth)
    rows = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in members and (parameter := files.parameter(name)) in changed:
            axis, whole, left = changed[parameter]
            each, rest = divmod(whole - left, groups)
            if rest or whole < count * each or tensor.shape[axis : axis + 1] != (whole,):
                raise ModelError(f"tensor {name}: {list(tensor.shape)} has not a row for each of {count} experts")
            rows[name] = Rows(files.layer(name, depth), axis, each, whole - count * each)
    rows |= _further(files, rows, members, depth)
    layers = {one.layer for one in rows.values()} | {layer for layer, _ in members.values()}
    predicting = tuple(sorted(layer for layer in layers if layer >= depth))
    predicted = tuple(name for name in checkpoint.tensors if predicting and files.predicts(name, depth))
    used = next((value for word in USED if type(value := getattr(config, word, None)) is int), 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in INTEGERS and tensor.shape == (getattr(config, "vocab_size", None), used):
            raise ModelError(
                f"tensor {tensor.name}: routes tokens by their ids to numbered experts (hash routing), which would be "
                "others afterwards; that is not supported"
            )
    return ExpertLayout(
        checkpoint=checkpoint, count=count, used=used, groups=groups, groups_used=chosen, key=key, rows=rows,
        members=members, predicting=predicting, predicted=predicted,
        blocks={name: layer for name in checkpoint.tensors if (layer := files.block(name, depth)) is not None},
    )  # fmt: skip


def _changed(
    model: torch.nn.Module, checkpoint: Checkpoint, fewer: int, trust: bool
) -> tuple[tuple[str, ...], int, dict[str, tuple[int, int, int]]]:
    """The path and the value of the number of experts, and {parameter: (axis, size before, size with `fewer` less)}."""
    content, before = checkpoint.config(), shapes_of(model)
    content.pop("quantization_config", None)
    found, errors = {}, []
    for path, value in numbers_in(content):
        keep = value - fewer
        if not KEY.search(path[-1]) or keep < 1:
            continue
        try:
            after = shapes_of(build_model(checkpoint, torch.float32, trust, _with(content, path, keep)))
        except LowmemError as error:
            errors.append(f"with {path[-1]} {keep}: {error}")
            continue
        changed = {name: (shape, after[name]) for name, shape in before.items() if after.get(name, shape) != shape}
        stacks = [pair for name, pair in changed.items() if STACK.search(name)]
        leading = any(one[:1] == (value,) and other[:1] == (keep,) for one, other in stacks)
        if leading or any(MEMBER.match(name) for name in before.keys() - after):
            found[path] = value, changed
    if len(found) != 1:
        why = f" ({errors[0]})" if errors else ""
        what = "no number of experts" if not found else f"{len(found)} numbers of experts"
        raise ModelError(
            f"config.json: {what} is found in it that fits the tensors of {type(model).__name__}, so experts cannot be "
            f"removed{why}"
        )
    ((path, (value, changed)),) = found.items()
    return path, value, {name: _axis(name, *pair) for name, pair in changed.items()}


def _axis(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, int, int]:
    axes = [axis for axis, (one, other) in enumerate(zip(before, after, strict=False)) if one != other]
    if len(axes) != 1 or len(before) != len(after):
        raise ModelError(f"{name}: changes from {before} to {after} with fewer experts; it is not supported yet")
    return axes[0], before[axes[0]], after[axes[0]]


def _with(content: Mapping[str, Any], path: Sequence[str], value: int) -> dict[str, Any]:
    """The content with another value at a path."""
    first, *rest = path
    return {**content, first: _with(content[first], rest, value) if rest else value}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """{parameter or buffer: its shape}."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in named}


class _Files:
    """What the names of a checkpoint's file tensors say."""

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint, blocks: str) -> None:
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self.names, self._state = checkpoint.tensors, model.state_dict()
        self.shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._rules = renamings, converters, model.base_model_prefix, self._state
        self._blocks = f"{blocks}."
        self._parameters = {name: self._named(name) for name in checkpoint.tensors}
        # of those with a place in a block: their names up to the block's number, and behind it
        self.stems = {stem_of(name)[0] for name, one in self._parameters.items() if one.startswith(self._blocks)}

    def parameter(self, name: str) -> str:
        """The parameter that a file tensor is of, or a part of; "" for none."""
        return self._parameters[name]

    def _named(self, name: str) -> str:
        for one in dict.fromkeys((name, ADDED.sub("", name), ADDED.sub("", name).replace("input", "weight"))):
            found = str(rename_source_key(one, *self._rules)[0])
            if found in self._state:
                return found
            if one in self._state:
                return one
        return ""

    def layer(self, name: str, depth: int) -> int:
        """The number of the layer that a tensor is in."""
        parameter = self.parameter(name)
        if parameter.startswith(self._blocks):
            return int(parameter.removeprefix(self._blocks).partition(".")[0])
        _, number, _ = stem_of(name)
        return number if number >= depth else depth + number

    def block(self, name: str, depth: int) -> int | None:
        """The number of the decoder block that a tensor lies in; None for any other."""
        stem, number, _ = stem_of(name)
        return number if stem in self.stems and number < depth else None

    def predicts(self, name: str, depth: int) -> bool:
        """Whether a tensor without a place in the model is of layers that predict further tokens."""
        if self.parameter(name):
            return False
        stem, number, _ = stem_of(name)
        return (stem in self.stems and number >= depth) or bool(re.match(r"(model\.)?mtp\b", name))


def _members(files: _Files, count: int, depth: int) -> dict[str, tuple[int, int]]:
    """{file tensor of one expert: (layer, expert)}. Raises ModelError where a layer has not all of them."""
    found, known = {}, dict[tuple[int, str], set[int]]()
    for name in files.names:
        if match := MEMBER.fullmatch(name):
            layer, expert = files.layer(name, depth), int(match[2])
            found[name] = layer, expert
            known.setdefault((layer, match[3]), set()).add(expert)
    for (layer, what), experts in known.items():
        if experts != set(range(max(count, len(experts)))):
            raise ModelError(
                f"layer {layer}: has {len(experts)} tensors such as {what.lstrip('.')} for {count} experts; download "
                "it again"
            )
    return found


def _further(
    files: _Files, rows: Mapping[str, Rows], members: Mapping[str, tuple[int, int]], depth: int
) -> dict[str, Rows]:
    """The rows of tensors that the model does not load, by tensors of the same name and shape in its blocks."""
    known = {(stem_of(name)[2], files.shapes[name]): one for name, one in rows.items()}
    found = {}
    for name in files.names:
        if not files.parameter(name) and name not in members and files.predicts(name, depth):
            like = known.get((stem_of(name)[2], files.shapes[name]))
            if like is not None:
                found[name] = Rows(files.layer(name, depth), like.axis, like.each, like.more)
    return found
