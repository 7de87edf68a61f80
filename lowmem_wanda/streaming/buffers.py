"""The memory of blocks: buffers that they pass through."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from lowmem_wanda.checkpoint.loading import read
from lowmem_wanda.checkpoint.reader import Tensor
from lowmem_wanda.streaming.resources import host_memory

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
ALIGNMENT = 64
Bytes = Callable[[int], None]  # called with a number of bytes
Specs = Mapping[str, tuple[Sequence[int], torch.dtype]]  # name -> shape and dtype
Piece = tuple[Tensor, ...]  # file tensors of one dtype that lie one after the other in memory


def pieces_bytes(pieces: Iterable[Piece]) -> int:
    """The bytes that `laid` needs for pieces."""
    return sum(_aligned(sum(tensor.nbytes for tensor in piece)) for piece in pieces)


def laid(pieces: Iterable[Piece], memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """File tensors as views of `memory` (uint8), in their stored dtype and shape; each piece is aligned to 64 bytes."""
    made, start = {}, 0
    for piece in pieces:
        for tensor in piece:
            values = memory[start : start + tensor.nbytes].view(DTYPES[tensor.dtype])
            made[tensor.name] = values.view(tuple(tensor.shape))
            start += tensor.nbytes
        start = _aligned(start)
    return made


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def buffer_bytes(specs: Specs) -> int:
    """The bytes that `views` needs for tensors of these shapes and dtypes."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in specs.values())


