"""A causal language model run one decoder block at a time, with the blocks' weights brought as needed.

The model's own forward runs on stubs in the blocks' places: it computes the embeddings, masks, rotary tables
and every argument that it would pass to each block, and the stubs keep those. Each real block is then called
with exactly what the model would have passed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.matrices import UNSEEN, Trace, trace
from lowmem_wanda.streaming.skeleton import Hollow
from lowmem_wanda.streaming.tensors import DTYPES, Buffer, read_cast

Compared = dict[tuple[int, int], tuple[bool, torch.Tensor]]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments beside the hidden states
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class Stop(Exception):
    """Ends a forward early, once what it was run for is known."""


class Block:
    """One decoder block with its weights.

    `stored` holds its file tensors by name, in their stored dtype, on `device`; the module computes on those
    very tensors where the dtypes agree. Where they do not, a linear casts its weight whenever it is called,
    so that a change of the stored weight counts from the next call on.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        stored: dict[str, torch.Tensor],
        linears: dict[str, str],
        trace: Trace,
        calls: Any,
        device: torch.device,
    ):
        self.index, self.module, self.stored, self.linears, self.trace = index, module, stored, linears, trace
        self.device = device
        self._calls = calls

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output (sequences, length, width), on its device, for hidden states of that shape on any."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][self.index]
        hidden = hidden.to(self.device, non_blocking=self.device.type == "cuda")
        output = self.module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[no-any-return]

    def weight(self, path: str) -> torch.Tensor:
        """The stored weight of a linear as (outputs, inputs), a view: GPT-2's Conv1D holds it transposed."""
        weight = self.stored[self.linears[path]]
        return weight if isinstance(self.module.get_submodule(path), nn.Linear) else weight.t()


