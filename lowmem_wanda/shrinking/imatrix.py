"""The importance matrix of a smaller model: it is computed once more, when it is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_wanda.checkpoint.output import begun
from lowmem_wanda.checkpoint.writer import require_new
from lowmem_wanda.data.calibration import Calibration
from lowmem_wanda.errors import PatternError
from lowmem_wanda.llamacpp.collect import collect
from lowmem_wanda.llamacpp.imatrix import require_matrix_target
from lowmem_wanda.llamacpp.names import gguf_names, package
from lowmem_wanda.shrinking.job import ShrinkJob
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import open_model
from lowmem_wanda.streaming.walk import prunable


def require_imatrix(job: ShrinkJob, path: Path, target: Path) -> Calibration:
    """The calibration that the importance matrix is measured on.

    Raises a LowmemError where the importance matrix could not be written after all the work."""
    if job.calibration is None:
        raise PatternError("--imatrix: nothing is measured here; leave it out, and run `imatrix` on what is written")
    package("an importance matrix")
    require_matrix_target(path, "--imatrix", target)
    gguf_names([matrix.name for block in prunable(job.model) for matrix in block], "--imatrix")
    if not begun(target):
        require_new(path)
    return job.calibration


def of_smaller(calibration: Calibration, path: Path, target: Path, machine: Machine) -> dict[str, Any]:
    """Writes the importance matrix of what was written to `target`, on a calibration; gives its facts."""
    model = open_model(target, replace(machine, dequantize=True))
    facts = collect(model, calibration, path)
    return {name: facts[name] for name in ("file", "entries", "left_out", "sequences", "length", "seconds")}  # type: ignore[literal-required]
