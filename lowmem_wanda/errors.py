"""The errors that a user can fix: each message names the file, tensor or flag, and the next move.

LowmemError
|-- CheckpointError    the source: a directory, a header, a tensor
|-- ModelError         a model, or a part of it, that cannot be pruned
|-- CalibrationError   texts and token ids
|-- PatternError       a pattern, method or choice of tensors that is not valid
|-- BudgetError        memory limits that are too low
|-- OutputError        the target directory, the disk, a directory that holds another job
`-- NumberError        NaN or infinity where a finite number is needed
"""


class LowmemError(Exception):
    """The base class of every error of this package."""


class CheckpointError(LowmemError):
    """The source checkpoint is missing, broken, or of a kind that is not supported."""


class ModelError(LowmemError):
    """The model, or a part of it, is of a kind that is not supported."""


class CalibrationError(LowmemError):
    """The calibration text is missing, too short, or not text."""


class PatternError(LowmemError):
    """The pattern, method or choice of tensors is not valid, or does not fit a tensor."""


class BudgetError(LowmemError):
    """The work needs more memory than --max-ram, --max-vram or the machine allows."""


class OutputError(LowmemError):
    """The target directory cannot be written, or belongs to another job."""


class NumberError(LowmemError):
    """A weight or a statistic is NaN or infinite."""


class NonFiniteError(NumberError):
    """A number that was computed is NaN or infinite; it is not said yet what is to blame."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's class."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