class Decoder:
    """Embeds token ids, gives blocks their weights, and applies the head.

    Memory: casts of one weight at a time, the embeddings only while embedding; blocks come in the memory
    of their slot. Hidden states are (sequences, length, width) in the computing dtype.
    """

    def __init__(self, hollow: Hollow, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.hollow, self.tensors, self.device, self.dtype = hollow, tensors, device, dtype
        self.traces: dict[int, Trace] = {}
        self._calls: dict[tuple[int, ...], list[Call]] = {}  # (sequences, length) -> of each block
        self._final: torch.Tensor | None = None
        self._embedded: torch.Tensor | None = None
        self._filled: dict[str, torch.Tensor] = {}
        self._compared: Compared = {}
        for index, block in enumerate(hollow.blocks):
            hollow.model.get_submodule(hollow.path)[index] = _Stub(block, partial(self._arrive, index))  # type: ignore[index, operator]
        self._hooks: list[Any] = []
        self._fill_on_demand()
        self.empty()

    @property
    def depth(self) -> int:
        return len(self.hollow.blocks)

    def embed(self, batches: Sequence[np.ndarray], allocate: Allocate | None = None) -> list[torch.Tensor]:
        """Hidden states before the first block, for batches of token ids (sequences, length), one at a time.

        They are views of one tensor (tokens, width) where `allocate` (shape, dtype -> tensor) makes it, or on the
        device. Notes what each block will be called with. Raises ModelError where that depends on the tokens.
        """
        states, start = torch.empty(0), 0
        parts: list[torch.Tensor] = []
        for tokens in batches:
            embedded = self._run(tokens)
            if not parts:
                shape = (sum(tokens.size for tokens in batches), embedded.shape[-1])
                states = allocate(shape, embedded.dtype) if allocate else embedded.new_empty(shape)
            parts.append(states[start : start + tokens.size].view(embedded.shape).copy_(embedded))
            start += tokens.size
        self.empty()
        return parts

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of hidden states (sequences, length, width) after its last block: its norm, its head,
        and what it does to logits. The head's own weight is brought by `head`."""
        self._final = hidden
        width = self.hollow.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        nothing = torch.zeros(1, 1, int(width), dtype=self.dtype, device=self.device)  # so that nothing is embedded
        try:
            output = self.hollow.model(inputs_embeds=nothing, use_cache=False)
        finally:
            self._final = None
        return output.logits  # type: ignore[no-any-return]

    def load(self, index: int, stored: dict[str, torch.Tensor]) -> Block:
        """Block `index` on its file tensors `stored`, which lie on the device."""
        module, linears = self.hollow.blocks[index], self.hollow.linears(index)
        other = {name: tensor for name, tensor in stored.items() if self._computing(tensor.dtype) != tensor.dtype}
        small = {name: (tensor.shape, self.dtype) for name, tensor in other.items() if name not in linears.values()}
        casts = self._casts.empty(small)
        for name, tensor in self.hollow.block_tensors(index).items():
            path, _, last = name.rpartition(".")
            if tensor in casts:
                _put(module, name, casts[tensor].copy_(stored[tensor]))
            elif tensor in other and last == "weight" and path in linears:
                linear = module.get_submodule(path)
                linear.forward = partial(self._cast_and_call, linear, stored[tensor])  # type: ignore[method-assign]
            else:
                _put(module, name, stored[tensor])
        for name, buffer in module.named_buffers():
            if name not in self.hollow.block_tensors(index):
                _put(module, name, buffer.to(self.device))
        return Block(index, module, stored, linears, self.traces.get(index, UNSEEN), self._calls, self.device)

    def release(self, block: Block) -> None:
        """Takes a block's weights away again."""
        for name in self.hollow.block_tensors(block.index):
            _put(block.module, name, self._get(block.module, name).to("meta"))
        for path in block.linears:
            block.module.get_submodule(path).__dict__.pop("forward", None)

    def close(self) -> None:
        """Takes its hooks out of the model, which another decoder may take up then."""
        for hook in self._hooks:
            hook.remove()

    def _cast_and_call(self, linear: nn.Module, stored: torch.Tensor, hidden: torch.Tensor) -> Any:
        """A linear's own forward on its weight cast to the computing dtype, in the one place for such casts.

        Casting all of a block at once takes two more blocks of memory (bfloat16 weights, float32 computing);
        casting at each call takes about 3 % of the time of a matrix product with 1024 tokens on a CPU.
        """
        weight = self._cast_weight.empty({"": (stored.shape, self.dtype)})[""]
        _put(linear, "weight", weight.copy_(stored))
        return type(linear).forward(linear, hidden)

    def _run(self, tokens: np.ndarray) -> torch.Tensor:
        """The model's own forward up to the last block, on stubs; gives the first block's hidden states."""
        try:
            self.hollow.model(input_ids=self._ids(tokens), use_cache=False)
        except Stop:
            pass
        embedded, self._embedded = self._embedded, None
        self._compared.clear()
        if embedded is None or embedded.ndim != 3:
            raise ModelError(
                f"{type(self.hollow.model).__name__}: its blocks do not pass (sequences, length, width) "
                "states on; it is not supported yet"
            )
        return embedded

    def _arrive(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a stub does when the model calls it: keep the call, hand the hidden states through."""
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if self._final is not None:
            hidden = self._final if index == self.depth - 1 else hidden
            return (hidden,) if self.traces[index].returns_tuple else hidden
        if index == 0:
            self._embedded = hidden
        if index not in self.traces:
            self.traces[index] = trace(self.hollow.blocks[index], hidden, args, kwargs)
        calls = self._calls.setdefault(tuple(hidden.shape[:2]), [])
        if index == len(calls):
            calls.append((args, kwargs))
        elif not _same(calls[index], (args, kwargs), self._compared):
            raise ModelError(
                f"{self.hollow.path}.{index}: what it is called with depends on the tokens, which is not supported yet"
            )
        if index == self.depth - 1:
            raise Stop
        return (hidden,) if self.traces[index].returns_tuple else hidden

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self.device)

    def _computing(self, stored: torch.dtype) -> torch.dtype:
        return self.dtype if stored.is_floating_point else stored

    def _fill_on_demand(self) -> None:
        """Modules outside the blocks load their parameters when they are called, but for the head (see `head`)."""
        outside, head = self.hollow.outside(), self.hollow.head
        for path, module in self.hollow.model.named_modules():
            prefix = f"{path}." if path else ""
            own = {
                name: outside[prefix + name]
                for name in [*module._parameters, *module._buffers]
                if prefix + name in outside
            }
            if own and module is not head:
                self._hooks.append(module.register_forward_pre_hook(partial(self._fill, own, prefix)))
        for name, buffer in self.hollow.model.named_buffers():
            if name not in outside and not name.startswith(f"{self.hollow.path}."):
                _put(self.hollow.model, name, buffer.to(self.device))

    def _fill(self, own: dict[str, str], prefix: str, module: nn.Module, args: Any) -> None:
        for name, tensor in own.items():
            if tensor not in self._filled:
                file = self.tensors[tensor]
                dtype = self._computing(DTYPES[file.dtype])
                self._filled[tensor] = read_cast(file, torch.empty(file.shape, dtype=dtype, device=self.device))
            _put(module, name, self._filled[tensor])

    def empty(self) -> None:
        """Forgets what was loaded outside the blocks, and what blocks were cast to."""
        self._cast_weight, self._casts = Buffer(self.device), Buffer(self.device)
        for name, tensor in self.hollow.outside().items():
            if tensor in self._filled:
                _put(self.hollow.model, name, self._get(self.hollow.model, name).to("meta"))
        self._filled.clear()

    @staticmethod
    def _get(module: nn.Module, name: str) -> torch.Tensor:
        owner, _, last = name.rpartition(".")
        return getattr(module.get_submodule(owner), last)  # type: ignore[no-any-return]


class _Stub(nn.Module):
    """Stands in a block's place; whatever the model reads from a block it still reads from that."""

    def __init__(self, block: nn.Module, arrive: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_arrive"] = block, arrive

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._arrive(args, kwargs)


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = module.get_submodule(owner)
    setattr(module, last, nn.Parameter(tensor, requires_grad=False) if last in module._parameters else tensor)


def _same(one: Any, other: Any, compared: Compared) -> bool:
    """Whether two calls' arguments are equal, tensors by value; blocks share most of them, so each pair of tensors
    is compared once and kept in `compared`."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        pair = (id(one), id(other))
        if pair not in compared:
            compared[pair] = (torch.equal(one, other), other)  # while it is kept, nothing else has its identity
        return compared[pair][0]
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same(*pair, compared) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], compared) for key in one)
    return bool(one == other)