def views(specs: Specs, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of these shapes and dtypes as views of `memory` (uint8), one after the other, aligned to 64 bytes."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items()}
    starts = accumulate(map(_aligned, sizes.values()), initial=0)
    return {
        name: memory[start : start + sizes[name]].view(dtype).view(tuple(shape))
        for start, (name, (shape, dtype)) in zip(starts, specs.items(), strict=False)
    }


class Scratch:
    """Memory that is used again and again, as large as the largest request so far.

    Memory that is allocated and freed for each block in turn leaves holes that glibc keeps: 34 MB more for each block
    of 26 MB (8 blocks of width 1024, torch 2.13).
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def empty(self, specs: Specs) -> dict[str, torch.Tensor]:
        """Uninitialised tensors, which take the place of all earlier ones."""
        if (total := buffer_bytes(specs)) > len(self._memory):
            device = self._memory.device
            self._memory = torch.empty(0, device=device)  # frees the old memory first
            self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        return views(specs, self._memory)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous host tensor as a flat uint8 array, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_cast(tensor: Tensor, out: torch.Tensor) -> torch.Tensor:
    """Reads a tensor's values into the contiguous `out`, in its dtype, 16 MiB at a time; gives `out`."""
    flat, done = out.reshape(-1), 0
    for piece in tensor.pieces():
        values = torch.frombuffer(piece, dtype=DTYPES[tensor.dtype])
        flat[done : done + len(values)] = values
        done += len(values)
    return out


class Slot:
    """One block's memory.

    `stored` are the block's file tensors by name. They lie on the device while the block is computed, and on the host
    afterwards, for the function that writes them. `seconds` has the seconds of reading, copying and writing.
    """

    def __init__(self, pieces: Sequence[Piece], host: torch.Tensor, spent: dict[str, float]) -> None:
        self.pieces, self.host, self.device = pieces, host, host
        self.stored: dict[str, torch.Tensor] = {}
        self.seconds: dict[str, float] = {}
        self._spent = spent

    @contextmanager
    def clocked(self, part: str) -> Iterator[None]:
        """A context whose seconds count for the part `part`, of this block and of all blocks."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start
        self._spent[part] = self._spent.get(part, 0.0) + self.seconds[part]


Write = Callable[[Slot], None]  # run by the writing thread


class BlockBuffers:
    """Buffers of `nbytes` that blocks pass through: `hosts` in host memory and, with a GPU, `devices` in its memory.

    Each is allocated when it is first used. With three buffers a block is read while the one before it is computed and
    the one before that is written:

        time ->      1         2         3         4
        buffer A   read 0   compute 0  write 0   read 3
        buffer B            read 1     compute 1 write 1
        buffer C                       read 2    compute 2

    With fewer, the same steps wait for a free buffer. A host buffer is free when its block is written, a GPU buffer
    when its block is copied back. `spent` has the seconds of all blocks by part.
    """

    def __init__(
        self,
        device: torch.device,
        nbytes: int,
        hosts: int = 3,
        devices: int = 2,
        read_by: str = "auto",
        not_locked: Bytes = lambda nbytes: None,
    ) -> None:
        self.spent: dict[str, float] = {}
        self.ways: set[str] = set()  # in which shards were read
        self.device, self.nbytes, self.read_by, self._not_locked = device, nbytes, read_by, not_locked
        self._cuda, self._beside = device.type == "cuda", device.type != "cpu"
        self._hosts, self._devices = SimpleQueue[Any](), SimpleQueue[Any]()
        for queue, count in ((self._hosts, hosts), (self._devices, devices)):
            for _ in range(count):
                queue.put(None)
        self._memory = ExitStack()
        begin = partial(torch.cuda.set_device, device) if self._cuda else None  # a new thread is on GPU 0
        self._reader, self._writer = (ThreadPoolExecutor(1, name, begin) for name in ("reader", "writer"))
        self._computing = torch.cuda.current_stream(device) if self._cuda else None  # that of the caller's thread
        self._writing: Future[None] | None = None
        self._streams: list[Any] = [torch.cuda.Stream(device) if self._cuda else None for _ in range(2)]

    def __enter__(self) -> "BlockBuffers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the buffers once a running write is done, and wakes a reader that waits for a buffer."""
        for queue in (self._hosts, self._devices):
            queue.put(CancelledError)
        try:
            self._reader.shutdown(cancel_futures=True)
        finally:
            try:
                self._writer.shutdown()
            finally:
                self._memory.close()
                self._hosts, self._devices = SimpleQueue(), SimpleQueue()

    def prefetch(self, blocks: Iterable[Sequence[Piece]]) -> Iterator[Slot]:
        """Yields the blocks one after the other. Meanwhile the next is read, as soon as a buffer is free for it."""
        coming: Future[Slot] | None = None
        for pieces in blocks:
            following = self._reader.submit(self._fetch, pieces)
            if coming is not None:
                yield self._arrived(coming.result())
            coming = following
        if coming is not None:
            yield self._arrived(coming.result())

    def submit(self, action: Callable[[], None]) -> None:
        """Has the writing thread do `work`. Waits for the thread's earlier work first, and raises what that raised."""
        self.drain()
        self._writing = self._writer.submit(action)

    def release(self, slot: Slot, write: Write | None) -> None:
        """Has a block written, or drops it if `write` is None. Raises what the thread's earlier work raised."""
        computed = _mark(torch.cuda.current_stream(self.device)) if self._cuda else None
        if self._beside and not self._cuda:
            self._download(slot, write is not None, None)
        self.submit(lambda: self._store(slot, write, computed))

    def drain(self) -> None:
        """Waits for the writing thread and raises what its work raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _fetch(self, pieces: Sequence[Piece]) -> Slot:
        make = partial(host_memory, self.nbytes, self.device, self._not_locked)
        slot = Slot(pieces, self._take(self._hosts, lambda: self._memory.enter_context(make())), self.spent)
        with slot.clocked("read"):
            slot.stored = laid(pieces, slot.host)
            places = [(tensor, raw(slot.stored[tensor.name])) for piece in pieces for tensor in piece]
            self.ways |= read(places, self.read_by, drop=True)
        if self._cuda:
            self._upload(slot)
        return slot

    def _arrived(self, slot: Slot) -> Slot:
        """The block on its device. Metal crashes when two threads use it, so on Metal this thread copies the block."""
        if self._beside and not self._cuda:
            self._upload(slot)
        return slot

    def _upload(self, slot: Slot) -> None:
        slot.device = self._take(self._devices, self._make_on_device)
        with slot.clocked("upload"):
            self._copy(slot.device, slot.host, pieces_bytes(slot.pieces), self._streams[0])
        slot.stored = laid(slot.pieces, slot.device)

    def _make_on_device(self) -> torch.Tensor:
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        if self._cuda:  # memory that was freed for it may still be in use by work queued on the computing stream
            self._streams[0].wait_stream(self._computing)
        return memory

    def _store(self, slot: Slot, write: Write | None, computed: Any) -> None:
        try:
            if self._cuda:
                self._download(slot, write is not None, computed)
            if write is not None:
                write(slot)
        finally:
            self._hosts.put(slot.host)

    def _download(self, slot: Slot, back: bool, computed: Any) -> None:
        """Copies a block back to the host if it will be written, and frees its buffer on the GPU."""
        try:
            if computed is not None:
                computed.synchronize()
            if back:
                with slot.clocked("download"):
                    self._copy(slot.host, slot.device, pieces_bytes(slot.pieces), self._streams[1])
        finally:
            self._devices.put(slot.device)
        slot.stored = laid(slot.pieces, slot.host)

    @staticmethod
    def _copy(target: torch.Tensor, source: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Copies `nbytes` bytes and waits for them. With a CUDA `stream`, this runs beside the computing."""
        if stream is None:
            target[:nbytes].copy_(source[:nbytes])
        else:
            with torch.cuda.stream(stream):
                target[:nbytes].copy_(source[:nbytes], non_blocking=True)
                _mark(stream).synchronize()

    @staticmethod
    def _take(queue: "SimpleQueue[Any]", make: Callable[[], torch.Tensor]) -> torch.Tensor:
        memory = queue.get()
        if memory is CancelledError:
            raise CancelledError
        return make() if memory is None else memory


def _mark(stream: Any) -> Any:
    """An event at the end of a stream's work. Who waits for it sleeps; by default a whole core would be busy."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
