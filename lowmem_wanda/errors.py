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

import errno


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


MEMORY = "end other programs, or take less: --max-ram, --max-vram, fewer or shorter sequences (--sequences, --length)"
DRIVER = "update NVIDIA's driver or install a torch that is built for it, or give --device cpu"
TROUBLES = (  # what torch, CUDA and Python say of a machine's limits in a plain RuntimeError; what is it, and a move
    (("allocate memory", "not enough memory", "std::bad_alloc", "unable to mmap", "enforce fail at alloc_cpu"),
     "host memory is full", MEMORY),
    (("CUDA out of memory", "CUDA error: out of memory", "backend out of memory", "STATUS_ALLOC_FAILED",
      "STATUS_NOT_INITIALIZED", "cudaErrorMemoryAllocation"), "memory of the GPU is full", MEMORY),
    (("CUDA driver version is insufficient", "driver on your system is too old", "Found no NVIDIA driver",
      "no CUDA-capable device", "no kernel image is available", "CUDA driver initialization failed",
      "CUDA unknown error"), "the GPU cannot be used by this torch", DRIVER),
    (("CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_ARCH_MISMATCH"), "the GPU cannot multiply in this dtype",
     "give --dtype float32"),
    (("start new thread",), "the system allows no more threads", "raise its limit (ulimit -u), or end other programs"),
    (("Symlink loop",), "a link leads to itself", "give another path, or remove the link"),
)  # fmt: skip


def limit_of_machine(error: BaseException) -> str:
    """A sentence for an error that says that the machine has no more memory, threads or a driver; "" for any other."""
    said = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"host memory is full ({first_line(error)}): {MEMORY}"
    found = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    for parts, what, move in TROUBLES if found else ():
        if any(part in said for part in parts):
            return f"{what} ({first_line(error)}): {move}"
    return ""
