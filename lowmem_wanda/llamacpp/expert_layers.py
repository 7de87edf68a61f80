"""Where the experts of a GGUF are: which tensors hold one slice for each expert, told by llama.cpp's names and shapes.

The names are those of the gguf package's tables; no model family is named here. Shapes alone do not tell: a width may
equal the number of experts by chance.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.errors import ModelError
from lowmem_wanda.llamacpp.gguf_file import GGUF
from lowmem_wanda.llamacpp.gguf_values import U32, Field
from lowmem_wanda.llamacpp.names import package
from lowmem_wanda.sparsity.experts import require_kept

IN_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
SEPARATE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")  # one tensor for each expert, until 2024
PARTS = ("weight", "bias")
MOST_RAW = 1 << 16  # bytes of a value; of numbers for each layer far fewer
SUSPECT = re.compile(r"ffn|exp|rout|moe")  # names that may speak of experts
IDS = ("I8", "I16", "I32", "I64")  # types of whole numbers, which may be ids of experts
# llama.cpp's fused CUDA routing takes powers of two up to 512, and 576 (ggml-cuda/topk-moe.cu)
FUSED_MOST, FUSED_BESIDE = 512, 576


@dataclass(frozen=True)
class ExpertLayers:
    """The layers of a GGUF that have experts.

    Each has `count` experts, of which the router chooses `used` for a token, from `groups_used` of `groups` groups.
    `layers` are {number of a block: names of its tensors that have a slice for each expert}. `predicting` are those
    that predict further tokens (MTP), which come last and do not run in an ordinary forward pass.
    """

    count: int
    used: int
    groups: int
    groups_used: int
    layers: Mapping[int, tuple[str, ...]]
    predicting: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, int]:
        """{name of a tensor that is cut: number of its block}."""
        return {name: block for block, names in self.layers.items() for name in names}

    def down(self, block: int) -> str:
        """The name of a layer's down projections."""
        return f"blk.{block}.ffn_down_exps.weight"

    def matrices(self, block: int) -> list[str]:
        """The names of a layer's expert weights."""
        return [name for name in self.layers[block] if name.endswith("_exps.weight")]

    def require(self, keep: int) -> None:
        """Raises PatternError if a model with `keep` experts would not work, or would be this one."""
        require_kept(self.count, keep, self.used, self.groups, self.groups_used)


def routing_facts(keep: int) -> dict[str, bool]:
    """What a number of experts means for programs: whether llama.cpp's fused CUDA routing takes it, and so on."""
    power = keep & (keep - 1) == 0
    return {
        "power_of_two": power,
        "fused_cuda_routing": (power and keep <= FUSED_MOST) or keep == FUSED_BESIDE,
        "multiple_of_8": keep % 8 == 0,
    }


def expert_layers(model: GGUF) -> ExpertLayers:
    """The expert layers of a GGUF. Raises ModelError if it has none, or has experts that are not understood."""
    architecture = model.text("general.architecture")
    if "imatrix" in (model.text("general.type"), architecture):
        raise ModelError(
            f"{model.path}: is an importance matrix, not a model; give the model here (and this to shrink as --from)"
        )
    count, used = _counts(model, architecture)
    roles = _roles()
    found: dict[int, list[str]] = {}
    for tensor in model.tensors.values():
        if SEPARATE.fullmatch(tensor.name):
            raise ModelError(
                f"{tensor.name}: this file has a tensor for each expert, as those of before April 2024; convert the "
                "model again with a new llama.cpp"
            )
        if match := IN_BLOCK.fullmatch(tensor.name):
            if _role(match[2], roles.stacked | roles.router) and count < 1:
                raise ModelError(f"{tensor.name}: has experts, but {architecture}.expert_count says none")
            if _has_slices(model, tensor, match[2], roles, count):
                found.setdefault(int(match[1]), []).append(tensor.name)
    layers = {block: tuple(names) for block, names in sorted(found.items())}
    if not layers:
        raise ModelError(
            f"{model.path}: {architecture or 'this model'} has no experts, so none can be removed; to make it smaller, "
            "take a lower quantization"
        )
    for block, names in layers.items():
        _require_whole(block, names)
    for tensor in model.tensors.values():
        _require_understood(tensor, layers, count, roles)
    blocks = model.number(f"{architecture}.block_count", max(layers) + 1)
    after = blocks - model.number(f"{architecture}.nextn_predict_layers")
    groups, groups_used = (
        max(1, model.number(f"{architecture}.{key}")) for key in ("expert_group_count", "expert_group_used_count")
    )
    if count % groups:
        raise ModelError(f"{model.path}: its {count} experts do not lie in {groups} equal groups")
    return ExpertLayers(count, used, groups, groups_used, layers, tuple(block for block in layers if block >= after))


def _counts(model: GGUF, architecture: str) -> tuple[int, int]:
    """The number of experts, and how many of them are at work for a token. Raises ModelError where it cannot be."""
    count, used = (_count(model, f"{architecture}.{key}") for key in ("expert_count", "expert_used_count"))
    if count and not 0 < used <= count:
        raise ModelError(
            f"{model.path}: {architecture}.expert_used_count says that {used} of {count} experts are at work for a "
            "token, which no model has; convert it again, or download it again"
        )
    return count, used


