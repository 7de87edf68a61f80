"""Buffers that the blocks pass through: one is read while another is computed with and a third is written."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from lowmem_wanda.checkpoint.reader import Tensor, read
from lowmem_wanda.streaming.resources import host_memory
from lowmem_wanda.streaming.tensors import laid_bytes, lay, raw, wanted


class Slot:
    """One block's memory: `stored` are its file tensors by name, where it is computed with, and in the
    end, for who writes it, on the host. `seconds` is what reading, copying and writing it took."""

    def __init__(self, host: torch.Tensor, spent: dict[str, float]) -> None:
        self.host, self.device = host, host
        self.stored: dict[str, torch.Tensor] = {}
        self.seconds: dict[str, float] = {}
        self._spent = spent

    @contextmanager
    def clocked(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start
        self._spent[part] = self._spent.get(part, 0.0) + self.seconds[part]


Write = Callable[[Slot], None]  # run by the writing thread


class Ring:
    """`hosts` buffers of `nbytes` in host memory and, beside a GPU, `devices` in its memory, made when first used.

    A buffer goes back to the reading thread when its block is written, and a GPU's when its block is copied
    back. Three and two do everything at once; with fewer the same steps wait for each other. `spent` has the
    seconds of all blocks by part.
    """

    def __init__(self, device: torch.device, nbytes: int, hosts: int = 3, devices: int = 2, way: str = "pread"):
        self.spent: dict[str, float] = {}
        self.device, self.nbytes, self.way = device, nbytes, way
        self._cuda, self._beside = device.type == "cuda", device.type != "cpu"
        self._hosts: SimpleQueue[Any] = SimpleQueue()
        self._devices: SimpleQueue[Any] = SimpleQueue()
        for queue, count in ((self._hosts, hosts), (self._devices, devices)):
            for _ in range(count):
                queue.put(None)
        self._memory = ExitStack()
        self._reader, self._writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "writer")
        self._writing: Future[None] | None = None
        self._streams: list[Any] = [torch.cuda.Stream(device) if self._cuda else None for _ in range(2)]

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *exception: object) -> None:
        """Lets a write that has begun come to its end, and wakes a reader that waits for a buffer."""
        for queue in (self._hosts, self._devices):
            queue.put(CancelledError)
        try:
            self._reader.shutdown(cancel_futures=True)
        finally:
            try:
                self._writer.shutdown()
            finally:
                self._memory.close()

    def arrivals(self, blocks: Iterable[Sequence[Tensor]]) -> Iterator[Slot]:
        """The blocks one after the other; the next is read meanwhile, as soon as a buffer is free for it."""
        coming: Future[Slot] | None = None
        for tensors in blocks:
            following = self._reader.submit(self._fetch, tensors)
            if coming is not None:
                yield self._arrived(coming.result())
            coming = following
        if coming is not None:
            yield self._arrived(coming.result())

    def behind(self, work: Callable[[], None]) -> None:
        """Has the writing thread do this next, once what it did before is done; raises what that raised."""
        self.settle()
        self._writing = self._writer.submit(work)

    def give_back(self, slot: Slot, write: Write | None) -> None:
        """Has a block written, or forgets it; raises what the work before raised."""
        computed = torch.cuda.current_stream(self.device).record_event() if self._cuda else None
        if self._beside and not self._cuda:
            self._download(slot, write is not None, None)
        self.behind(lambda: self._store(slot, write, computed))

    def settle(self) -> None:
        """Waits for the writing thread and raises what its work raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _fetch(self, tensors: Sequence[Tensor]) -> Slot:
        make = partial(host_memory, self.nbytes, self.device)
        slot = Slot(self._take(self._hosts, lambda: self._memory.enter_context(make())), self.spent)
        with slot.clocked("read"):
            slot.stored = lay(wanted(tensors), slot.host)
            read([(tensor, raw(slot.stored[tensor.name])) for tensor in tensors], self.way, drop=True)
        if self._cuda:
            self._upload(slot)
        return slot

    def _arrived(self, slot: Slot) -> Slot:
        """The block where it is computed with; Metal crashes where two threads use it, so there this one copies."""
        if self._beside and not self._cuda:
            self._upload(slot)
        return slot

    def _upload(self, slot: Slot) -> None:
        slot.device = self._take(self._devices, self._make_on_device)
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in slot.stored.items()}
        with slot.clocked("upload"):
            self._copy(slot.device, slot.host, laid_bytes(kinds), self._streams[0])
        slot.stored = lay(kinds, slot.device)

    def _make_on_device(self) -> torch.Tensor:
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        if self._cuda:  # what was freed to make it may still be in use by work that waits on the computing stream
            self._streams[0].wait_stream(torch.cuda.current_stream(self.device))
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
        """Copies a block back to the host, if it is to be written, and frees its place on the GPU."""
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in slot.stored.items()}
        try:
            if computed is not None:
                computed.synchronize()
            if back:
                with slot.clocked("download"):
                    self._copy(slot.host, slot.device, laid_bytes(kinds), self._streams[1])
        finally:
            self._devices.put(slot.device)
        slot.stored = lay(kinds, slot.host)

    @staticmethod
    def _copy(target: torch.Tensor, source: torch.Tensor, nbytes: int, stream: Any) -> None:
        """Copies and waits for it; on a CUDA stream of its own, beside the computing."""
        if stream is None:
            target[:nbytes].copy_(source[:nbytes])
        else:
            with torch.cuda.stream(stream):
                target[:nbytes].copy_(source[:nbytes], non_blocking=True)
                stream.synchronize()

    @staticmethod
    def _take(queue: "SimpleQueue[Any]", make: Callable[[], torch.Tensor]) -> torch.Tensor:
        memory = queue.get()
        if memory is CancelledError:
            raise CancelledError
        return make() if memory is None else memory
