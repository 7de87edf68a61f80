"""Plans for experts: which ids each layer keeps, read from the forms that people publish.

Read are, with layers as "3", "layer_3" or "model.layers.3.mlp": {layer: [ids]}; a list of lists, one for each layer
with experts; a list of {"layer": 3, "kept_experts": [ids]}; {layer: {"kept_experts": [ids]}}; any of these under a key
such as "layers", "kept_by_layer" or "retained_experts"; and the same of what is dropped, as "pruned_experts".
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_wanda.errors import PatternError

KEPT = re.compile(r"keep|kept|retain|surviv|preserv", re.I)
DROPPED = re.compile(r"prun|drop|remov|discard", re.I)
NEGATED = re.compile(r"(un|non?|not)[ _-]?(prun|drop|remov|discard|keep|kept|retain|surviv|preserv)", re.I)
FIGURES = re.compile(r"count|score|freq|rank|token|share|ratio|size", re.I)  # lists of these are not ids
AROUND = re.compile(r"layers?|plan|selection|selected|experts?|blocks?", re.I)
NUMBER = re.compile(r"\d+")
LAYER = ("layer", "layer_index", "layer_idx", "layer_id", "block", "index")
FORMS = 'the form is {"layer": [ids that are kept]}, such as {"0": [0, 2, 3], "1": [1, 2, 5]}'

Ids = Mapping[int, tuple[int, ...]]  # {number of a layer: ids in ascending order}
Numberings = tuple[Sequence[int], Sequence[int]]  # the layers that a list may be of: all, or those that run
# {layer: kept ids}, {layer: dropped ids}, and what keys said of them: dropped, kept, or None for nothing
Found = tuple[dict[int, list[int]], dict[int, list[int]], set[bool | None]]


def kept_experts(
    content: Any, layers: Sequence[int], count: int, name: str = "", running: Sequence[int] | None = None
) -> Ids:
    """The ids that each of the `layers` keeps of `count` experts, from the JSON `content` of a plan.

    `name` is the file's, which may say that it lists what is dropped. Layers that a plan does not name are left out; a
    list without numbers may be of the `running` layers alone (default: of all). Raises PatternError, in words, for a
    form that is not read or that has two meanings.
    """
    found: Found = ({}, {}, set())
    _gather(content, (layers, running or layers), None, found)
    kept, dropped, _ = found
    if not kept and not dropped:
        raise PatternError(f"no ids of experts are found in it; {FORMS}")
    if None in found[2] and (DROPPED.search(name) and not KEPT.search(name) or _speaks_of_dropping(content)):
        raise PatternError(
            "its name says that it lists what is dropped, or its content speaks of that, but not whether these ids are "
            'dropped; put them into {"dropped_experts": ...} or {"kept_experts": ...}'
        )
    for layer, ids in dropped.items():
        rest = set(range(count)) - set(ids)
        if set(kept.setdefault(layer, sorted(rest))) != rest:
            raise PatternError(f"layer {layer}: what is kept and what is dropped are not all of its {count} experts")
    return {layer: _checked(layer, ids, layers, count) for layer, ids in sorted(kept.items())}


def _checked(layer: int, ids: Sequence[int], layers: Sequence[int], count: int) -> tuple[int, ...]:
    if layer not in layers:
        raise PatternError(
            f"it names layer {layer}, which has no experts in this model; its layers are {_brief(layers)}"
        )
    if len(set(ids)) != len(ids):
        raise PatternError(f"layer {layer}: an expert stands in it twice")
    if outside := [one for one in ids if not 0 <= one < count]:
        raise PatternError(f"layer {layer}: it names expert {outside[0]}, the model has 0 to {count - 1}")
    return tuple(sorted(ids))


def _gather(node: Any, layers: Numberings, drops: bool | None, into: Found) -> None:
    """Adds what a node says; `drops` is what a key around it said, None if none did."""
    if isinstance(node, list):
        node = _as_mapping(node, layers)
    for key, value in node.items() if isinstance(node, dict) else ():
        number, meaning = NUMBER.search(key[:200]), _meaning(key)
        if "layer" in key.lower() and _ids(value) and not number and value not in map(list, layers):
            raise PatternError(f"{key!r} lists layers in another order or number than the model's; {FORMS}")
        if number:
            _gather_layer(int(number[0]), value, drops if meaning is None else meaning, into)
        elif meaning is not None or AROUND.fullmatch(key):
            _gather(value, layers, drops if meaning is None else meaning, into)


def _gather_layer(layer: int, value: Any, drops: bool | None, into: Found) -> None:
    """Adds what is said of one layer: a list of ids, or an object that holds such lists by name."""
    for word, ids in value.items() if isinstance(value, dict) else [("experts", value)]:
        meaning = _meaning(word)
        if (meaning is not None or AROUND.fullmatch(word)) and _ids(ids) and not FIGURES.search(word):
            said = drops if meaning is None else meaning
            into[2].add(said)
            _add(into[1] if said else into[0], layer, ids)


def _add(into: dict[int, list[int]], layer: int, ids: Sequence[int]) -> None:
    if layer in into and sorted(into[layer]) != sorted(ids):
        raise PatternError(f"layer {layer}: it has two lists of ids, which differ")
    into[layer] = list(ids)


def _as_mapping(node: Sequence[Any], layers: Numberings) -> dict[str, Any]:
    """A list of layers as {layer: ...}. Raises PatternError if its length fits neither the layers nor the blocks."""
    if all(isinstance(one, dict) for one in node):
        numbered = {}
        for one in node:
            place = next((one[key] for key in LAYER if type(one.get(key)) is int), None)
            if place is None or str(place) in numbered:
                raise PatternError(f"an entry of its list does not say its layer, or says another one's; {FORMS}")
            numbered[str(place)] = {key: value for key, value in one.items() if key not in LAYER}
        return numbered
    if any(one not in (None, []) and _ids(one) is None for one in node):
        return {}
    if fitting := _by_place(node, layers[0]) or _by_place(node, layers[1]):
        return fitting
    raise PatternError(
        f"it has {len(node)} lists, the model has {len(layers[0])} layers with experts ({_brief(layers[0])}); {FORMS}"
    )


def _by_place(node: Sequence[Any], layers: Sequence[int]) -> dict[str, Any]:
    """A list with an entry for each layer, or for each block, as {layer: ...}; {} if it is neither."""
    if len(node) == len(layers) and all(node):
        return dict(zip(map(str, layers), node, strict=True))
    if len(node) > max(layers) and all(bool(one) == (place in layers) for place, one in enumerate(node)):
        return {str(place): ids for place, ids in enumerate(node) if ids}
    return {}


def _ids(value: Any) -> list[int] | None:
    """The value if it is a list of whole numbers, else None."""
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return value
    return None


def _meaning(key: str) -> bool | None:
    """Whether a key says that ids are dropped; None if it says neither. Raises PatternError for a key that negates."""
    if NEGATED.search(key):
        raise PatternError(f"{key[:60]!r} could mean what is kept or what is dropped; {FORMS}")
    if KEPT.search(key):
        return False
    return True if DROPPED.search(key) else None


def _speaks_of_dropping(content: Any) -> bool:
    """Whether a key that holds no figure, or a text, speaks of dropping at the top of a plan."""
    entries = content.items() if isinstance(content, dict) else ()
    words = [key for key, value in entries if type(value) not in (int, float)]
    words += [value for _, value in entries if isinstance(value, str)]
    return any(DROPPED.search(word) for word in words)


def _brief(layers: Sequence[int]) -> str:
    """Numbers in few characters: 1 to 26."""
    if list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
