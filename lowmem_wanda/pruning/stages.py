"""Which inputs of a block are measured together, where experts come one after the other."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.matrices import Matrix


def stages_of(block: Block, groups: Mapping[str, Sequence[Matrix]], apart: bool) -> list[list[str]]:
    """The inputs, in stages that are measured together: those of one expert, and what comes before and behind.

    Where experts come in groups and statistics are small, those of a group are together.
    """
    starts = {(part.path, expert): part for part in block.groups.coming for expert in range(part.first, part.stop)}
    stages: list[list[str]] = []
    units: list[Any] = []
    for name, matrices in groups.items():
        matrix = matrices[0] if matrices else None
        unit: Any = ""
        if matrix is not None and matrix.expert is not None:
            known = starts.get((matrix.module, matrix.expert))
            unit = (matrix.module, known.first if known and not apart else matrix.expert)
        if stages and unit == units[-1]:
            stages[-1].append(name)
        else:
            stages.append([name])
            units.append(unit)
    return stages


def experts_come_first(block: Block, names: Collection[str]) -> bool:
    """Whether some of these inputs are of experts, or arrive behind them."""
    order = list(block.inputs)
    first = next((place for place, name in enumerate(order) if name.endswith("]")), len(order))
    return any(order.index(name) >= first for name in names)
