"""The types of what stands in a pruning's report.json."""

from typing import Any, TypedDict


class ScoreRecord(TypedDict):
    """The scores of some rows of a matrix: `quantiles` by percent, and the share of their squares that was `lost`."""

    quantiles: dict[str, float]
    lost: float


class LinearRecord(TypedDict, total=False):
    """What was done to one matrix. `filled` weights have the magnitude `tiny` instead of zero.

    Where X^T X is known, `error` is the share of the squares of the dense output that the matrix loses. What solvers
    note are their `damping`, where it is not the usual one, and their numbers of `rounds` and `swaps`. A matrix that is
    one of several in a file `tensor` lies in it from the value `start` on. That of an `expert` saw so many `tokens`;
    where it is not scored by these alone, `scored_by` says by what.
    """

    shape: list[int]
    transposed: bool
    tensor: str
    start: int
    expert: int
    tokens: int
    scored_by: str
    pattern: str
    holds: bool
    zeros: int
    filled: int
    tiny: float
    sparsity: float
    score: ScoreRecord
    error: float
    damping: float
    rounds: int
    swaps: int
    alpha: float
    seconds: float


class RecoveryRecord(TypedDict):
    """How a block was trained: `steps`, its error on held-out sequences as a share of squares, and which tensors."""

    steps: int
    before: float
    after: float
    tensors: list[str]


class BlockRecord(TypedDict, total=False):
    """What was done in one block: its matrices by name, forward passes, seconds by part, bytes and checksum."""

    shard: str
    index: int
    linears: dict[str, LinearRecord]
    recovered: RecoveryRecord
    passes: float
    parts: dict[str, float]
    nbytes: int
    blake3: str  # or sha256, where that package is missing
    host_bytes: int
    seconds: float


class Summary(TypedDict):
    """Sums over all matrices and blocks, and what the pruned checkpoint `gives` and `gives_not`, in words."""

    parameters: int
    linears: int
    weights: int
    zeros: int
    filled: int
    sparsity: float
    compared_per: str
    also: list[str]
    keeps_bits: bool
    bytes: int
    seconds: float
    forward_passes_per_block: float
    gives: str
    gives_not: str


class Left(TypedDict):
    """What is not pruned, not copied, and not looked at.

    `untouched` tensors are not used by the model, those `dense_outside` are matrices outside the blocks, a share of all
    parameters, and `left_dense` {matrix in a block: why}. `left_out_files` are {name: why}. `source_seen` is the share
    of the source's bytes by which another run of the job knows it again.
    """

    untouched: list[str]
    dense_outside: list[str]
    dense_outside_share: float
    left_dense: dict[str, str]
    left_out_files: dict[str, str]
    source_seen: float


class PruneReport(Left, total=False):
    """The report of a finished pruning. Memory is in bytes, times are in seconds; `timing` is that of the last run."""

    format: int
    kind: str
    source: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    summary: Summary
    calibration: dict[str, Any]
    imatrix: dict[str, Any] | None
    peak_memory: dict[str, int]
    memory: list[list[float]]
    layout: dict[str, Any]
    timing: dict[str, Any]
    copied_tensors: list[str]
    copied_files: list[str]
    shards: list[dict[str, Any]]
    blocks: list[BlockRecord]
    quantization: dict[str, Any]
    fine_tuning: dict[str, Any]
