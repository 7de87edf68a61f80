"""The importance matrix of a checkpoint as it is: the same walk, nothing pruned, nothing written but sums."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowmem_wanda.checkpoint.writer import check_new
from lowmem_wanda.data.calibration import Calibration, in_batches
from lowmem_wanda.llamacpp.imatrix import About, Entry, Store, check_target, write
from lowmem_wanda.llamacpp.names import gguf_names
from lowmem_wanda.streaming.buffers import Ring
from lowmem_wanda.streaming.decoder import Block, Decoder
from lowmem_wanda.streaming.model import Work, describe_device
from lowmem_wanda.streaming.placement import Layout, choose
from lowmem_wanda.streaming.recorder import Recorder
from lowmem_wanda.streaming.resources import Peak, anonymous, limit_vram, map_blocks_from
from lowmem_wanda.streaming.states import hidden_states
from lowmem_wanda.streaming.walk import Parts, Stream, advance, walk

Notify = Callable[[dict[str, Any]], None]


def imatrix(
    work: Work, calibration: Calibration, path: str | Path, notify: Notify = lambda record: None
) -> dict[str, Any]:
    """Writes what llama.cpp's quantization asks for to `path` (.gguf, or .dat for the older format).

    The sums are over the tokens of `calibration`, for every linear in every block; gives what was done. Raises
    ModelError for a model whose tensors llama.cpp has no names for, OutputError, BudgetError, NumberError.
    """
    path = Path(path)
    check_target(path, "out_file", work.checkpoint.path)
    check_new(path)
    names, start = gguf_names(work.hollow.weights, "an importance matrix"), time.perf_counter()
    layout, need = choose(replace(work, shape=calibration.tokens.shape, judges=False))
    limit_vram(work.device, work.limits.max_vram)
    with ExitStack() as stack:
        peak = stack.enter_context(Peak(work.device))
        stack.enter_context(torch.no_grad())
        folder = stack.enter_context(_emptied(path.with_name(f".{path.name}.blocks")))
        _walk(work, calibration, layout, folder, notify)
        save_imatrix(path, work, calibration, names, Store(folder))
    count, length = calibration.tokens.shape
    return {
        "kind": "imatrix",
        "source": str(work.checkpoint.path),
        "file": str(path),
        "entries": len(names),
        "text": list(calibration.sources),
        "sequences": count,
        "length": length,
        "tokens": count * length,
        "device": describe_device(work.device),
        "dtype": work.dtype_name,
        "seconds": time.perf_counter() - start,
        "peak_memory": peak.beside(need.host, need.device),
    }


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder for sums, without what a killed run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_imatrix(path: Path, work: Work, calibration: Calibration, names: Mapping[str, str], store: Store) -> None:
    """Writes all entries of a store, one block's in memory at a time."""
    blocks = [work.hollow.linears(index).values() for index in range(work.depth)]
    tensors = work.checkpoint.tensors
    shapes = {names[name]: (1, work.hollow.matrix_shape(tensors[name])[1]) for block in blocks for name in block}

    def entries() -> Iterator[tuple[str, Entry]]:
        for index, block in enumerate(blocks):
            yield from ((names[name], entry) for name, entry in store.get(index, block).items())

    count, length = calibration.tokens.shape
    write(path, shapes, entries(), About(calibration.sources, count, length))


def _walk(work: Work, calibration: Calibration, layout: Layout, folder: Path, notify: Notify) -> None:
    """Every block's sums, into a store in `folder`."""
    map_blocks_from(layout.mapped)
    store, decoder = Store(folder), Decoder(work.hollow, work.checkpoint.tensors, work.device, work.dtype)
    last = time.perf_counter()

    def step(block: Block, parts: Parts) -> None:
        nonlocal last
        recorder = Recorder(block)
        with recorder.listening():
            advance(block, parts)
        store.put(block.index, recorder.entries())
        seconds, last = time.perf_counter() - last, time.perf_counter()
        notify({"index": block.index, "seconds": seconds, "host_bytes": anonymous()})

    with ExitStack() as stack:
        stack.callback(decoder.close)

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return stack.enter_context(hidden_states(layout.states, shape, dtype, work.device, folder))

        parts = decoder.embed(in_batches(calibration.tokens, layout.batch), allocate)
        reading = work.limits.reading
        ring = stack.enter_context(Ring(work.device, work.block_bytes, layout.slots, layout.arriving, reading))
        walk([Stream(decoder, parts, work.block_tensors, step)], ring, range(work.depth))