def _count(model: GGUF, key: str) -> int:
    """A number of experts. Raises ModelError where layers have different numbers."""
    field = model.fields.get(key)
    if field is not None and len(field.raw) > MOST_RAW:  # an array, which is not decoded
        raise ModelError(f"{model.path}: {key} says a number for each layer, which is not supported")
    value = field.value if field else 0
    if isinstance(value, list) and key.endswith("used_count") and all(type(one) is int for one in value):
        return max(value, default=0)
    if isinstance(value, list):
        raise ModelError(f"{model.path}: {key} says a number for each layer, which is not supported")
    return model.number(key)


@dataclass(frozen=True)
class _Roles:
    """Names of tensors within a block: stacks of experts, routers and their biases, shared chunks, and all others."""

    stacked: frozenset[str]
    router: frozenset[str]
    chunks: frozenset[str]
    others: frozenset[str]


def _roles() -> _Roles:
    gguf = package("removing experts")
    names, kinds = gguf.TENSOR_NAMES, gguf.MODEL_TENSOR
    start = "blk.{bid}."

    def of(*wanted: str) -> frozenset[str]:
        return frozenset(names[getattr(kinds, kind)].removeprefix(start) for kind in wanted if hasattr(kinds, kind))

    known = {name.removeprefix(start) for name in names.values() if name.startswith(start)}
    return _Roles(
        stacked=of("FFN_GATE_EXP", "FFN_UP_EXP", "FFN_DOWN_EXP", "FFN_GATE_UP_EXP"),
        router=of("FFN_GATE_INP", "FFN_EXP_PROBS_B", "FFN_EXP_PROBS_B_VL"),
        chunks=of("FFN_GATE_CHEXP", "FFN_UP_CHEXP", "FFN_DOWN_CHEXP"),
        others=of(
            "FFN_GATE", "FFN_UP", "FFN_DOWN", "FFN_ACT", "FFN_GATE_SHEXP", "FFN_UP_SHEXP", "FFN_DOWN_SHEXP",
            "FFN_GATE_INP_SHEXP", "FFN_LATENT_UP", "FFN_LATENT_DOWN",
        ) | {name for name in known if "norm" in name or not SUSPECT.search(name)},
    )  # fmt: skip


def _role(rest: str, roles: frozenset[str]) -> tuple[str, str] | None:
    """(role, what follows it) of a tensor's name within its block, if it is one of the roles."""
    for role in (rest, rest.rpartition(".")[0], rest.partition(".")[0]):
        if role in roles:
            return role, rest[len(role) + 1 :]
    return None


def _has_slices(model: GGUF, tensor: Tensor, rest: str, roles: _Roles, count: int) -> bool:
    """Whether a tensor has a slice for each expert. Raises ModelError where its name says so and its shape does not."""
    outermost = tensor.shape[0]
    if found := _role(rest, roles.stacked):
        single = found[1] not in PARTS and outermost == 1  # one scale for all experts
        if outermost != count and not single:
            raise _differs(tensor, count)
        return not single
    if found := _role(rest, roles.router):
        if found[1] in (*PARTS, ""):
            if outermost != count:
                raise _differs(tensor, count)
            return True
        width = model.number(f"{model.text('general.architecture')}.embedding_length")
        if outermost == count != width:
            raise ModelError(
                f"{tensor.name}: it is not known whether it has a value for each expert; not supported yet"
            )
    return False  # a router's scale has a value for each input


def _differs(tensor: Tensor, count: int) -> ModelError:
    return ModelError(
        f"{tensor.name}: is for {tensor.shape[0]} experts where the file says {count}; layers with different numbers "
        "of experts are not supported"
    )


def _require_whole(block: int, names: Sequence[str]) -> None:
    """Raises ModelError if a layer lacks its router, or the projections that every expert has."""
    for needed in ("ffn_gate_inp.weight", "ffn_down_exps.weight"):
        if f"blk.{block}.{needed}" not in names:
            raise ModelError(f"blk.{block}: has experts but no {needed}, which is not supported")


def _require_understood(tensor: Tensor, layers: Mapping[int, Any], count: int, roles: _Roles) -> None:
    """Raises ModelError for a tensor that may belong to the experts in a way that is not known."""
    match = IN_BLOCK.fullmatch(tensor.name)
    if not match or int(match[1]) not in layers:
        if "_exps" in tensor.name:
            raise ModelError(f"{tensor.name}: holds experts in a place that is not known; not supported")
        return
    if _role(match[2], roles.chunks):
        raise ModelError(f"{tensor.name}: holds experts that others share in groups, which cannot be removed alone")
    if "tid2eid" in match[2] or tensor.dtype in IDS:
        raise ModelError(
            f"{tensor.name}: holds whole numbers in a layer with experts, as layers that route by a table of expert "
            "ids do (hash routing); they are not supported"
        )
    understood = roles.stacked | roles.router | roles.others
    if tensor.shape[0] == count and not _role(match[2], understood):
        raise ModelError(
            f"{tensor.name}: it is not known whether it has a slice for each of {count} experts; not supported. A "
            "newer gguf package may know it: pip install --upgrade gguf"
        )


def counted(fields: Mapping[str, Field], architecture: str, keep: int) -> dict[str, Field]:
    """The metadata with another number of experts."""
    key = f"{architecture}.expert_count"
    kind = fields[key].kind if key in fields else U32
    return {**fields, key: Field.number(kind, keep)}
