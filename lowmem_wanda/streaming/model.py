"""A model that is opened to be streamed: its checkpoint, its skeleton, a device and a dtype."""

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lowmem_wanda import __version__
from lowmem_wanda.checkpoint.directory import Checkpoint, require_prunable, require_trust
from lowmem_wanda.checkpoint.reader import FLOATS, Tensor
from lowmem_wanda.errors import CalibrationError, ModelError, first_line
from lowmem_wanda.streaming.buffers import DTYPES
from lowmem_wanda.streaming.machine import ANY, Budget, Machine
from lowmem_wanda.streaming.parts import Part, parts_of
from lowmem_wanda.streaming.resources import SMALL, map_blocks_from
from lowmem_wanda.streaming.skeleton import Skeleton, build_skeleton, build_structure
from lowmem_wanda.streaming.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A model without weights, ready to be walked block by block.

    It is computed in `dtype` on `device`, `batch` sequences at a time (None: as many as fit), within `budget`.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    device: torch.device
    dtype: torch.dtype
    batch: int | None
    budget: Budget
    trust_remote_code: bool

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.skeleton.blocks)

    @property
    def dtype_name(self) -> str:
        """The name of the computing dtype, as --dtype takes it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def place(self) -> str:
        """The device in words; where it has no bfloat16, which most weights are stored in, also that this is so."""
        wide = self.dtype == torch.float32 and self.device.type != "cpu" and self.budget.free_vram is None
        lacks = wide and _stored(self.checkpoint) == torch.bfloat16 and not _has_bfloat16(self.device)
        return f"{self.device}" + " (in float32, because it has no bfloat16)" * lacks

    def window(self, length: int) -> int:
        """`length`, or the model's number of positions where that is smaller."""
        return min(length, self.skeleton.positions or length)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text by the model's own tokenizer, with the special tokens that it adds.

        The tokenizer is loaded with the first text. Raises CalibrationError where it cannot be loaded.
        """
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        """A chat as one text by the model's own chat template; "" where it has none.

        The token that the tokenizer puts before every text is left out, because `encode` adds it. Raises
        CalibrationError where the template does not take the chat.
        """
        tokenizer = self._tokenizer
        if not getattr(tokenizer, "chat_template", None):
            return ""
        try:
            text = str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False))
        except ImportError:
            raise CalibrationError(
                "a chat template needs a package that is not installed: pip install jinja2"
            ) from None
        except Exception as error:  # a template may raise anything
            raise CalibrationError(
                f"{self.checkpoint.path}: its chat template does not take a chat of {len(messages)} messages "
                f"({first_line(error)}); give texts, or other chats"
            ) from None
        first, start = getattr(tokenizer, "bos_token", None), self.encode("")[:1]
        return text.removeprefix(first) if first and start == [tokenizer.bos_token_id] else text

    def block_tensors(self, index: int) -> list[Tensor]:
        """The file tensors of one block."""
        names = {name for view in self.skeleton.views[index].values() for name in view.tensors}
        return [self.checkpoint.tensors[name] for name in sorted(names)]

    def parts(self, index: int, limit: int = 0, tensors: Mapping[str, Tensor] | None = None) -> list[Part]:
        """The parts of a block, whose groups of experts take at most `limit` bytes (0: it is one part).

        They are of the file tensors of the checkpoint, or of `tensors` of the same names.
        """
        known = self.checkpoint.tensors if tensors is None else tensors
        return parts_of(self.skeleton.blocks[index], self.skeleton.views[index], known, limit)

    def part_bytes(self, limit: int = 0) -> int:
        """The bytes that the largest part of any block takes in a buffer."""
        if limit not in self._part_bytes:
            found = (part.nbytes for index in range(self.depth) for part in self.parts(index, limit))
            self._part_bytes[limit] = max(found)
        return self._part_bytes[limit]

    @cached_property
    def outside(self) -> list[Tensor]:
        """The file tensors that lie in no block."""
        inside = {tensor.name for index in range(self.depth) for tensor in self.block_tensors(index)}
        return [tensor for tensor in self.checkpoint.tensors.values() if tensor.name not in inside]

    def group_limits(self) -> list[int]:
        """Sizes of groups of experts that are worth a try, in bytes: halves of the largest block, down to 1 %."""
        whole, least = self.part_bytes(), self.part_bytes(1)
        found = [whole >> halved for halved in range(2, 8) if whole >> halved > least]
        return [*found, least] if least < whole // 2 else []

    @property
    def block_bytes(self) -> int:
        """The bytes that the largest block takes in a buffer."""
        return self.part_bytes()

    @cached_property
    def _part_bytes(self) -> dict[int, int]:
        """What `part_bytes` found."""
        return {}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint, self.trust_remote_code)


def open_model(source: str | Path, machine: Machine = ANY) -> StreamedModel:
    """The model in the folder `source`, without its weights.

    Raises CheckpointError or ModelError where it holds no model that can be walked, or the device is not available.
    """
    map_blocks_from(SMALL)  # a walk before this one may have left a larger limit
    checkpoint = Checkpoint(source, machine.dequantize)
    require_prunable(checkpoint, machine.trust_remote_code)
    elsewhere = machine.budget.free_vram  # of a machine that is not here
    device = find_device(machine.device) if elsewhere is None else torch.device("cuda" if elsewhere else "cpu")
    dtype = find_dtype(machine.dtype, device, checkpoint, recent=bool(elsewhere))
    return StreamedModel(
        checkpoint=checkpoint,
        skeleton=build_skeleton(checkpoint, dtype, machine.trust_remote_code),
        device=device,
        dtype=dtype,
        batch=machine.batch,
        budget=machine.budget,
        trust_remote_code=machine.trust_remote_code,
    )


def open_structure(checkpoint: Checkpoint, machine: Machine = ANY) -> StreamedModel:
    """The model of a checkpoint whose weights are not computed with, whatever their form.

    Raises CheckpointError or ModelError where it holds no model, or runs code that is not trusted.
    """
    require_trust(checkpoint, machine.trust_remote_code)
    return StreamedModel(
        checkpoint=checkpoint,
        skeleton=build_structure(checkpoint, machine.trust_remote_code),
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch=None,
        budget=machine.budget,
        trust_remote_code=machine.trust_remote_code,
    )


def cast_bytes(model: StreamedModel) -> int:
    """The bytes that a decoder takes for casts of a block: one matrix, and everything that is not a matrix.

    Of experts that transformers computes in its own way, all of a layer are cast at once.
    """
    size, tensors = model.dtype.itemsize, model.checkpoint.tensors
    most = 0
    for index, matrices in enumerate(model.skeleton.matrices):
        cast = {one.name for one in model.block_tensors(index) if DTYPES[one.dtype] != model.dtype}
        known = {matrix.tensor for matrix in matrices}
        largest = max((matrix.weights for matrix in matrices if matrix.tensor in cast), default=0)
        most = max(most, largest + sum(tensors[name].numel for name in cast - known))
    return most * size


def versions() -> dict[str, str]:
    """The versions of the packages, the Python and the platform that a job runs on."""
    return {
        "lowmem-wanda": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": metadata.version("safetensors"),
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def find_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda", "cuda:N" or "mps". Raises ModelError where it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(
        kind, False
    )
    if not available or (
        number and not (number.isdigit() and kind == "cuda" and int(number) < torch.cuda.device_count())
    ):
        raise ModelError(f"--device {name} is not available here (torch {torch.__version__}); give cpu or auto")
    return torch.device("cuda", int(number or 0)) if kind == "cuda" else torch.device(kind)


def find_dtype(name: str, device: torch.device, checkpoint: Checkpoint, recent: bool = False) -> torch.dtype:
    """The computing dtype for `name`. "auto" is the dtype that most weights are stored in, but float32 on a CPU.

    Also on a GPU that has no bfloat16 it is float32 instead of bfloat16. A GPU that is not here is taken for a `recent`
    one, which has it.

    A CPU without bfloat16 units multiplies float32 matrices 60 times as fast (61 against 0.9 GFLOP/s).
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cpu":
        return torch.float32
    stored = _stored(checkpoint)
    if stored == torch.float64 or (stored == torch.bfloat16 and not recent and not _has_bfloat16(device)):
        return torch.float32
    return stored


def _stored(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most weights are stored in."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.numel
    return DTYPES[max(sizes, key=lambda kind: sizes[kind])]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by itself; GPUs before NVIDIA's Ampere do not, or slowly."""
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def describe_device(device: torch.device) -> str:
    """The device and its kind, such as "cuda (NVIDIA H100)". Results of another kind may be rounded differently."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type
