"""The transformers model of a checkpoint with every parameter on `meta`, and which file tensor each parameter is.

Nothing here depends on a model family: the list of blocks, the matrices and the names in the file are found by search.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.errors import ModelError, first_line
from lowmem_wanda.streaming.building import without_memory
from lowmem_wanda.streaming.experts import ONE_BY_ONE, is_experts
from lowmem_wanda.streaming.layout import View
from lowmem_wanda.streaming.matrices import Matrix, find_matrices, own_forward, unowned
from lowmem_wanda.streaming.naming import account, match
from lowmem_wanda.streaming.tracing import Trace

GENERATES = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration|ForImageTextToText")  # classes of models
PLAIN = (None, "eager", "sdpa")  # ways to compute attention that torch alone has
MANY = 4096  # layers or experts that are built without a look at the tensors
COUNTS = re.compile(r"(^|_)(n|num|encoder|decoder)_(\w+_)*(layer|block|expert)s?$")  # keys that say how many
BUILD_ERRORS = (  # what transformers raises for configurations that do not describe a model
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, ArithmeticError, RuntimeError,
    AssertionError, IndexError,
)  # fmt: skip

logging.set_verbosity_error()  # where a warning of transformers matters, this package raises an error


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    `names` maps each parameter or buffer of the module to the file tensors it lies in; tied ones share them. `path` is
    that of the list of decoder blocks, and `blocks` are its members. `untouched` are file tensors that the model knows
    but does not load. `shapes` are those of all file tensors. `traces` are those of the blocks that were
    called so far.
    """

    model: nn.Module
    names: dict[str, View]
    path: str
    blocks: tuple[nn.Module, ...]
    untouched: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    traces: dict[int, Trace] = field(default_factory=dict)

    @cached_property
    def views(self) -> tuple[dict[str, View], ...]:
        """{parameter or buffer, relative to the block: where it lies} of each block."""
        found: list[dict[str, View]] = [{} for _ in self.blocks]
        for name, view in self.names.items():
            if name.startswith(f"{self.path}."):
                index, _, rest = name.removeprefix(f"{self.path}.").partition(".")
                found[int(index)][rest] = view
        return tuple(found)

    @cached_property
    def matrices(self) -> tuple[tuple[Matrix, ...], ...]:
        """The matrices of each block, as far as its modules show; `tracing` says which of them are pruned."""
        return tuple(
            find_matrices(block, views, self.shapes) for block, views in zip(self.blocks, self.views, strict=True)
        )

    @cached_property
    def is_plain(self) -> bool:
        """Whether blocks are of linears alone, so that what is a matrix is known without a trace."""
        return not any(
            unowned(block) or any(is_experts(module) or own_forward(module) for module in block.modules())
            for block in self.blocks
        )

    def shares(self, index: int) -> Mapping[str, float]:
        """{module of experts: the share of its experts that each token is given to} of a block, once it is traced."""
        return self.traces[index].shares if index in self.traces else {}

    @property
    def all_matrices(self) -> list[Matrix]:
        """The matrices of all blocks in one list."""
        return [matrix for block in self.matrices for matrix in block]

    @property
    def width(self) -> int:
        """The width of the hidden states."""
        return self._number("hidden_size")

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self._number("vocab_size")

    def _number(self, key: str) -> int:
        value = getattr(self.model.config.get_text_config(), key, None)  # type: ignore[operator, union-attr]
        if type(value) is not int:
            raise ModelError(f"{type(self.model).__name__}: its configuration has no {key}; it is not supported yet")
        return value

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits of hidden states, as transformers names it; None where it names none."""
        return self.model.get_output_embeddings()  # type: ignore[operator, no-any-return]

    @property
    def positions(self) -> int | None:
        """The number of positions, by the names that configurations use; None where the model has no limit.

        Where rotary positions are scaled as the text grows (dynamic NTK), they are the scaled ones.
        """
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        names = ("max_position_embeddings", "max_seq_len")
        values = (getattr(config, name, None) for name in names)
        found = next((value for value in values if isinstance(value, int) and value > 0), None)
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        if found and isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
            return int(found * max(1, rope.get("factor", 1)))  # which only then stretches beyond them
        return found

    @property
    def sees_images(self) -> bool:
        """Whether the model takes images, too, by its configuration."""
        return getattr(self.model.config, "vision_config", None) is not None

    @property
    def attention_heads(self) -> int:
        """The number of heads whose (length, length) scores are held at once; 0 where attention computes in pieces."""
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        eager = getattr(config, "_attn_implementation", None) == "eager"
        return int(getattr(config, "num_attention_heads", 0) or 0) if eager else 0

    def outside(self) -> dict[str, View]:
        """{parameter or buffer: where it lies} of all that lies outside the blocks."""
        return {name: view for name, view in self.names.items() if not name.startswith(f"{self.path}.")}


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
    """The model of a checkpoint, computed in `dtype`, with every file tensor accounted for.

    Raises ModelError for what is not a causal language model or cannot be walked yet, CheckpointError for tensors that
    are missing, of other shapes, or without a place in the model.
    """
    made = checkpoint.written_config() is not None
    model = build_model(checkpoint, dtype, trust_remote_code, checkpoint.config() if made else None)
    names, unexpected = match(model, checkpoint)
    blocks = _find_blocks(model)
    untouched = account(model, checkpoint, names, unexpected, blocks)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    skeleton = Skeleton(model, names, blocks, tuple(model.get_submodule(blocks)), untouched, shapes)  # type: ignore[arg-type]
    _require_own_tensors(skeleton)
    return skeleton


def build_structure(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Skeleton:
    """The model of a checkpoint whose weights are not read, as those of int4: no parameter has a file tensor.

    Raises ModelError for what is not a causal language model.
    """
    content = {key: value for key, value in checkpoint.config().items() if key != "quantization_config"}
    model = build_model(checkpoint, torch.float32, trust_remote_code, content)
    blocks = _find_blocks(model)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return Skeleton(model, {}, blocks, tuple(model.get_submodule(blocks)), (), shapes)  # type: ignore[arg-type]


def _require_own_tensors(skeleton: Skeleton) -> None:
    """Raises ModelError where two blocks share a file tensor: pruned in the one, it would change in the other."""
    owners: dict[str, int] = {}
    for index, views in enumerate(skeleton.views):
        for name in {name for view in views.values() for name in view.tensors}:
            if owners.setdefault(name, index) != index:
                raise ModelError(
                    f"tensor {name}: is of both {skeleton.path}.{owners[name]} and {skeleton.path}.{index}; blocks "
                    "that share weights are not supported"
                )


def build_model(
    checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool, content: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model of a checkpoint's config.json, or of another `content` of it, with every parameter on `meta`.

    Raises ModelError.
    """
    declared = checkpoint.config().get("architectures") or []
    declared = declared if isinstance(declared, list) else [declared]
    if declared and not any(GENERATES.search(str(name)) for name in declared):
        raise ModelError(f"config.json: {declared[0]} is not a causal language model; only those are pruned")
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=trust_remote_code)
        if content is not None:
            config = type(config).from_dict(dict(content))
        _require_sane(config, checkpoint)
        if getattr(config, "_attn_implementation", None) not in PLAIN:
            config._attn_implementation = None  # an optional package, or code that would be looked up on the network
        with without_memory():
            model = _class_for(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except (*BUILD_ERRORS, StrictDataclassError) as error:
        raise ModelError(
            f"config.json: transformers cannot build a causal language model of it ({first_line(error)})"
        ) from None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(ONE_BY_ONE)
    built: nn.Module = model.eval().requires_grad_(False)
    return built


def _class_for(config: Any) -> Any:
    """The automatic class that knows a configuration's type: of causal language models, or of those that see images.

    Raises ModelError for an encoder and a decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"config.json: {config.model_type} is an encoder and a decoder; only decoders are pruned")
    of_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    only_images = config.model_type in of_images and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if only_images else AutoModelForCausalLM


def _require_sane(config: Any, checkpoint: Checkpoint) -> None:
    """Raises ModelError for a number of layers or experts that no file has and that would take forever to build."""
    numbers = (int(part) for name in checkpoint.tensors for part in name.split(".") if part.isdigit() and len(part) < 9)
    held = max(numbers, default=-1) + 1
    for part in (config, config.get_text_config()):
        for key in sorted(set(vars(part)) | set(part.attribute_map)):
            value = getattr(part, key, None) if COUNTS.search(key) else None
            if type(value) is int and value > max(MANY, 4 * held):
                raise ModelError(
                    f"config.json: {key} is {value}, where the names of the tensors count to {held}; get the "
                    "config.json of this very checkpoint"
                )


def _find_blocks(model: nn.Module) -> str:
    """The path of the list of decoder blocks: of the lists that lie in no other list, that which text goes through.

    Where there are several, the model's forward is run on `meta` to see whose members it calls. Where that does not
    tell, it is the one with the most parameters. Raises ModelError where there is none.
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ModelError(f"{type(model).__name__}: no list of decoder blocks is found in it, so it cannot be streamed")
    called = _called_on_text(copy.deepcopy(model), outer) if len(outer) > 1 else set()
    sizes: dict[str, int] = {path: sum(parameter.numel() for parameter in lists[path].parameters()) for path in outer}
    return max(sizes, key=lambda path: (path in called, sizes[path]))


class _Answers(TorchDispatchMode):
    """Answers questions about values on `meta`, such as whether a mask is all ones, with yes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _called_on_text(model: nn.Module, lists: list[str]) -> set[str]:
    """The paths of the lists a member of which is called in a forward of two tokens on `meta`, as far as that runs."""
    called: set[str] = set()
    for path in lists:
        for module in model.get_submodule(path).children():
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    try:
        with torch.no_grad(), _Answers():
            model.to("meta")(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception:  # what a model's own code raises is not known; some of it needs data
        pass
    return called
