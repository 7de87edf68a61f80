"""The transformers model of a checkpoint with every parameter on `meta`, and which file tensor each parameter is.

Nothing here depends on a model family: the list of blocks, the matrices and the names in the file are found by search.
"""

import re
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.reader import FLOATS
from lowmem_wanda.errors import CalibrationError, CheckpointError, ModelError
from lowmem_wanda.streaming.matrices import LINEARS, Matrix, find_matrices

BUILDING = threading.Lock()  # `init_empty_weights` changes torch's modules for all threads meanwhile
BUILD_ERRORS = (  # what transformers raises for configurations that do not describe a model
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, ArithmeticError, RuntimeError,
    AssertionError, IndexError,
)  # fmt: skip

logging.set_verbosity_error()  # where a warning of transformers matters, this package raises an error


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    `names` maps each parameter or buffer of the module to the file tensor it is loaded from; tied ones share a tensor.
    `path` is that of the list of decoder blocks, and `blocks` are its members. `untouched` are file tensors that the
    model knows but does not load.
    """

    model: nn.Module
    names: dict[str, str]
    path: str
    blocks: tuple[nn.Module, ...]
    untouched: tuple[str, ...]

    def block_tensors(self, index: int) -> dict[str, str]:
        """{parameter or buffer, relative to the block: file tensor} of one block."""
        prefix = f"{self.path}.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.names.items() if name.startswith(prefix)}

    @cached_property
    def matrices(self) -> tuple[tuple[Matrix, ...], ...]:
        """The matrices of each block."""
        return tuple(find_matrices(block, self.block_tensors(index)) for index, block in enumerate(self.blocks))

    @property
    def all_matrices(self) -> list[Matrix]:
        """The matrices of all blocks in one list."""
        return [matrix for block in self.matrices for matrix in block]

    @property
    def width(self) -> int:
        """The width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return int(self.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits of hidden states, as transformers names it; None where it names none."""
        return self.model.get_output_embeddings()  # type: ignore[operator, no-any-return]

    @property
    def positions(self) -> int | None:
        """The number of positions, by the names that configurations use; None where the model has no limit."""
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        names = ("max_position_embeddings", "max_seq_len")
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    @property
    def attention_heads(self) -> int:
        """The number of heads whose (length, length) scores are held at once; 0 where attention computes in pieces."""
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        eager = getattr(config, "_attn_implementation", None) == "eager"
        return int(getattr(config, "num_attention_heads", 0) or 0) if eager else 0

    def outside(self) -> dict[str, str]:
        """{parameter or buffer: file tensor} of all that lies outside the blocks."""
        return {name: tensor for name, tensor in self.names.items() if not name.startswith(f"{self.path}.")}


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
    """The model of a checkpoint, computed in `dtype`, with every file tensor accounted for.

    Raises ModelError for what is not a causal language model or cannot be walked yet, CheckpointError for tensors that
    are missing, of other shapes, or without a place in the model.
    """
    model = _build(checkpoint, dtype, trust_remote_code)
    names, unexpected = _match(model, checkpoint)
    blocks = _find_blocks(model)
    _require_no_experts(model, blocks)
    untouched = _account(model, checkpoint, names, unexpected)
    return Skeleton(model, names, blocks, tuple(model.get_submodule(blocks)), untouched)  # type: ignore[arg-type]


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False, **settings: Any) -> Any:
    """The checkpoint's own tokenizer as transformers makes it. Raises CalibrationError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=trust_remote_code, **settings
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CalibrationError(
            f"{checkpoint.path}: its tokenizer cannot be loaded ({first_line(error)}); add "
            "tokenizer.json, or give token ids (.npy) to --text"
        ) from None


def _build(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    declared = checkpoint.config().get("architectures") or []
    declared = declared if isinstance(declared, list) else [declared]
    if declared and not any(re.search(r"ForCausalLM|LMHeadModel", str(name)) for name in declared):
        raise ModelError(f"config.json: {declared[0]} is not a causal language model; only those are pruned")
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=trust_remote_code)
        with BUILDING, init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (*BUILD_ERRORS, StrictDataclassError) as error:
        raise ModelError(
            f"config.json: transformers cannot build a causal language model of it ({first_line(error)})"
        ) from None
    built: nn.Module = model.eval().requires_grad_(False)
    return built


def _match(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """({parameter or buffer: file tensor}, file tensors without a place), by transformers' own renaming."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names: dict[str, str] = {}
    unexpected = []
    for tensor in checkpoint.tensors:
        name, converted = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:
            name, converted = tensor, None
        if converted is not None and name in state:
            kind = "experts are" if "expert" in tensor else "it is"
            raise ModelError(
                f"tensor {tensor}: {kind} stored in another form than {type(model).__name__} computes "
                "with, which is not supported yet"
            )
        if name not in state:
            unexpected.append(tensor)
        elif name in names:
            raise CheckpointError(
                f"tensors {names[name]} and {tensor} are both {name} of {type(model).__name__}; remove one"
            )
        else:
            names[name] = tensor
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():  # transformers ties in either direction
        if target in names or source in names:
            names.setdefault(target, names.get(source, ""))
            names.setdefault(source, names[target])
    return names, unexpected


def _find_blocks(model: nn.Module) -> str:
    """The path of the list with the most parameters that does not lie in another list. Raises ModelError."""
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ModelError(f"{type(model).__name__}: no list of decoder blocks is found in it, so it cannot be streamed")
    sizes: dict[str, int] = {path: sum(parameter.numel() for parameter in lists[path].parameters()) for path in outer}
    return max(sizes, key=lambda path: sizes[path])


def _require_no_experts(model: nn.Module, blocks: str) -> None:
    """Raises ModelError for experts: linears in a list, or a matrix that neither a linear nor an embedding owns."""
    for path, module in model.get_submodule(blocks).named_modules():
        experts = isinstance(module, nn.ModuleList) and any(isinstance(part, LINEARS) for part in module.modules())
        known = isinstance(module, (*LINEARS, nn.Embedding))
        matrices = [
            name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1 and not known
        ]
        if (experts and path) or matrices:
            name = ".".join([blocks, path, *matrices[:1]])
            raise ModelError(
                f"{name}: mixture-of-experts and other blocks with matrices outside linear layers are not supported yet"
            )


def _account(model: Any, checkpoint: Checkpoint, names: dict[str, str], unexpected: list[str]) -> tuple[str, ...]:
    """The `unexpected` tensors, all of which transformers ignores, too.

    Raises CheckpointError for any other tensor without a place, and for one that is missing or has another shape or
    dtype than the model.
    """
    for name, parameter in model.state_dict().items():
        if name not in names:
            raise CheckpointError(
                f"{checkpoint.path}: holds no tensor for {name} of {type(model).__name__} (config.json and "
                "weights disagree); download it again"
            )
        tensor = checkpoint.tensors[names[name]]
        if tensor.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is {list(tensor.shape)}, config.json makes it "
                f"{list(parameter.shape)}; download both again"
            )
        if tensor.dtype not in FLOATS and parameter.is_floating_point():
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype}, not floating point; get the "
                "unquantized checkpoint"
            )
    # these two are old buffers that transformers, too, ignores in every family
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    for name in unexpected:
        if not any(re.search(pattern, name) for pattern in patterns):
            raise CheckpointError(
                f"{checkpoint.tensors[name].file.name}: tensor {name} has no place in "
                f"{type(model).__name__} as config.json describes it, "
                "so it would not be pruned; correct config.json or remove the tensor"
            )
    return tuple(unexpected)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's class."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
