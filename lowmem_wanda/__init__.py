"""Prune language models of any size with Wanda, one decoder block in memory at a time.

    >>> from lowmem_wanda import check, prune
    >>> report = prune("source", "pruned", pattern="2:4", text=["my.txt"], length=64)
    >>> check("pruned", against="source").problems
    []

Importing this package imports neither torch nor transformers; they come when a function is first used.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_wanda.checkpoint.directory import Checkpoint
    from lowmem_wanda.checkpoint.verify import Findings, check
    from lowmem_wanda.errors import (
        BudgetError,
        CalibrationError,
        CheckpointError,
        LowmemError,
        ModelError,
        NumberError,
        OutputError,
        PatternError,
    )
    from lowmem_wanda.evaluation.evaluate import EvaluationReport, ModelReport, evaluate
    from lowmem_wanda.llamacpp.collect import ImatrixReport, imatrix
    from lowmem_wanda.llamacpp.gguf_file import is_gguf
    from lowmem_wanda.llamacpp.outline import GGUFOutline, outline
    from lowmem_wanda.llamacpp.shrink import shrink_gguf
    from lowmem_wanda.llamacpp.shrink_report import GGUFShrinkReport
    from lowmem_wanda.llamacpp.survive import SurvivalReport, survive
    from lowmem_wanda.llamacpp.verify_gguf import GGUFFindings, check_gguf
    from lowmem_wanda.pruning import ALLOCATIONS, ORDERS, QUALITIES, RECOVERIES
    from lowmem_wanda.pruning.compare import ComparisonReport, compare
    from lowmem_wanda.pruning.fine_tune import recover
    from lowmem_wanda.pruning.plan import Plan, plan
    from lowmem_wanda.pruning.prune import prune
    from lowmem_wanda.pruning.records import PruneReport
    from lowmem_wanda.shrinking.compare import compare_shrink
    from lowmem_wanda.shrinking.plan import ShrinkPlan, plan_shrink
    from lowmem_wanda.shrinking.report import ShrinkReport
    from lowmem_wanda.shrinking.shrink import shrink
    from lowmem_wanda.sparsity import CHECKPOINT_SCORES, EXPERT_SCORES, METHODS, REFINEMENTS, UPDATES
    from lowmem_wanda.sparsity.gram import Gram
    from lowmem_wanda.sparsity.methods.method import Method, Statistic
    from lowmem_wanda.sparsity.selection import Scaled
    from lowmem_wanda.sparsity.statistics import SquaredNorm
    from lowmem_wanda.streaming.hub import download
    from lowmem_wanda.streaming.machine import DTYPES, READS, byte_size, exact_products

__version__ = "0.1.0"

_PLACES = {
    "checkpoint.directory": ("Checkpoint",),
    "checkpoint.verify": ("Findings", "check"),
    "errors": (
        "BudgetError", "CalibrationError", "CheckpointError", "LowmemError", "ModelError", "NumberError", "OutputError",
        "PatternError",
    ),
    "evaluation.evaluate": ("EvaluationReport", "ModelReport", "evaluate"),
    "llamacpp.collect": ("ImatrixReport", "imatrix"),
    "llamacpp.gguf_file": ("is_gguf",),
    "llamacpp.outline": ("GGUFOutline", "outline"),
    "llamacpp.shrink": ("shrink_gguf",),
    "llamacpp.shrink_report": ("GGUFShrinkReport",),
    "llamacpp.survive": ("SurvivalReport", "survive"),
    "llamacpp.verify_gguf": ("GGUFFindings", "check_gguf"),
    "pruning": ("ALLOCATIONS", "ORDERS", "QUALITIES", "RECOVERIES"),
    "pruning.compare": ("ComparisonReport", "compare"),
    "pruning.fine_tune": ("recover",),
    "pruning.plan": ("Plan", "plan"),
    "pruning.prune": ("prune",),
    "pruning.records": ("PruneReport",),
    "shrinking.compare": ("compare_shrink",),
    "shrinking.plan": ("ShrinkPlan", "plan_shrink"),
    "shrinking.report": ("ShrinkReport",),
    "shrinking.shrink": ("shrink",),
    "sparsity": ("CHECKPOINT_SCORES", "EXPERT_SCORES", "METHODS", "REFINEMENTS", "UPDATES"),
    "sparsity.gram": ("Gram",),
    "sparsity.methods.method": ("Method", "Statistic"),
    "sparsity.selection": ("Scaled",),
    "sparsity.statistics": ("SquaredNorm",),
    "streaming.hub": ("download",),
    "streaming.machine": ("DTYPES", "READS", "byte_size", "exact_products"),
}  # fmt: skip
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "ALLOCATIONS",
    "BudgetError",
    "CHECKPOINT_SCORES",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "ComparisonReport",
    "DTYPES",
    "EXPERT_SCORES",
    "EvaluationReport",
    "Findings",
    "GGUFFindings",
    "GGUFOutline",
    "GGUFShrinkReport",
    "Gram",
    "ImatrixReport",
    "LowmemError",
    "METHODS",
    "Method",
    "ModelError",
    "ModelReport",
    "NumberError",
    "ORDERS",
    "OutputError",
    "PatternError",
    "Plan",
    "PruneReport",
    "QUALITIES",
    "READS",
    "RECOVERIES",
    "REFINEMENTS",
    "Scaled",
    "ShrinkPlan",
    "ShrinkReport",
    "SquaredNorm",
    "Statistic",
    "SurvivalReport",
    "UPDATES",
    "byte_size",
    "check",
    "check_gguf",
    "compare",
    "compare_shrink",
    "download",
    "evaluate",
    "exact_products",
    "imatrix",
    "is_gguf",
    "outline",
    "plan",
    "plan_shrink",
    "prune",
    "recover",
    "shrink",
    "shrink_gguf",
    "survive",
]


def __getattr__(name: str) -> Any:
    """Loads a name of the library when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _without_collecting():
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Keeps Python from looking for garbage, which takes a seventh of the time in which transformers is imported."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
