"""What a run of a block without weights and data shows: what its matrices are called with, and what chooses experts."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.experts import Watch, entering, is_experts
from lowmem_wanda.streaming.layout import View
from lowmem_wanda.streaming.matrices import LINEARS, OF_EXPERTS, Matrix, own_forward, stack_of, unowned

UNKNOWN = 0.05  # of a block's weights at most may lie in matrices that are not understood
ROUTER, UNOWNED, UNCALLED = "chooses experts", "no matrix of a linear", "never called as a module"


@dataclass(frozen=True)
class Trace:
    """What a run of a block on `meta` shows.

    `matrices` know which inputs they share. `inputs` are the distinct ones, in the order in which they arrive.
    `beside` is None where the block gives hidden states alone. Where it gives them within a tuple, it says of each
    further value whether that is None. `dense` are file tensors that are left as they are, {name: why}, and `stacks`
    the parameters of experts whose products are watched. `shares` are {module of experts: the share of its experts that
    each token is given to}. `written` are the bytes that it writes for each token where later blocks read them.
    """

    matrices: tuple[Matrix, ...]
    inputs: tuple[str, ...]
    beside: tuple[bool, ...] | None
    dense: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    written: int = 0


def trace(
    block: nn.Module,
    matrices: tuple[Matrix, ...],
    views: Mapping[str, View],
    shapes: Mapping[str, Sequence[int]],
    hidden: torch.Tensor,
    call: tuple[tuple[Any, ...], dict[str, Any]],
) -> Trace:
    """The trace of a block, which is run without weights and data, on `hidden` and the other arguments of a `call`.

    `views` say where its parameters lie, in file tensors of the given `shapes`. Raises ModelError for a block that
    does not run so, for a matrix whose module is called more than once, for experts whose router is not found, and
    where more than 5 % of the weights are in matrices that are not understood.
    """
    tracer = Tracer(block, matrices)
    output = tracer.run(hidden, *call)
    if double := next((path for path in tracer.called if tracer.called.count(path) > 1), ""):
        raise ModelError(
            f"{type(block).__name__}: linear {double} is called {tracer.called.count(double)} times in a forward, so "
            "it cannot be measured; it is not supported yet"
        )
    dense = _left_dense(tracer, views)
    _require_understood(block, views, dense, shapes)
    known = []
    for matrix in (*matrices, *_watched(tracer, views, shapes)):
        if matrix.tensor not in dense:
            inputs = matrix.inputs if matrix.expert is not None else tracer.first[matrix.module]
            known.append(replace(matrix, inputs=inputs))
    beside = tuple(value is None for value in output[1:]) if isinstance(output, (tuple, list)) else None
    turned = tracer.watch.turned
    shares = tracer.shares | {name.rpartition(".")[0]: 1 / views[name].shape[0] for name in turned}
    return Trace(tuple(known), tuple(tracer.inputs), beside, dense, tuple(turned), shares)


class Tracer:
    """Runs a block without weights and data, and notes which modules are called, with what, in which order."""

    def __init__(self, block: nn.Module, matrices: tuple[Matrix, ...]) -> None:
        self.block = copy.deepcopy(block).to("meta")
        self.matrices = matrices
        self.called: list[str] = []
        self.first: dict[str, str] = {}  # module -> the module that was called first with the same inputs
        self.inputs: dict[str, torch.Tensor] = {}  # kept, so that no two of them share an identity
        self.strange: set[str] = set()  # linears that put out something else than linears do
        self.indices: list[torch.Tensor] = []  # which experts tokens were given to
        self.shares: dict[str, float] = {}
        self.chosen: list[tuple[str, torch.Tensor]] = []  # what modules put out that are integers, inner ones first
        stacks = dict(self.block.named_parameters())
        names = [name for name in unowned(self.block) if name in stacks and stacks[name].ndim == 3]
        self.entered: dict[str, torch.Tensor] = {name.rpartition(".")[0]: torch.empty(0) for name in names}
        self.watch = Watch(self.block, names, self._saw)

    def run(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output on `meta`. Raises ModelError for a block that does not run so."""
        modules = {matrix.module for matrix in self.matrices if matrix.expert is None}
        for path, module in self.block.named_modules():
            if path in modules:
                module.register_forward_pre_hook(partial(self._note, path))
            if is_experts(module):
                module.__dict__["observers"] = [_Announced(self, path)]
            if path in self.entered:
                module.register_forward_pre_hook(partial(self._entered, path), with_kwargs=True)
            module.register_forward_hook(partial(self._chose, path))
        args, kwargs = _on_meta((args, kwargs))
        try:
            with self.watch:
                return self.block(hidden.to("meta"), *args, **kwargs)
        except Exception as error:  # what a model's own code raises is not known
            raise ModelError(
                f"{type(self.block).__name__}: a block of it does not run without data ({str(error).strip()[:200]}), "
                "so what its matrices are measured on is not known; it is not supported yet"
            ) from error

    def routers(self) -> set[str]:
        """The paths of the modules that choose experts: of the innermost that put out which ones are chosen.

        Raises ModelError where no module does, so that which linear is the router is not known.
        """
        found, modules = set(), dict(self.block.named_modules())
        stacks = {path for path, module in modules.items() if is_experts(module)}
        watched = {name.rpartition(".")[0] for name in self.watch.turned}
        for index in self.indices:
            path = next((path for path, given in self.chosen if given is index), None)
            if path is None or any(within(stack, path) for stack in stacks):
                raise self._no_router()
            found.add(path)
        if watched:
            inner = {path for path, _ in self.chosen if not any(within(stack, path) for stack in watched)}
            if not inner and not self.strange:
                raise self._no_router()
            found |= inner
        return found

    def _no_router(self) -> ModelError:
        return ModelError(
            f"{type(self.block).__name__}: which of its linears chooses the experts is not known; it is not supported"
        )

    def _note(self, path: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.called.append(path)
        self.first[path] = next((one for one, tensor in self.inputs.items() if tensor is inputs[0]), path)
        if self.first[path].endswith("]"):  # a linear that is given what experts are given
            self.first[path] = path
        self._arrived(self.first[path], inputs[0])

    def _entered(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered[path] = entering(args, kwargs)

    def _saw(self, name: str, expert: int, inputs: torch.Tensor) -> None:
        path = name.rpartition(".")[0]
        self._arrived(path + OF_EXPERTS, self.entered[path])
        self._arrived(f"{name}[{expert}]", inputs)

    def _arrived(self, name: str, inputs: torch.Tensor) -> None:
        self.inputs.setdefault(name, inputs)

    def _chose(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if own_forward(module):
            rows, columns = module.weight.shape  # type: ignore[misc]
            alike = isinstance(output, torch.Tensor) and inputs[0].shape[-1] == columns
            if not alike or output.shape != (*inputs[0].shape[:-1], rows):
                self.strange.add(path)
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                self.chosen.append((path, value))


class _Announced:
    """Notes for a tracer what the experts at `path` are given."""

    every = False

    def __init__(self, tracer: Tracer, path: str) -> None:
        self.tracer, self.path = tracer, path

    def entered(self, hidden: torch.Tensor, index: torch.Tensor) -> None:
        self.tracer.indices.append(index)
        count = self.tracer.block.get_submodule(self.path).num_experts
        self.tracer.shares[self.path] = index.shape[-1] / int(count)  # type: ignore[arg-type]
        self.tracer.inputs.setdefault(self.path + OF_EXPERTS, hidden)

    def arrived(self, parameter: str, expert: int, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        self.tracer.inputs.setdefault(f"{self.path}.{parameter}[{expert}]", inputs)


def _watched(tracer: Tracer, views: Mapping[str, View], shapes: Mapping[str, Sequence[int]]) -> list[Matrix]:
    """The matrices of the stacks whose products were seen."""
    found: list[Matrix] = []
    for name, turned in tracer.watch.turned.items():
        path, _, parameter = name.rpartition(".")
        found += stack_of(path, parameter, turned, views[name], shapes)
    return found


def _left_dense(tracer: Tracer, views: Mapping[str, View]) -> dict[str, str]:
    """{file tensor: why} of the matrices of a traced block that are not pruned."""
    found: dict[str, str] = {}
    routers = tracer.routers()
    for path, module in tracer.block.named_modules():
        if not isinstance(module, LINEARS):
            continue
        why = ""
        if any(within(path, router) for router in routers):
            why = ROUTER
        elif path in tracer.strange:
            why = "a linear with a forward of its own"
        elif min(module.weight.shape) == 1:
            why = "a gate of one output" if module.weight.shape[0] == 1 else "a linear of one input"
        elif path not in tracer.first:
            why = UNCALLED
        found |= dict.fromkeys(views[f"{path}.weight"].tensors, why) if why else {}
    for name in unowned(tracer.block):
        if name not in tracer.watch.turned:
            router = any(within(name.rpartition(".")[0], router) for router in routers)
            found |= dict.fromkeys(views[name].tensors, ROUTER if router else UNOWNED) if name in views else {}
    return found


def _require_understood(
    block: nn.Module, views: Mapping[str, View], dense: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raises ModelError where much of a block is in matrices that no linear computes with."""
    strange = {name: math.prod(shapes[name]) for name, why in dense.items() if why in (UNOWNED, UNCALLED)}
    total = sum(math.prod(shapes[name]) for name in {name for view in views.values() for name in view.tensors})
    if sum(strange.values()) > UNKNOWN * total:
        raise ModelError(
            f"{type(block).__name__}: {sum(strange.values()) / total:.0%} of its weights are in matrices outside "
            f"linear layers, such as {max(strange, key=lambda name: strange[name])}, which is not supported yet"
        )


def within(path: str, other: str) -> bool:
    """Whether a module is another one, or lies in it."""
    return path == other or path.startswith(f"{other}.") or not other


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(item) for item in value)
    return {key: _on_meta(item) for key, item in value.items()} if isinstance(value, dict) else value
