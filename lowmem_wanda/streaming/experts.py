"""Experts of a mixture, one after the other, so that the inputs of each can be seen, and its matrices change between.

transformers lets a function be registered that computes the experts of every family that offers this. Families that do
not are watched: a product with a stack of matrices says which expert it is of, and on which inputs.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lowmem_wanda.streaming.flows import GROUP, wait

ONE_BY_ONE = "lowmem_wanda"  # the name of `one_by_one` among transformers' ways to compute experts
PROMISED = ("num_experts", "has_gate", "has_bias", "is_transposed", "down_proj")  # of a module of experts
PRODUCTS = (torch.bmm, torch.matmul, torch.mm, nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__,
            torch.Tensor.bmm, torch.Tensor.mm)  # fmt: skip


class Observer(Protocol):
    """Who is told what experts compute. Where it wants `every` expert on all tokens, those are computed beside."""

    every: bool

    def entered(self, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """Tokens (tokens, width) enter a layer of experts; `index` (tokens, k) are those that each is given to."""

    def arrived(self, parameter: str, expert: int, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Inputs (tokens, columns) of an expert's matrix, each with its routing weight (tokens, 1), arrive."""


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a module is called with."""
    return args[0] if args else kwargs["hidden_states"]  # type: ignore[no-any-return]


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes experts by the function that is registered here."""
    return all(hasattr(module, name) for name in PROMISED)


def expert_parameters(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacks of matrices of a module of experts, in the order in which they are used."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def one_by_one(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The output of experts (tokens, width), bit for bit that of transformers' "eager".

    `hidden_states` are (tokens, width), `top_k_index` and `top_k_weights` (tokens, k). Experts are computed in their
    order, the tokens of each in the order of their place among the k, as transformers does. Listeners are told what
    each puts out for its tokens, and their routing weights. On `meta` nothing is computed, and observers are told of
    every expert.
    """
    observers: list[Observer] = self.__dict__.get("observers", [])
    out = torch.zeros_like(hidden_states)
    for observer in observers:
        observer.entered(hidden_states, top_k_index)
    if hidden_states.is_meta:
        _announce(self, observers, hidden_states)
        return out
    on_own, on_all = ([one for one in observers if one.every is every] for every in (False, True))
    flat = top_k_index.t().reshape(-1)
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()  # the one time that a GPU is waited for
    order, start = torch.argsort(flat, stable=True), 0
    pauses, parking = self.__dict__.get("pauses", set()), self.__dict__.get("parking")
    for expert, count in enumerate(counts[: self.num_experts]):  # what is beyond them is no expert
        if expert in pauses:  # until the group that begins with it is loaded
            with parking.parked(hidden_states, out) if parking else nullcontext():
                wait(GROUP)
        places = order[start : start + count]
        token, place = places % len(hidden_states), places // len(hidden_states)
        weights = top_k_weights[token, place, None]
        if on_all:
            _through(self, expert, hidden_states, None, on_all)
        if count or on_own:
            made = _through(self, expert, hidden_states[token], weights, on_own)
            for listener in self.__dict__.get("listeners", ()):
                listener(expert, made, weights)
            out.index_add_(0, token, (made * weights).to(out.dtype))
        start += count
    return out


def _through(
    self: Any, expert: int, inputs: torch.Tensor, weights: torch.Tensor | None, observers: list[Observer]
) -> torch.Tensor:
    """The output (tokens, width) of one expert for inputs (tokens, width), before its routing weights."""
    for parameter in expert_parameters(self):
        for observer in observers:
            observer.arrived(parameter, expert, inputs, weights)
        inputs = _project(self, parameter, expert, inputs)
        if parameter != "down_proj":
            inputs = self._apply_gate(inputs) if self.has_gate else self.act_fn(inputs)
    return self.post_expert_norm(inputs) if getattr(self, "has_post_expert_norm", False) else inputs


def inputs_of_down(self: Any, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """What the down projection (tokens, columns) of one expert is given for inputs (tokens, width)."""
    parameter, _ = expert_parameters(self)
    inputs = _project(self, parameter, expert, inputs)
    return self._apply_gate(inputs) if self.has_gate else self.act_fn(inputs)  # type: ignore[no-any-return]


def outputs_of_down(self: Any, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """What the down projection of one expert puts out (tokens, width), with its bias, for its inputs."""
    return _project(self, expert_parameters(self)[1], expert, inputs)


def place_of(self: Any, expert: int) -> int:
    """Where an expert lies in its stacks: those of a smaller model lie among all, and a group of them begins at one."""
    places = self.__dict__.get("places")
    return int(places[expert] if places else expert - self.__dict__.get("first_expert", 0))


def _project(self: Any, parameter: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    loaded, places = place_of(self, expert), self.__dict__.get("places")
    weight = getattr(self, parameter)[loaded].to(inputs.dtype)  # one expert at a time is cast
    made = inputs @ weight if self.is_transposed else nn.functional.linear(inputs, weight)
    bias = places[expert] if places else expert  # which is loaded for all of them
    return made + getattr(self, f"{parameter}_bias")[bias].to(inputs.dtype) if self.has_bias else made


def _announce(self: Any, observers: list[Observer], hidden: torch.Tensor) -> None:
    for expert in range(self.num_experts if observers else 0):
        for parameter in expert_parameters(self):
            columns = getattr(self, parameter).shape[1 if self.is_transposed else 2]
            for observer in observers:
                observer.arrived(parameter, expert, hidden.new_empty(len(hidden), columns), None)


ALL_EXPERTS_FUNCTIONS.register(ONE_BY_ONE, one_by_one)


class Watch(TorchFunctionMode):
    """Sees products with matrices of stacks, parameters (experts, ., .) of `module` by name, while it is entered.

    `see` is called with the name, the expert and the inputs (tokens, columns); tokens that are all zeros are left out,
    because llama4 gives every token to every expert, times a score that is zero for the others. Then `ready` is called
    with the name, before the product is computed. `turned` says of each stack that was seen whether it holds (inputs,
    outputs).
    """

    def __init__(
        self,
        module: nn.Module,
        stacks: Iterable[str],
        see: Callable[[str, int, torch.Tensor], None],
        ready: Callable[[str], None] = lambda name: None,
    ) -> None:
        super().__init__()
        self.see, self.ready, self.turned = see, ready, dict[str, bool]()
        self._stacks = {
            name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in stacks
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            for name, (owner, parameter) in self._stacks.items():
                self._look(func, args[0], args[1], name, getattr(owner, parameter))
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, inputs: torch.Tensor, weight: torch.Tensor, name: str, stack: torch.Tensor) -> None:
        same = weight.untyped_storage()._cdata == stack.untyped_storage()._cdata and weight.dtype == stack.dtype
        if not same or weight.numel() % stack[0].numel():
            return
        first, rest = divmod(int(weight.storage_offset() - stack.storage_offset()), stack.stride(0))
        if rest or not 0 <= first < len(stack):
            return
        as_stored = weight.stride()[-2:] == stack.stride()[-2:]
        self.turned[name] = (func is not nn.functional.linear) == as_stored
        for expert in range(weight.numel() // stack[0].numel()):
            rows = inputs[expert] if inputs.ndim == 3 and weight.ndim == 3 else inputs
            rows = rows.reshape(-1, rows.shape[-1])
            self.see(name, first + expert, rows if rows.is_meta else rows[rows.ne(0).any(-1)])
        self.ready(name)
