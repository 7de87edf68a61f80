"""The names of GGUF tensors, by which llama.cpp calls a model's weights.

The names are those of llama.cpp's own converter: the `gguf` package has a table for each architecture. No model family
is named here. A model has the names of those architectures whose tables know all its matrices; where these tables
differ (two of the RWKV kind take Llama's attention for theirs), it has the names that most of them give.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lowmem_wanda.errors import LowmemError, ModelError

NEEDED = (
    "GGUFWriter", "GGMLQuantizationType", "GGML_QUANT_SIZES", "MODEL_ARCH", "MODEL_ARCH_NAMES", "MODEL_TENSOR",
    "MODEL_TENSORS", "TENSOR_NAMES",
    "get_tensor_name_map", "quantize", "dequantize",
)  # fmt: skip
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
EXPERT = re.compile(r"\[(\d+)\]$|(?<=\.)(\d+)\.(?=.*\.weight$)")  # in the name of one expert's matrix
GATE_UP = "ffn_gate_up_exps"  # where a file has one matrix of an expert for what llama.cpp may have two for


def package(what: str) -> Any:
    """The gguf package, which `what` needs. Raises LowmemError, which says how to install it."""
    try:
        import gguf
    except ImportError:
        raise LowmemError(f"{what} needs a package that is not installed: pip install gguf") from None
    if not all(hasattr(gguf, part) for part in NEEDED):
        raise LowmemError(f"{what} needs a newer gguf package: pip install --upgrade gguf")
    return gguf


def gguf_names(tensors: Sequence[str], what: str) -> dict[str, str]:
    """{matrix: GGUF tensor} for all matrices in all blocks. Experts of a layer share a GGUF tensor.

    Matrices are named as file tensors, those of one of several experts in a tensor with its index in brackets. Raises
    ModelError if no architecture's table knows them all, or if two of them would have the same name. The message names
    a tensor and says that `what` is not available.
    """
    kinds = tuple(dict.fromkeys(_kind(name) for name in tensors))
    fused = {_kind(name) for name in tensors if expert_in(name) is not None}
    fused = {kind for kind in fused if _most_common((kind,), what) is None}
    found = _most_common([kind for kind in kinds if kind not in fused], what)
    if found is not None and len(fused) == 1:
        found |= dict.fromkeys(fused, f"blk.0.{GATE_UP}")
    elif fused:
        found = None
    if found is None:
        missing = next((kind for kind in kinds if _most_common((kind,), what) is None), kinds[0])
        example = next(name for name in tensors if _kind(name) == missing)
        raise ModelError(
            f"tensor {example}: the gguf package has no name for it beside the model's others, so llama.cpp does not "
            f"know such a model: {what} is not available for it, everything else works"
        )
    names = {name: f"{found[_kind(name)].replace('.0.', f'.{_block(name)}.', 1)}.weight" for name in tensors}
    places = Counter((known, expert_in(name)) for name, known in names.items())
    shared = [known for (known, _), count in places.items() if count > 1]
    if shared:
        raise ModelError(f"{what}: several tensors of this model are {shared[0]} in llama.cpp, which is not supported")
    return names


def expert_in(name: str) -> int | None:
    """The index of the expert that a matrix is of; None where it is of none."""
    block = NUMBER.search(name)
    match = EXPERT.search(name, block.end() if block else 0)
    return int(match[1] or match[2]) if match else None


def entries_for(name: str) -> tuple[str, ...]:
    """The names under which llama.cpp may look for the importance of a GGUF tensor of `gguf_names`."""
    parts = [f"ffn_{part}_exps" for part in ("gate", "up")] if GATE_UP in name else []
    return (name, *(name.replace(GATE_UP, part) for part in parts))


def split_names(names: Mapping[str, str], architecture: str) -> dict[str, tuple[str, str]]:
    """{file tensor: GGUF names} of the matrices that llama.cpp's converter splits in two.

    It does so with the matrix that expands the latent of attention's keys and values: keys' part, transposed for each
    head, and values' part. The architecture of that name decides, or without one any that knows all matrices; those
    with names for the parts split it. `names` are those of `gguf_names`.
    """
    gguf = package("an importance matrix")
    kinds = {_kind(name) for name in names}
    knowing = [one for one, table in zip(gguf.MODEL_ARCH, _tables(gguf), strict=True) if all(k in table for k in kinds)]
    own = [one for one in knowing if gguf.MODEL_ARCH_NAMES[one] == architecture]
    whole, *parts = (getattr(gguf.MODEL_TENSOR, f"ATTN_{part}_B") for part in ("KV", "K", "V"))
    if not any(set(parts) <= set(gguf.MODEL_TENSORS[one]) for one in own or knowing):
        return {}
    stem, first, second = (gguf.TENSOR_NAMES[one] for one in (whole, *parts))
    found = {}
    for name, known in names.items():
        block = _block(name)
        if known == f"{stem.format(bid=block)}.weight":
            found[name] = (f"{first.format(bid=block)}.weight", f"{second.format(bid=block)}.weight")
    return found


def _block(name: str) -> str:
    """The number of the block in a tensor's name. Raises ModelError."""
    if not (match := NUMBER.search(name)):
        raise ModelError(
            f"tensor {name}: its name has no block number, so llama.cpp has no name for it; everything but its "
            "importance matrix works"
        )
    return match[0]


def _kind(name: str) -> str:
    """The name that a tensor has in the first block, without ".weight" and the index of an expert."""
    _block(name)
    begin = NUMBER.sub("0", name, count=1)
    if expert_in(name) is None:
        return begin.removesuffix(".weight")
    block = NUMBER.search(begin)
    end = block.end() if block else 0
    return (begin[:end] + EXPERT.sub("", begin[end:], count=1)).removesuffix(".weight")


def _most_common(kinds: Iterable[str], what: str) -> dict[str, str] | None:
    """{kind: GGUF name in block 0}, the names that most architectures give; None if no architecture knows all kinds."""
    kinds = tuple(kinds)
    votes: Counter[tuple[str, ...]] = Counter()
    for table in _tables(package(what)):
        if all(kind in table for kind in kinds):
            votes[tuple(table[kind] for kind in kinds)] += 1
    return dict(zip(kinds, votes.most_common(1)[0][0], strict=True)) if votes else None


@lru_cache
def _tables(gguf: Any) -> list[Any]:
    """The name maps of all architectures, each for a model of one block."""
    return [gguf.get_tensor_name_map(kind, 1) for kind in gguf.MODEL_ARCH]
