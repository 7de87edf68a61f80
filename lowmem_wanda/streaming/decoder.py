"""A causal language model that is run one decoder block at a time, with weights that are loaded when they are needed.

The model's own forward runs on stubs in the blocks' places. It computes the embeddings, masks, rotary tables and every
argument that it would pass to each block, and the stubs keep those. Each real block is then called with exactly what
the model would have passed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lowmem_wanda.errors import ModelError
from lowmem_wanda.streaming.buffers import DTYPES, Scratch, read_cast
from lowmem_wanda.streaming.matrices import Matrix, Trace, trace
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.stubs import Compared, Stub, same_call

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments beside the hidden states
Calls = dict[tuple[int, ...], list[Call]]  # (sequences, length) -> the call of each block
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class Stop(Exception):
    """Raised to end a forward early, once all that it was run for is known."""


class Block:
    """One decoder block with its weights.

    `stored` holds its file tensors by name, in their stored dtype, on `device`. Where that is the computing dtype, the
    module computes on these very tensors. Where it is not, a matrix is cast at every call, so a change of the stored
    weight counts from the next call on. `matrices` are what can be pruned, and `inputs` are their distinct inputs in
    the order in which they arrive. These are known once tokens have been embedded.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        stored: dict[str, torch.Tensor],
        trace: Trace,
        calls: Calls,
        device: torch.device,
    ) -> None:
        self.index, self.module, self.stored, self.device = index, module, stored, device
        self.matrices, self.inputs = trace.matrices, trace.inputs
        self._calls = calls

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output (sequences, length, width), on its device, for hidden states of that shape on any."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][self.index]
        hidden = hidden.to(self.device, non_blocking=self.device.type == "cuda")
        output = self.module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[no-any-return]

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The stored weight of a matrix as (outputs, inputs), a view."""
        return matrix.view(self.stored[matrix.tensor])


class Decoder:
    """Embeds token ids, gives blocks their weights, and applies the head.

    It puts stubs and hooks into the model's skeleton, and takes them away when it is closed. It holds the cast of one
    matrix at a time, and the embeddings only while it embeds; blocks lie in the memory of their slots. Hidden states
    are (sequences, length, width) in the computing dtype.
    """

    def __init__(self, model: StreamedModel) -> None:
        self.model, self.skeleton, self.tensors = model, model.skeleton, model.checkpoint.tensors
        self.device, self.dtype = model.device, model.dtype
        self.traces: dict[int, Trace] = {}
        self._calls: Calls = {}
        self._final: torch.Tensor | None = None
        self._embedded: torch.Tensor | None = None
        self._filled: dict[str, torch.Tensor] = {}
        self._compared: Compared = {}
        self._hooks: list[Any] = []
        for index, block in enumerate(self.skeleton.blocks):
            self._list[index] = Stub(block, partial(self._arrive, index))
        self._fill_on_demand()
        self.empty()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        """Takes the stubs, the hooks and all loaded weights out of the model again."""
        for hook in self._hooks:
            hook.remove()
        for index, block in enumerate(self.skeleton.blocks):
            self._list[index] = block
        self.empty()
        self._calls.clear()

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.skeleton.blocks)

    @property
    def _list(self) -> Any:
        """The module list of the blocks."""
        return self.skeleton.model.get_submodule(self.skeleton.path)

    def embed(self, batches: Sequence[np.ndarray], allocate: Allocate | None = None) -> list[torch.Tensor]:
        """The hidden states before the first block, for batches of token ids (sequences, length), one batch at a time.

        They are views of one tensor (tokens, width), which `allocate` makes for a shape and a dtype (default: on the
        device). The other arguments of each block are kept. Raises ModelError where those depend on the tokens.
        """
        states, start = torch.empty(0), 0
        micro_batches: list[torch.Tensor] = []
        for tokens in batches:
            embedded = self._run(tokens)
            if not micro_batches:
                shape = (sum(tokens.size for tokens in batches), embedded.shape[-1])
                states = allocate(shape, embedded.dtype) if allocate else embedded.new_empty(shape)
            micro_batches.append(states[start : start + tokens.size].view(embedded.shape).copy_(embedded))
            start += tokens.size
        self.empty()
        return micro_batches

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits that the model makes of hidden states (sequences, length, width) after its last block.

        The model applies its own norm, its head, and its own scales and soft caps. `Head` loads the head's weight.
        """
        self._final = hidden
        width = self.skeleton.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
        nothing = torch.zeros(1, 1, int(width), dtype=self.dtype, device=self.device)  # so that nothing is embedded
        try:
            output = self.skeleton.model(inputs_embeds=nothing, use_cache=False)
        finally:
            self._final = None
        return output.logits  # type: ignore[no-any-return]

    def load(self, index: int, stored: dict[str, torch.Tensor]) -> Block:
        """The block `index` with its file tensors `stored`, which lie on the device."""
        module, tensors = self.skeleton.blocks[index], self.skeleton.block_tensors(index)
        trace = self.traces.get(index) or Trace(self.skeleton.matrices[index], (), False)
        cast_on_call = {f"{matrix.module}.{matrix.parameter}" for matrix in trace.matrices}
        matrices = {matrix.tensor for matrix in trace.matrices}
        other = {name: tensor for name, tensor in stored.items() if self._computing(tensor.dtype) != tensor.dtype}
        small = {name: (tensor.shape, self.dtype) for name, tensor in other.items() if name not in matrices}
        casts = self._casts.empty(small)
        for name, tensor in tensors.items():
            if tensor in casts:
                _put(module, name, casts[tensor].copy_(stored[tensor]))
            elif tensor in other and name in cast_on_call:
                linear = module.get_submodule(name.rpartition(".")[0])
                linear.forward = partial(self._cast_and_call, linear, stored[tensor])  # type: ignore[method-assign]
            else:
                _put(module, name, stored[tensor])
        for name, buffer in module.named_buffers():
            if name not in tensors:
                _put(module, name, buffer.to(self.device))
        return Block(index, module, stored, trace, self._calls, self.device)

    def release(self, block: Block) -> None:
        """Takes a block's weights out of the model again."""
        for name in self.skeleton.block_tensors(block.index):
            _put(block.module, name, self._get(block.module, name).to("meta"))
        for matrix in block.matrices:
            block.module.get_submodule(matrix.module).__dict__.pop("forward", None)

    def _cast_and_call(self, linear: nn.Module, stored: torch.Tensor, hidden: torch.Tensor) -> Any:
        """The output of a linear's own forward on its weight, which is cast to the computing dtype in one buffer.

        Casting all of a block at once takes two more blocks of memory (bfloat16 weights, float32 computing). Casting at
        each call takes about 3 % of the time of a matrix product with 1024 tokens on a CPU.
        """
        weight = self._cast_weight.empty({"": (stored.shape, self.dtype)})[""]
        _put(linear, "weight", weight.copy_(stored))
        return type(linear).forward(linear, hidden)

    def _run(self, tokens: np.ndarray) -> torch.Tensor:
        """Runs the model's own forward on stubs, up to the last block; gives the hidden states before the first."""
        try:
            self.skeleton.model(input_ids=self._ids(tokens), use_cache=False)
        except Stop:
            pass
        embedded, self._embedded = self._embedded, None
        self._compared.clear()
        if embedded is None or embedded.ndim != 3:
            raise ModelError(
                f"{type(self.skeleton.model).__name__}: its blocks do not pass (sequences, length, width) "
                "states on; it is not supported yet"
            )
        return embedded

    def _arrive(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the arguments of a stub that the model calls, and gives back its hidden states unchanged."""
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if self._final is not None:
            hidden = self._final if index == self.depth - 1 else hidden
            return (hidden,) if self.traces[index].returns_tuple else hidden
        if index == 0:
            self._embedded = hidden
        if index not in self.traces:
            self.traces[index] = trace(self.skeleton.blocks[index], self.skeleton.matrices[index], hidden, args, kwargs)
        calls = self._calls.setdefault(tuple(hidden.shape[:2]), [])
        if index == len(calls):
            calls.append((args, kwargs))
        elif not same_call(calls[index], (args, kwargs), self._compared):
            raise ModelError(
                f"{self.skeleton.path}.{index}: what it is called with depends on the tokens, which is not supported "
                "yet"
            )
        if index == self.depth - 1:
            raise Stop
        return (hidden,) if self.traces[index].returns_tuple else hidden

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self.device)

    def _computing(self, stored: torch.dtype) -> torch.dtype:
        return self.dtype if stored.is_floating_point else stored

    def _fill_on_demand(self) -> None:
        """Has each module outside the blocks load its parameters when it is called, except the head (see `Head`)."""
        outside, head = self.skeleton.outside(), self.skeleton.head
        for path, module in self.skeleton.model.named_modules():
            prefix = f"{path}." if path else ""
            own = {
                name: outside[prefix + name]
                for name in [*module._parameters, *module._buffers]
                if prefix + name in outside
            }
            if own and module is not head:
                self._hooks.append(module.register_forward_pre_hook(partial(self._fill, own, prefix)))
        for name, buffer in self.skeleton.model.named_buffers():
            if name not in outside and not name.startswith(f"{self.skeleton.path}."):
                _put(self.skeleton.model, name, buffer.to(self.device))

    def _fill(self, own: dict[str, str], prefix: str, module: nn.Module, args: Any) -> None:
        for name, tensor in own.items():
            if tensor not in self._filled:
                file = self.tensors[tensor]
                dtype = self._computing(DTYPES[file.dtype])
                self._filled[tensor] = read_cast(file, torch.empty(file.shape, dtype=dtype, device=self.device))
            _put(module, name, self._filled[tensor])

    def empty(self) -> None:
        """Drops the weights that were loaded outside the blocks, and the casts of blocks."""
        self._cast_weight, self._casts = Scratch(self.device), Scratch(self.device)
        for name, tensor in self.skeleton.outside().items():
            if tensor in self._filled:
                _put(self.skeleton.model, name, self._get(self.skeleton.model, name).to("meta"))
        self._filled.clear()

    @staticmethod
    def _get(module: nn.Module, name: str) -> torch.Tensor:
        owner, _, last = name.rpartition(".")
        return getattr(module.get_submodule(owner), last)  # type: ignore[no-any-return]


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = module.get_submodule(owner)
    setattr(module, last, nn.Parameter(tensor, requires_grad=False) if last in module._parameters else tensor)


def cast_bytes(model: StreamedModel) -> int:
    """The bytes that a decoder takes for casts of a block: one matrix, and everything that is not a matrix."""
    size, tensors = model.dtype.itemsize, model.checkpoint.tensors
    matrices = {matrix.tensor for matrix in model.skeleton.all_matrices}
    casts = [tensors[name].numel * size for name in matrices if DTYPES[tensors[name].dtype] != model.dtype]
    small = [
        sum(
            one.numel * size
            for one in model.block_tensors(index)
            if DTYPES[one.dtype] != model.dtype and one.name not in matrices
        )
        for index in range(model.depth)
    ]
    return max(casts, default=0) + max(small)
