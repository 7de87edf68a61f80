"""Collects an importance matrix: sums over a block's inputs while a model is walked, and `imatrix` for a checkpoint."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from lowmem_wanda.checkpoint.output import FORMAT
from lowmem_wanda.checkpoint.writer import require_new
from lowmem_wanda.data.calibration import Calibration, calibrate, in_batches, name_list
from lowmem_wanda.errors import NonFiniteError
from lowmem_wanda.llamacpp.imatrix import About, Entry, require_matrix_target, write
from lowmem_wanda.llamacpp.latents import Latents
from lowmem_wanda.llamacpp.names import entries_for, gguf_names, package, split_names
from lowmem_wanda.llamacpp.store import Store, alone
from lowmem_wanda.sparsity.statistics import SquaredNorm
from lowmem_wanda.streaming.block import Block
from lowmem_wanda.streaming.machine import Machine
from lowmem_wanda.streaming.model import StreamedModel, describe_device, open_model
from lowmem_wanda.streaming.placement import choose
from lowmem_wanda.streaming.resources import anonymous
from lowmem_wanda.streaming.walk import MicroBatches, Notify, advance, ignore, prunable, streamed
from lowmem_wanda.streaming.watching import watched
from lowmem_wanda.streaming.workload import Workload

PARTS = ("#keys", "#values")  # behind a matrix's name: the parts that llama.cpp splits it into


class ImatrixReport(TypedDict):
    """What an importance matrix was computed on, and what that took. Times are in seconds, memory is in bytes."""

    format: int
    kind: str
    source: str
    file: str
    entries: int
    left_out: list[str]
    text: list[str]
    sequences: int
    length: int
    tokens: int
    device: str
    dtype: str
    seconds: float
    peak_memory: dict[str, int]


def imatrix(
    source: str | Path,
    target: str | Path,
    *,
    text: str | Path | Sequence[str | Path] = (),
    sequences: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch: int | None = None,
    max_ram: float | str | None = None,
    max_vram: float | str | None = None,
    slots: int | None = None,
    read: str = "auto",
    states: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    on_start: Notify = ignore,
    on_block: Notify = ignore,
) -> ImatrixReport:
    """Writes the importance matrix of a checkpoint, which llama.cpp uses to quantize the model.

    It holds, for every matrix in every block, the sum over all tokens of each input channel's square.

    Args:
        source: the folder of a Hugging Face safetensors checkpoint.
        target: a new file whose name ends in .gguf, or in .dat for the older format.
        text: the calibration text: files of text or token ids, or "c4", "wikitext2" (default: the built-in text).
        sequences: the number of calibration sequences (default: 128).
        length: tokens of each sequence, at most the model's positions (default: 2048).
        seed: the seed of the calibration sample (default: 0).
        device: "auto" (default), "cpu", "cuda", "cuda:N" or "mps".
        dtype: the dtype to compute in: "auto" (default: float32 on a CPU, else as stored), "float32", "bfloat16" or
            "float16".
        batch: sequences that are computed at a time (default: as many as fit).
        max_ram: host memory that the process may take in all, bytes or a text such as "8GB" (default: what is free).
        max_vram: GPU memory that tensors may take, bytes or a text such as "8GB" (default: what is free).
        slots: block buffers in host memory, 1 to 3 (default: 3 if they fit).
        read: how shards are read, "mmap", "pread" or "auto" (default: "auto", mapped on local disks).
        states: where hidden states lie, "device", "host" or "file" (default: the first that fits).
        trust_remote_code: whether Python code that the checkpoint brings may run (default: False).
        dequantize: read fp8 with block scales, and MXFP4, as bfloat16 (default: False).
        on_start: a function that is called once, before the work, with what will be done.
        on_block: a function that is called with each block's record when the block is done.

    Returns:
        An `ImatrixReport`: what the matrix was computed on, and the time and memory that this took.

    Raises:
        ModelError: llama.cpp has no names for the model's tensors, or the model cannot be walked.
        LowmemError: any other error that a user can fix; the message says how.

    Example:
        >>> from lowmem_wanda import imatrix
        >>> imatrix("source", "source.imatrix.gguf", text=["my.txt"], sequences=4, length=64, device="cpu")["entries"]
        35
    """
    package("an importance matrix")
    require_matrix_target(target, "out_file", Path(source))
    require_new(target)
    machine = Machine.of(
        device,
        dtype,
        batch,
        trust_remote_code,
        max_ram,
        max_vram,
        slots=slots,
        read=read,
        states=states,
        dequantize=dequantize,
    )
    model = open_model(source, machine)
    size = {"sequences": sequences, "length": model.window(length), "seed": seed}
    calibration = calibrate(
        name_list(text), model.encode, vocabulary=model.skeleton.vocabulary, render=model.render, **size
    )
    on_start({"source": str(source), "blocks": model.depth, "device": model.place})
    return collect(model, calibration, Path(target), on_block)


def collect(model: StreamedModel, calibration: Calibration, path: Path, on_block: Notify = ignore) -> ImatrixReport:
    """Writes the importance matrix of an opened model, on a calibration, to a new `path`; returns the report."""
    weights = [matrix.name for block in prunable(model) for matrix in block]
    names, start = gguf_names(weights, "an importance matrix"), time.perf_counter()
    split = splits(model, names)
    count, length = calibration.tokens.shape
    placement, need = choose(Workload((model,), count, length))
    batches = in_batches(calibration.tokens, placement.batch)
    with (
        alone(path) as folder,
        streamed(model, batches=batches, placement=placement, folder=folder) as stream,
    ):
        store, last = Store(folder), time.perf_counter()

        def step(block: Block, states: MicroBatches) -> None:
            nonlocal last
            sums = InputSums(block, split=split)
            with sums.listening():
                advance(block, states)
            store.put(block.index, sums.entries())
            seconds, last = time.perf_counter() - last, time.perf_counter()
            on_block({"index": block.index, "seconds": seconds, "host_bytes": anonymous()})

        stream.walk(step)
        left_out = save_imatrix(path, model, calibration, names, store)
    return {
        "format": FORMAT,
        "kind": "imatrix",
        "source": str(model.checkpoint.path),
        "file": str(path),
        "entries": len(set(names.values())) + len(split) - len(left_out),
        "left_out": left_out,
        "text": list(calibration.sources),
        "sequences": count,
        "length": length,
        "tokens": count * length,
        "device": describe_device(model.device),
        "dtype": model.dtype_name,
        "seconds": time.perf_counter() - start,
        "peak_memory": stream.peak.beside(need.host, need.device),
    }


def save_imatrix(
    path: Path, model: StreamedModel, calibration: Calibration, names: Mapping[str, str], store: Store
) -> list[str]:
    """Writes all entries of a store to `path`, with the entries of one block in memory at a time.

    Gives the GGUF names of the weights that have no entry, because what llama.cpp multiplies them with is not known.
    """
    split, blocks = splits(model, names), prunable(model)
    shapes: dict[str, tuple[int, int]] = {}
    left_out: list[str] = []

    def wanted(index: int) -> dict[str, list[str]]:
        """{GGUF name: the names of its experts in the store, or of the one that it has} of a block."""
        found: dict[str, list[str]] = {}
        for name in (matrix.name for matrix in blocks[index]):
            parts = [names[name]] if name not in split else split[name]
            for part, known in zip(PARTS if name in split else ("",), parts, strict=True):
                for entry in entries_for(known):
                    found.setdefault(entry, []).append(name + part)
        return found

    for index, block in enumerate(blocks):
        columns = {matrix.name: matrix.shape[1] for matrix in block}
        parts = [one for found in wanted(index).values() for one in found if "#" in one]
        entries = store.get(index, parts) if split else {}
        for known, found in wanted(index).items():
            if size := entries[found[0]].sums.size if found[0] in entries else columns[found[0]]:
                shapes[known] = (len(found), size)
            else:
                left_out.append(known)

    def entries_of() -> Iterator[tuple[str, Entry]]:
        for index in range(len(blocks)):
            for known, found in wanted(index).items():
                if known in shapes:
                    yield known, stacked(list(store.get(index, found).values()))

    count, length = calibration.tokens.shape
    write(path, shapes, entries_of(), About(calibration.sources, count, length))
    return left_out


def stacked(experts: Sequence[Entry]) -> Entry:
    """The entry of a stack of experts of their own entries."""
    if len(experts) == 1:
        return experts[0]
    return Entry(np.concatenate([one.sums for one in experts]), np.concatenate([one.counts for one in experts]))


def splits(model: StreamedModel, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """{matrix: GGUF names of its two parts} of the matrices of a model that llama.cpp's converter splits."""
    config = model.skeleton.model.config
    return split_names(names, str(getattr(config, "model_type", ""))) if names else {}


