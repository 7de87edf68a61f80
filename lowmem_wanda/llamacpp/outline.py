"""What is in the GGUF of a mixture of experts, and how large it would be with fewer of them; no weight is read."""

from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from lowmem_wanda.checkpoint.output import FORMAT
from lowmem_wanda.errors import PatternError
from lowmem_wanda.llamacpp.expert_cut import copy_of
from lowmem_wanda.llamacpp.expert_layers import counted, expert_layers, routing_facts
from lowmem_wanda.llamacpp.gguf_file import read_gguf
from lowmem_wanda.sparsity.experts import kept_count

SHARES = ("12.5%", "25%", "37.5%", "50%")


class GGUFOutline(TypedDict):
    """What is in a GGUF, and its size with fewer experts: `cuts` are one record for each share that is dropped."""

    format: int
    kind: str
    path: str
    files: int
    architecture: str
    name: str
    bytes: int
    blocks: int
    layers: int
    predicting: int
    experts: int
    used: int
    groups: int
    shared: int
    expert_bytes: int
    types: dict[str, int]
    cuts: list[dict[str, Any]]


def outline(path: str | Path) -> GGUFOutline:
    """What is in the GGUF of a mixture of experts, and its sizes without 12.5, 25, 37.5 and 50 % of the experts.

    Args:
        path: the GGUF; of a split one, the first file.

    Returns:
        A `GGUFOutline`. A cut that would not work has no bytes, and `refused` says why.

    Raises:
        CheckpointError: the file is not a whole GGUF.
        ModelError: the model has no experts, or experts in a form that is not supported.

    Example:
        >>> from lowmem_wanda import outline
        >>> [cut["kept"] for cut in outline("model.gguf")["cuts"]]
        [14, 12, 10, 8]
    """
    model = read_gguf(path)
    experts = expert_layers(model)
    architecture = model.text("general.architecture")
    types: Counter[str] = Counter()
    for name in experts.tensors:
        types[model.tensors[name].dtype] += model.tensors[name].nbytes
    cuts = []
    for share in SHARES:
        cut: dict[str, Any] = {"share": share}
        try:
            cut["kept"] = keep = kept_count(experts.count, share)
            experts.require(keep)
            fields = counted(model.fields, architecture, keep)
            nbytes = copy_of(model.path, model, fields, experts.tensors, keep).nbytes
            cut |= {"bytes": nbytes, **routing_facts(keep)}
        except PatternError as error:
            cut["refused"] = str(error)
        cuts.append(cut)
    return {
        "format": FORMAT,
        "kind": "outline",
        "path": str(path),
        "files": len(model.files),
        "architecture": architecture,
        "name": model.text("general.name"),
        "bytes": model.nbytes,
        "blocks": model.number(f"{architecture}.block_count"),
        "layers": len(experts.layers),
        "predicting": len(experts.predicting),
        "experts": experts.count,
        "used": experts.used,
        "groups": experts.groups,
        "shared": model.number(f"{architecture}.expert_shared_count"),
        "expert_bytes": sum(types.values()),
        "types": dict(types.most_common()),
        "cuts": cuts,
    }
