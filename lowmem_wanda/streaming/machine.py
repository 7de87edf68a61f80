"""Where a model is computed and how: device, dtype, budgets. Nothing here needs torch."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lowmem_wanda.errors import BudgetError, ModelError

DTYPES = ("auto", "float32", "bfloat16", "float16")  # that a model can be computed in
READS = ("auto", "mmap", "pread")
STATES = ("device", "host", "file")
MOST_GB = 1e6  # a petabyte
MOST_BYTES = 1 << 100  # of a size that is read


@dataclass(frozen=True)
class Budget:
    """The limits of the placement of a walk. Where one is None, what fits is chosen.

    `max_ram` is in bytes of this process on the host, `max_vram` in bytes of tensors on the GPU. `slots` is the number
    of block buffers on the host (1 to 3) and `read` how shards are read ("auto", "mmap", "pread"). `states` says where
    hidden states lie ("device", "host", "file"), `held` how many micro-batches may wait for a matrix in the sequential
    order. For a machine that is not here, `free_ram` and `free_vram` are the bytes that it has (0: no GPU).
    """

    max_ram: int | None = None
    max_vram: int | None = None
    slots: int | None = None
    read: str = "auto"
    states: str | None = None
    held: int | None = None
    free_ram: int | None = None
    free_vram: int | None = None

    def __post_init__(self) -> None:
        if self.held is not None and self.held < 0:
            raise BudgetError(f"held={self.held}: give a whole number of at least 0")
        if self.slots not in (None, 1, 2, 3) or self.read not in READS or self.states not in (None, *STATES):
            raise BudgetError(
                f"slots={self.slots}, read={self.read!r}, states={self.states!r}: slots are 1 to 3, read is "
                f"{' or '.join(READS)}, states are {', '.join(STATES)}"
            )


UNLIMITED = Budget()


@dataclass(frozen=True)
class Machine:
    """Where a model is computed ("auto", "cpu", "cuda", "cuda:N", "mps"), in which dtype, how many sequences at a time.

    A `batch` of None means as many as fit. `trust_remote_code` runs Python code that the checkpoint brings. With
    `dequantize` a quantized checkpoint is read as bfloat16.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch: int | None = None
    trust_remote_code: bool = False
    budget: Budget = UNLIMITED
    dequantize: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"--dtype {self.dtype}: give one of {', '.join(DTYPES)}")
        if self.batch is not None and self.batch < 1:
            raise ModelError(f"--batch {self.batch}: give a whole number above 0")

    @classmethod
    def of(
        cls,
        device: str = "auto",
        dtype: str = "auto",
        batch: int | None = None,
        trust_remote_code: bool = False,
        max_ram: float | str | None = None,
        max_vram: float | str | None = None,
        slots: int | None = None,
        read: str = "auto",
        states: str | None = None,
        held: int | None = None,
        free: tuple[int, int] | tuple[None, None] = (None, None),
        dequantize: bool = False,
    ) -> "Machine":
        """The machine of the flat parameters that the library's functions share. A size may be a text such as "8GB".

        `free` is the memory of a machine that is not here, on the host and on its GPU.
        """
        ram, vram = size_of("max_ram", max_ram), size_of("max_vram", max_vram)
        budget = Budget(ram, vram, slots, read, states, held, *free)
        return cls(device, dtype, batch, trust_remote_code, budget, dequantize)


ANY = Machine()


def size_of(name: str, size: float | str | None) -> int | None:
    """The bytes, or the amount in a second, of a parameter.

    Raises BudgetError, with the parameter's name, for a value that is not a size.
    """
    try:
        return None if size is None else byte_size(size)
    except BudgetError as error:
        raise BudgetError(f"{name}={error}") from None


def exact_products() -> bool:
    """Whether MKL can give float32 products the same bits with any number of threads: on Intel's CPUs (Linux)."""
    with suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(errors="replace")[:1000]
    return False


def byte_size(size: float | str) -> int:
    """The bytes of "8GB", "500MB" or "7.5GiB"; a text that is a bare number is in GB, an int in bytes.

    Raises BudgetError for anything else, and for a bare number that can only mean bytes.
    """
    if isinstance(size, (int, float)):
        if not 0 <= size < MOST_BYTES:  # NaN is not, either
            raise BudgetError(f"{size:.3g} is not a number of bytes; give one such as 8_000_000_000")
        return int(size)
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?:([kmgtp])(i?)b?|b)?", str(size).lower())
    if not match:
        raise BudgetError(f"{str(size)[:40]!r} is not a size such as 8GB or 500MB")
    number, prefix, binary = match[1], match[2], match[3]
    if str(size).lower().endswith("b") and not prefix:
        return int(float(number))
    if not prefix and float(number) > MOST_GB:
        raise BudgetError(f"{size} would be in GB; for bytes give {number}B")
    return int(float(number) * (1024 if binary else 1000) ** ("kmgtp".index(prefix or "g") + 1))