class InputSums:
    """The sums of squares of the inputs of all matrices in a block.

    Every run of the block within `listening` is added, unless it is also within `pausing`. Matrices that share their
    inputs share a sum. Without `on` nothing is summed up. Of the matrices named in `split`, the two parts that
    llama.cpp has of them get sums, which are empty where they cannot be measured.
    """

    def __init__(self, block: Block, on: bool = True, split: Collection[str] = ()) -> None:
        self.block, self.on, self.split = (
            block,
            on,
            {one.name: one.inputs for one in block.matrices if one.name in split},
        )
        columns = {matrix.inputs: matrix.shape[1] for matrix in block.matrices if on and matrix.name not in split}
        self.latents = Latents(block, [*self.split.values()] if on else [])
        self.sums = {module: SquaredNorm(count, block.device) for module, count in columns.items()}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watches the block and adds the inputs of every run to the sums."""
        with watched(self.block, self.sums, self._arrived), self.latents.listening():
            yield

    @contextmanager
    def pausing(self, paused: bool = True) -> Iterator[None]:
        """Leaves the runs within it out of the sums, or where they are not to be `paused`, in them."""
        before, self.latents.paused = self.latents.paused, paused
        try:
            yield
        finally:
            self.latents.paused = before

    def entries(self) -> dict[str, Entry]:
        """{matrix: entry} of the block. Raises NumberError if a sum is NaN or infinite."""
        known = {one.name: self.sums[one.inputs] for one in self.block.matrices if one.name not in self.split}
        for name, module in self.split.items():
            both = self.latents.sums.get(module, (SquaredNorm(0, self.block.device),) * 2)
            known |= {name + part: one for part, one in zip(PARTS, both, strict=True)}
        made = {}
        for name, one in known.items():
            sums = one.sums.cpu().double().numpy()
            if not np.isfinite(sums).all():
                raise NonFiniteError(f"tensor {name.partition('#')[0]}: its inputs hold NaN or infinity")
            made[name] = Entry(sums[None], np.array([one.tokens]))
        return made

    def _arrived(self, module: str, inputs: torch.Tensor) -> None:
        if not self.latents.paused:
            self.sums[module].add(inputs)
