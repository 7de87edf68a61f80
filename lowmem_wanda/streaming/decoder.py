"""A causal language model that is run one decoder block at a time, with weights that are loaded when they are needed.

The model's own forward runs on stubs in the blocks' places. It computes the embeddings, masks, rotary tables and every
argument that it would pass to each block, and the stubs keep those. Each real block is then called with exactly what
the model would have passed. `calls` has what is proved meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lowmem_wanda.errors import LowmemError, ModelError, first_line, limit_of_machine
from lowmem_wanda.streaming.block import Block, Stop
from lowmem_wanda.streaming.calls import Beside, Calls
from lowmem_wanda.streaming.casts import Casts
from lowmem_wanda.streaming.experts import expert_parameters
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.numbers import require_known
from lowmem_wanda.streaming.outside import Outside, get, put
from lowmem_wanda.streaming.parts import Part, group_view
from lowmem_wanda.streaming.resources import anonymous, free_memory
from lowmem_wanda.streaming.stubs import Stub, same_values
from lowmem_wanda.streaming.tracing import Trace, trace

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class Decoder:
    """Embeds token ids, gives blocks their weights, and applies the head.

    It puts stubs and hooks into the model's skeleton, and takes them away when it is closed. It holds the cast of one
    matrix at a time, and the embeddings only while it embeds; blocks lie in the memory of their slots. Hidden states
    are (sequences, length, width) in the computing dtype.
    """

    def __init__(self, model: StreamedModel) -> None:
        self.model, self.skeleton, self.tensors = model, model.skeleton, model.checkpoint.tensors
        self.device, self.dtype = model.device, model.dtype
        self.traces = self.skeleton.traces
        self._calls = Calls(self.skeleton.path, len(self.skeleton.blocks), self.device)
        self._final: torch.Tensor | None = None  # what the last block puts out while the head is applied
        self._last: torch.Tensor | None = None  # what the last stub hands on to the head, where that is given
        self._at_head: torch.Tensor | None = None  # what arrived at the head in the last forward on stubs
        for index, block in enumerate(self.skeleton.blocks):
            self._list[index] = Stub(block, partial(self._arrive, index))
        self._outside, head = Outside(model), self.skeleton.head
        self._hook = head.register_forward_pre_hook(self._reached) if head is not None else None
        self.empty()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        """Takes the stubs, the hooks and all loaded weights out of the model again."""
        if self._hook is not None:
            self._hook.remove()
        for index, block in enumerate(self.skeleton.blocks):
            self._list[index] = block
        self.empty()
        self._outside.close()
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
        device). The other arguments of each block are kept. Raises ModelError where the blocks are not a chain, and
        BudgetError where arguments that depend on the tokens take too much memory.
        """
        states, start = torch.empty(0), 0
        micro_batches: list[torch.Tensor] = []
        for tokens in batches:
            embedded = self._run(tokens)
            if not micro_batches:
                require_known(self.model, [embedded, *self._calls.tensors()])
                self._prove(tokens)
                shape = (sum(tokens.size for tokens in batches), embedded.shape[-1])
                states = allocate(shape, embedded.dtype) if allocate else embedded.new_empty(shape)
            micro_batches.append(states[start : start + tokens.size].view(embedded.shape).copy_(embedded))
            self._calls.keep(micro_batches[-1])
            start += tokens.size
            boards = sum(trace.written for trace in self.traces.values()) * sum(tokens.size for tokens in batches)
            self._calls.require_room(len(micro_batches), len(batches), self._left, boards)
        self.empty()
        return micro_batches

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits that the model makes of hidden states (sequences, length, width) after its last block.

        The model applies its own norm, its head, and its own scales and soft caps. `Head` loads the head's weight.
        Raises ModelError where the model's own code fails.
        """
        self._final = hidden
        any_ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        try:
            with self._outside.embedding_nothing():
                output = self.skeleton.model(input_ids=any_ids, use_cache=False)
        except Exception as error:
            raise self._failed(error, "its head cannot be applied alone") from error
        finally:
            self._final = None
        return output.logits  # type: ignore[no-any-return]

    def load(self, index: int, stored: dict[str, torch.Tensor], groups: Any) -> Block:
        """The block `index` with its file tensors `stored`, which lie on the device; others come with its `groups`."""
        module, views = self.skeleton.blocks[index], self.skeleton.views[index]
        trace = self.traces.get(index) or Trace(self.skeleton.matrices[index], (), None)
        self._casts.load(module, views, stored, {matrix.module for matrix in trace.matrices})
        for name, buffer in module.named_buffers():
            if name not in views:
                put(module, name, buffer.to(self.device))
        for part in groups.coming:
            experts = module.get_submodule(part.path).__dict__
            experts.setdefault("pauses", set()).add(part.first)
            experts["parking"] = groups.parking
        block = Block(index, module, stored, trace, self._calls, views, self.device, self.dtype, groups)
        groups.block = block
        return block

    def load_group(self, block: Block, part: Part, stored: dict[str, torch.Tensor]) -> None:
        """Loads a group of experts of a block, whose file tensors `stored` lie on the device."""
        module = block.module.get_submodule(part.path)
        for name in expert_parameters(module):
            put(module, name, group_view(block.views[f"{part.path}.{name}"], part).of(stored))
        module.__dict__["first_expert"] = part.first
        block.stored.update(stored)
        block.part = part

    def release_group(self, block: Block, part: Part, stored: dict[str, torch.Tensor]) -> None:
        """Takes a group of experts out of the model again."""
        module = block.module.get_submodule(part.path)
        for name in expert_parameters(module):
            shape = block.views[f"{part.path}.{name}"].shape
            put(module, name, torch.empty(shape, dtype=self.dtype, device="meta"))
        module.__dict__.pop("first_expert")
        for name in stored:
            del block.stored[name]
        block.part = None

    def release(self, block: Block) -> None:
        """Takes a block's weights out of the model again."""
        for name in block.views:
            put(block.module, name, get(block.module, name).to("meta"))
        for module in block.module.modules():
            for name in ("pauses", "parking"):
                module.__dict__.pop(name, None)
        self._casts.release(block.module, {matrix.module for matrix in block.matrices})

    def _run(self, tokens: np.ndarray, last: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the model's own forward on stubs, up to its head; gives the hidden states before the first block.

        `last` is what the last stub hands on to the head (default: random numbers).
        """
        self._calls.begin()
        self._last, self._at_head = last, None
        self._outside.load_embeddings()
        try:
            self.skeleton.model(input_ids=self._ids(tokens), use_cache=False)
        except Stop:
            pass
        except Exception as error:
            if (
                not self._calls.whole or isinstance(error, LowmemError) or limit_of_machine(error)
            ):  # a head may need the weights that it lacks
                raise self._failed(error, "its forward fails without its blocks") from error
        embedded, name = self._calls.first, type(self.skeleton.model).__name__
        if embedded is None or embedded.is_meta or embedded.ndim != 3 or embedded.shape[:2] != tokens.shape:
            raise ModelError(
                f"{name}: its blocks do not pass (sequences, length, width) states on, one for each token; it is not "
                "supported yet"
            )
        if not self._calls.whole:
            raise ModelError(
                f"{name}: calls {len(self._calls.now)} of the {self.depth} blocks in {self.skeleton.path} on text; it "
                "is not supported yet"
            )
        return embedded

    def _failed(self, error: Exception, what: str) -> Exception:
        """The error to raise for one of the model's own code, which may raise anything."""
        if isinstance(error, (LowmemError, torch.OutOfMemoryError)) or limit_of_machine(error):
            return error
        return ModelError(
            f"{type(self.skeleton.model).__name__}: {what} ({first_line(error)}); it is not supported yet"
        )

    def _prove(self, tokens: np.ndarray) -> None:
        """Proves, after a run on `tokens`, that no block but the next, and of the last one the head, uses its output.

        Raises ModelError where what blocks are called with depends on what others put out, or where the head is given
        something beside what the last block puts out.
        """
        calls, first, handed, arrived = self._calls.now, self._calls.first, self._calls.handed, self._at_head
        self._run(tokens)
        self._calls.require_equal(calls)
        if arrived is not None:
            self._run(np.roll(tokens, 1, axis=1), last=handed)
            if self._at_head is None or not same_values(self._at_head, arrived):
                raise ModelError(
                    f"{type(self.skeleton.model).__name__}: its head is given something beside what its last block "
                    "puts out, which is not supported yet"
                )
        self._calls.now, self._calls.first = calls, first

    def _left(self) -> int:
        """The bytes that may still be taken where it is computed."""
        budget, on_host = self.model.budget, self.device.type == "cpu"
        limit = budget.max_ram and budget.max_ram - anonymous() if on_host else budget.max_vram
        return min(free_memory(self.device), limit) if limit else free_memory(self.device)

    def _arrive(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the arguments of a stub that the model calls; gives what a block would give in its place."""
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if self._final is None:
            self._calls.arrive(index, hidden, (args, kwargs))
            if index not in self.traces:
                self.traces[index] = self._traced(index, hidden)
        last = index == self.depth - 1
        if self._final is not None:
            output = self._final if last else hidden
        elif last and self.skeleton.head is None:
            raise Stop
        else:
            output = self._calls.hand_on(hidden) if self._last is None or not last else self._last
        beside = self.traces[index].beside
        return output if beside is None else (output, *(None if none else Beside() for none in beside))

    def _traced(self, index: int, hidden: torch.Tensor) -> Trace:
        """The trace of a block that has just been called."""
        call, before = self._calls.with_boards(self._calls.now[index]), self._calls.traced_bytes()
        matrices, views = self.skeleton.matrices[index], self.skeleton.views[index]
        found = trace(self.skeleton.blocks[index], matrices, views, self.skeleton.shapes, hidden, call)
        written = (self._calls.traced_bytes() - before) // hidden.shape[:2].numel()
        return replace(found, written=max(0, written))

    def _reached(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Ends a forward on stubs where the head is called."""
        if self._final is None:
            self._at_head = args[0] if args else None
            raise Stop

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self.device)

    def empty(self) -> None:
        """Drops the weights that were loaded outside the blocks, and the casts of blocks."""
        self._casts = Casts(self.device, self.dtype)
        self._outside.empty()
