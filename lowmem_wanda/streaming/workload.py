"""What goes through models, where all of it lies meanwhile, and the bytes that this needs."""

from dataclasses import dataclass

from lowmem_wanda.streaming.model import StreamedModel


@dataclass(frozen=True)
class Workload:
    """What goes through `models` side by side, and the memory that it takes beside them.

    `sequences` of `length` tokens are embedded (0 and 0: none). `token_bytes` are kept for each token until the end.
    `statistics` are the bytes of the statistics of a block's inputs, and `statistics_apart` those of the largest one
    where it may be held alone (0: it may not). `training` are the bytes of what is trained in a block, beside its
    activations, and `training_apart` those of the largest part of it; then `targets` says that hidden states are kept
    twice. Pruning one matrix takes `workspace` bytes, and `score_bytes` for each of the at most `chunk` weights that
    are scored at a time. `needs_logits` says that the head is applied. If it `replays`, micro-batches wait for each
    other within a block, or are replayed; all of them wait where it `waits_at_experts`, as they do where experts are in
    groups. Then they wait as the dense and as the pruned block computes them if it `waits_twice`. With `one_by_one` the
    statistics of one expert are held at a time. With `whole_blocks` experts do not come in groups.
    """

    models: tuple[StreamedModel, ...]
    sequences: int = 0
    length: int = 0
    token_bytes: int = 0
    statistics: int = 0
    statistics_apart: int = 0
    training: int = 0
    training_apart: int = 0
    targets: bool = False
    workspace: int = 0
    chunk: int = 0
    score_bytes: int = 0
    needs_logits: bool = False
    replays: bool = False
    waits_at_experts: bool = False
    one_by_one: bool = False
    waits_twice: bool = False
    whole_blocks: bool = False

    @property
    def model(self) -> StreamedModel:
        """The last model, whose device, batch and budget hold for all."""
        return self.models[-1]

    @property
    def on_host(self) -> bool:
        """Whether the host computes."""
        return self.model.device.type == "cpu"


@dataclass(frozen=True)
class Placement:
    """Where everything lies.

    Hidden `states` lie on the "device", on the "host" (beside a GPU, page-locked) or in a "file". There are `slots`
    block buffers on the host and `arriving` ones on the GPU. `batch` sequences are computed at a time, and `held` such
    micro-batches may wait for a matrix in the sequential order. `chunk` weights are scored at a time (0: nothing is
    scored). Allocations of at least `mapped` bytes give their pages back when they are freed. With `apart` one
    statistic is held at a time, which takes a pass through the block for each. With `trained_apart` the parts of a
    block are trained one after the other; that changes the result, so a resumed job keeps it. Where `part` is not 0,
    the experts of a block are read, computed and written in groups of at most so many bytes, and all micro-batches wait
    for each, with most of their memory on the host if it is `parked` there.
    """

    states: str
    slots: int
    arriving: int
    batch: int
    held: int
    chunk: int
    mapped: int
    apart: bool = False
    trained_apart: bool = False
    part: int = 0
    parked: bool = False

    def __str__(self) -> str:
        where = {"device": "in memory", "host": "on the host", "file": "in a file"}[self.states]
        buffers = f"{self.slots} block buffer" + "s" * (self.slots > 1)
        apart = ", statistics one after the other" if self.apart else ""
        apart += ", attention and MLP trained one after the other" if self.trained_apart else ""
        apart += f", experts in groups of {self.part / 1e6:.0f} MB" if self.part else ""
        apart += ", what waits for them on the host" if self.parked else ""
        return (
            f"hidden states {where}, {buffers}, {self.batch} sequence" + "s" * (self.batch > 1) + " at a time" + apart
        )


@dataclass(frozen=True)
class Need:
    """Bytes at the worst moment: of this process on the host, of tensors on a GPU (0 without one), on the disk."""

    host: int
    device: int
    disk: int
