"""Where parameters lie in the memory of file tensors: transformers' own conversions, run on `meta`, as views.

A checkpoint may hold a tensor for each expert where the model has one parameter of all experts, or the other way round.
What transformers does to the one to make the other only moves values: run on tensors without data, its operations give
views, whose shapes, strides and offsets say where each value lies. So file tensors are read side by side into one piece
of memory, and parameters are other views of that piece. Nothing is converted and nothing is copied.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter

from lowmem_wanda.errors import CheckpointError, ModelError

Place = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, stride and offset in values
Sources = dict[str, list[str]]  # a converter's source pattern -> the file tensors that it is about


@dataclass(frozen=True)
class View:
    """Where the values of a parameter lie: in file tensors that lie one after the other in memory.

    `shape`, `stride` and `offset`, in values from the beginning of the first of `tensors`, are those of the parameter.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def of(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The parameter as a view of stored tensors, which lie one after the other in the memory of a block."""
        first = stored[self.tensors[0]]
        return first.as_strided(self.shape, self.stride, first.storage_offset() + self.offset)

    def made_of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The parameter of tensors that lie anywhere; a copy of them where there are several."""
        parts = [tensors[name] for name in self.tensors]
        memory = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
        return memory.as_strided(self.shape, self.stride, memory.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is a file tensor as it is."""
        return len(self.tensors) == 1 and not self.offset and self.stride == _whole(self.shape)[1]

    @property
    def tensor(self) -> str:
        """The first file tensor, the only one of a parameter that is stored as it is."""
        return self.tensors[0]


def whole(name: str, shape: Sequence[int]) -> View:
    """The view of a parameter that is a file tensor as it is."""
    place = _whole(shape)
    return View((name,), place[0], place[1])


class _Lazy(torch.Tensor):
    """A tensor on `meta` that `contiguous` does not copy, so that what is made of it stays a view."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def views(
    model: Any, name: str, sources: Sources, converter: WeightConverter, shapes: Mapping[str, Sequence[int]]
) -> dict[str, View]:
    """{parameter: view} of what a converter makes of file tensors for the parameter `name`, and others beside it.

    `shapes` are those of all file tensors. Raises ModelError where the conversion computes with values, CheckpointError
    where file tensors are missing.
    """
    files = [file for names in sources.values() for file in names]
    if len(files) == 1:
        return _from_one(model, name, files[0], converter, shapes[files[0]])
    return {name: _from_many(model, name, sources, converter, shapes)}


def _from_one(model: Any, name: str, file: str, converter: WeightConverter, shape: Sequence[int]) -> dict[str, View]:
    """The views of the parameters that are made of one file tensor."""
    pattern = converter.source_patterns[0]
    places = _run(model, name, converter, pattern, _empty(shape))
    return {name.replace(converter.target_patterns[0], key): View((file,), *place) for key, place in places.items()}


def _from_many(
    model: Any, name: str, sources: Sources, converter: WeightConverter, shapes: Mapping[str, Sequence[int]]
) -> View:
    """The view of the parameter that is made of several file tensors: the reverse conversion says where they lie."""
    back, shape = converter.reverse_transform(), tuple(model.state_dict()[name].shape)
    for order in permutations(range(len(shape))):  # the order in memory in which all file tensors are contiguous
        memory = _empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
        places = _run(model, name, back, back.source_patterns[0], memory)
        if all(_empty([1]).as_strided(size, stride, 0).is_contiguous() for size, stride, _ in places.values()):
            break
    else:
        raise _other_form(name, model)
    placed = {
        file: places.get(target.replace("*", str(index)))
        for target, source in zip(back.target_patterns, converter.source_patterns, strict=True)
        for index, file in enumerate(sources.get(source, ()))
    }
    wrong = [file for file, place in placed.items() if place is None or place[0] != tuple(shapes[file])]
    if wrong or len(placed) != len(places):
        file = (wrong or list(placed))[0]
        raise CheckpointError(
            f"tensor {file}: {len(placed)} tensors such as it, of {list(shapes[file])}, do not make up {name} of "
            f"{list(shape)} as config.json describes it; download both again"
        )
    ordered = sorted(placed, key=lambda file: placed[file][2])  # type: ignore[index]
    return View(tuple(ordered), shape, tuple(memory.stride()))


def _run(model: Any, name: str, converter: Any, key: str, tensor: torch.Tensor) -> dict[str, Place]:
    """{key: place in the memory of `tensor`} of all that a converter's operations make of it. Raises ModelError."""
    made: dict[str, Any] = {key: [_Lazy(tensor)]}
    patterns = {"source_patterns": converter.source_patterns, "target_patterns": converter.target_patterns}
    try:
        for operation in converter.operations:
            made = operation.convert(made, full_layer_name=name, model=model, config=model.config, **patterns)
        views = {one: value[0] if isinstance(value, list) else value for one, value in made.items()}
        here = tensor.untyped_storage()._cdata
        views_alone = all(view.untyped_storage()._cdata == here for view in views.values())
    except Exception as error:  # what an operation raises that wants data is not known
        raise _other_form(name, model) from error
    if not views_alone or sum(view.numel() for view in views.values()) != tensor.numel():
        raise _other_form(name, model)
    return {one: (tuple(view.shape), tuple(view.stride()), view.storage_offset()) for one, view in views.items()}


def _other_form(name: str, model: Any) -> ModelError:
    return ModelError(
        f"{name}: it is stored in another form than {type(model).__name__} computes with, which needs more than "
        "another order of the values, so it is not supported yet"
    )


def _empty(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), device="meta")


def _whole(shape: Sequence[int]) -> Place:
    return tuple(shape), tuple(_empty(shape).stride()), 0
