"""Every trouble a user can fix; each message is one sentence that names the thing and the next move.

LowmemError
|-- CheckpointError    the source: a directory, a header, a tensor
|-- ModelError         a model, or a part of it, that cannot be pruned
|-- CalibrationError   texts and token ids
|-- PatternError       a sparsity pattern that cannot be had
|-- BudgetError        memory that would not be enough
|-- OutputError        the target directory, the disk, a job that is not this job
`-- NumberError        NaN or infinity where a finite number is needed
"""


class LowmemError(Exception):
    """What every error of this package derives from."""


class CheckpointError(LowmemError):
    """The source checkpoint is missing, broken, or of a kind that is not read."""


class ModelError(LowmemError):
    """The model, or a tensor of it, has no place in the walk."""


class CalibrationError(LowmemError):
    """The calibration text is missing, too short, or not text."""


class PatternError(LowmemError):
    """The sparsity pattern is no pattern, or does not fit a tensor."""


class BudgetError(LowmemError):
    """The work cannot be done within --max-ram or --max-vram, or what is free."""


class OutputError(LowmemError):
    """The target directory cannot be written, or belongs to another job."""


class NumberError(LowmemError):
    """A weight or a statistic is NaN or infinite."""
