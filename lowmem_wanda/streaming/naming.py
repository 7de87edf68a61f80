"""Which file tensor each parameter of a model is, with every file tensor accounted for."""

import re
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lowmem_wanda.checkpoint.directory import Checkpoint
from lowmem_wanda.checkpoint.reader import FLOATS, Tensor
from lowmem_wanda.errors import CheckpointError
from lowmem_wanda.streaming.layout import Sources, View, views, whole

NUMBERED = re.compile(r"(^|\.)\d+\.")


def match(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, View], list[str]]:
    """({parameter or buffer: where its values lie}, file tensors without a place), by transformers' own renaming.

    Raises ModelError for what is stored in another form than a view can be of, CheckpointError for two tensors of one
    parameter.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names: dict[str, View] = {}
    groups: dict[str, Sources] = {}
    unexpected = []

    def place(name: str, view: View) -> None:
        if name in names:
            raise CheckpointError(
                f"tensors {names[name].tensor} and {view.tensor} are both {name} of {type(model).__name__}; remove one"
            )
        names[name] = view

    for tensor in sorted(checkpoint.tensors, key=dot_natural_key) if converters else checkpoint.tensors:
        name, converted = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:
            name, converted = tensor, None
        if name not in state:
            unexpected.append(tensor)
        elif converted is None:
            place(name, whole(tensor, checkpoint.tensors[tensor].shape))
        else:
            groups.setdefault(name, {}).setdefault(converted, []).append(tensor)
    known = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for name, sources in groups.items():
        for parameter, view in views(model, name, sources, known[next(iter(sources))], shapes).items():
            place(parameter, view)
    _tie(model, names)
    return names, unexpected


def _tie(model: Any, names: dict[str, View]) -> None:
    """Gives tied parameters the view of each other, in either direction, as transformers does."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if view := names.get(target) or names.get(source):
            names.setdefault(target, view)
            names.setdefault(source, view)


def account(
    model: Any, checkpoint: Checkpoint, names: dict[str, View], unexpected: list[str], blocks: str
) -> tuple[str, ...]:
    """The `unexpected` tensors, none of which can be a matrix of the `blocks`; they are copied as they are.

    Raises CheckpointError for any other tensor without a place, and for one that is missing or has another shape or
    dtype than the model.
    """
    _require_no_prefix(model, checkpoint, names, unexpected)
    for name, parameter in model.state_dict().items():
        if name not in names:
            raise CheckpointError(
                f"{checkpoint.path}: holds no tensor for {name} of {type(model).__name__} (config.json and "
                "weights disagree); download it again"
            )
        tensor = checkpoint.tensors[names[name].tensor]
        if not tensor.numel and not parameter.numel():
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is empty, {list(tensor.shape)}, and config.json makes it "
                "so; get the checkpoint of a model"
            )
        if not tensor.numel:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} is empty, as DeepSpeed ZeRO-3 leaves it where it saves "
                "without gathering; save again with zero_to_fp32.py or stage3_gather_16bit_weights_on_model_save"
            )
        if names[name].shape != tuple(parameter.shape):
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
    patterns += _predicting_more(model, blocks)
    for name in unexpected:
        tensor = checkpoint.tensors[name]
        outside = not NUMBERED.search(name) and not name.startswith(f"{blocks}.")
        if not (outside or _is_mask(tensor) or any(re.search(pattern, name) for pattern in patterns)):
            raise CheckpointError(
                f"{tensor.file.name}: tensor {name} has no place in {type(model).__name__} as config.json describes "
                "it, so it would not be pruned; correct config.json or remove the tensor"
            )
    return tuple(unexpected)


def _predicting_more(model: Any, blocks: str) -> list[str]:
    """Patterns of the blocks behind the last one that predict further tokens (MTP), which the model does not load."""
    count, depth = getattr(model.config, "num_nextn_predict_layers", 0) or 0, len(model.get_submodule(blocks))
    return [rf"^{re.escape(blocks)}\.{depth + index}\." for index in range(count)]


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor is a flag, a number or an attention mask, as older versions saved them among the weights."""
    square = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return tensor.numel == 1 or square or tensor.dtype in ("U8", "BOOL")


def _require_no_prefix(model: Any, checkpoint: Checkpoint, names: dict[str, View], unexpected: list[str]) -> None:
    """Raises CheckpointError if all names begin with what a wrapper of the model put there."""
    missing = model.state_dict().keys() - names.keys()
    if not missing or not unexpected:
        return
    first = unexpected[0]
    for end in (place for place, sign in enumerate(first) if sign == "."):
        prefix, rest = first[: end + 1], first[end + 1 :]
        known = {rest, f"{model.base_model_prefix}.{rest}"} & missing
        if known and all(name.startswith(prefix) for name in unexpected):
            raise CheckpointError(
                f"{checkpoint.tensors[first].file.name}: the names of its tensors begin with {prefix!r}, as "
                "torch.compile, DDP, FSDP or peft wrap a model; save the model within, or rename them"
            )
