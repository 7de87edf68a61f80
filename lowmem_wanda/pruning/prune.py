"""The main job: measure, score and mask each block, write it out, carry the hidden states on."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowmem_wanda.checkpoint.directory import CONFIG, INDEX, Checkpoint, read_header, read_json
from lowmem_wanda.checkpoint.output import REPORT, Job, begun, check_disk, finished, refuse, working
from lowmem_wanda.checkpoint.reader import PIECE, Tensor
from lowmem_wanda.checkpoint.writer import check_new, differing, sha256_of, write_bytes, write_json, write_shard
from lowmem_wanda.data.calibration import in_batches
from lowmem_wanda.errors import CheckpointError, ModelError, NumberError, OutputError
from lowmem_wanda.llamacpp.collect import save_imatrix
from lowmem_wanda.llamacpp.imatrix import Store, check_target
from lowmem_wanda.llamacpp.survive import outlook
from lowmem_wanda.pruning.block import Sample
from lowmem_wanda.pruning.job import Task
from lowmem_wanda.pruning.passes import Measuring
from lowmem_wanda.pruning.plan import predict
from lowmem_wanda.pruning.report import build, save
from lowmem_wanda.sparsity.masks import prune_lowest, sign_zeros, survey
from lowmem_wanda.streaming.buffers import Ring, Slot, Write
from lowmem_wanda.streaming.clock import Clock, add, timing
from lowmem_wanda.streaming.decoder import Block, Decoder
from lowmem_wanda.streaming.placement import Layout
from lowmem_wanda.streaming.recorder import Recorder
from lowmem_wanda.streaming.resources import Peak, anonymous, limit_vram, map_blocks_from
from lowmem_wanda.streaming.states import hidden_states
from lowmem_wanda.streaming.tensors import raw
from lowmem_wanda.streaming.walk import Parts, Stream, advance, walk

Notify = Callable[[dict[str, Any]], None]  # called with each block's record when its shard is done


def prune(task: Task, target: str | Path, notify: Notify = lambda record: None) -> dict[str, Any]:
    """Prunes into `target`, taking up what is done there already, and gives the report (see `report`).

    Shards come first, then the small files, the index, the importance matrix, the report, and config.json last:
    until then the directory loads as nothing. `notify` is called by the thread that writes. Raises BudgetError,
    OutputError, NumberError or CheckpointError; what is written stays.
    """
    target = Path(target)
    refuse(target, task.checkpoint.path)
    if task.imatrix:
        check_target(task.imatrix, "--imatrix", task.checkpoint.path, target)
    before = begun(target).get("--batch") if task.batch is None else task.batch
    before = before if isinstance(before, int) else None
    if finished(target):
        with working(target):
            return _verified(task, Job(target, task.arguments(before or 0)))
    if task.imatrix and not begun(target):
        check_new(task.imatrix)
    plan = predict(task, before)
    if not target.exists():
        check_disk(target, plan.disk)
    limit_vram(task.device, task.limits.max_vram)
    with torch.no_grad(), working(target), Peak(task.device) as peak:
        job = Job(target, task.arguments(plan.layout.batch))
        job.begin(plan.disk, shard_names(task.depth))
        run = _Run(task, job, notify, plan.layout)
        run.do()
        report = build(task, plan, peak, job.finished, job.arguments, timing(run.wall, run.spent))
        _finish(task, job, report, run.store)
    return report


class _Run:
    """One walk over the blocks: those that are done are replayed from the output, the others pruned.

    `last` is the moment when the last shard was done; `wall` the seconds of it all, `spent` those of each part.
    """

    def __init__(self, task: Task, job: Job, notify: Notify, layout: Layout) -> None:
        self.task, self.job, self.notify, self.layout = task, job, notify, layout
        self.rest, *self.shards = shard_names(task.depth)
        self.open = [index for index, shard in enumerate(self.shards) if shard not in job.finished]
        self.store = Store(job.path, f"{task.recorded_on} batch {layout.batch}")
        unrecorded = [index for index in range(task.depth) if task.imatrix and not self.store.has(index)]
        if task.imatrix and unrecorded:
            check_new(task.imatrix)
        self.walked = range(max([*self.open, *unrecorded], default=-1) + 1)  # by the hidden states
        self.wall, self.last = 0.0, time.perf_counter()
        self.spent: dict[str, float] = {}

    def do(self) -> None:
        """All shards."""
        start, layout, device = time.perf_counter(), self.layout, self.task.device
        map_blocks_from(layout.mapped)
        with Ring(device, self.task.block_bytes, layout.slots, layout.arriving, self.task.limits.reading) as ring:
            if self.rest not in self.job.finished:
                ring.behind(self.write_rest)
            if self.walked:
                self.prune_blocks(ring)
            ring.settle()
        self.wall = time.perf_counter() - start
        add(self.spent, ring.spent)

    def write_rest(self) -> None:
        """The first shard: everything outside the blocks, copied through."""
        inside = {tensor.name for index in range(len(self.shards)) for tensor in self.task.block_tensors(index)}
        rest = [tensor for tensor in self.task.checkpoint.tensors.values() if tensor.name not in inside]
        start = time.perf_counter()
        shard = write_shard(self.job.path / self.rest, [(tensor, None) for tensor in rest])
        add(self.spent, {"copy": time.perf_counter() - start})
        names = [tensor.name for tensor in rest]
        self.job.record(self.rest, {"nbytes": shard.nbytes, "sha256": shard.sha256, "tensors": names})

    def prune_blocks(self, ring: Ring) -> None:
        task = self.task
        decoder = Decoder(task.hollow, task.checkpoint.tensors, task.device, task.dtype)
        if task.calibration is None:  # without hidden states to carry, finished blocks need not be seen again
            walk([Stream(decoder, [], self.source, self.step)], ring, self.open)
            return
        with ExitStack() as stack:

            def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
                place = (self.layout.states, shape, dtype, task.device, self.job.path)
                return stack.enter_context(hidden_states(*place))

            clock = Clock(task.device)
            with clock.part("embed"):
                parts = decoder.embed(in_batches(task.calibration.tokens, self.layout.batch), allocate)
            add(self.spent, clock.seconds())
            walk([Stream(decoder, parts, self.source, self.step)], ring, self.walked)
            decoder.empty()

    def source(self, index: int) -> list[Tensor]:
        """Where a block is read: a finished one as it stands in the output, if that is what moved the states on."""
        if index in self.open or self.task.moved_on_dense:
            return self.task.block_tensors(index)
        return list(read_header(self.job.path / self.shards[index]).values())

    def step(self, block: Block, parts: Parts) -> Write | None:
        """Prunes an open block, moves the hidden states on and records the importance matrix of what they meet; gives
        what writes the shard."""
        pruned = block.index in self.open
        recorder = Recorder(block, self.task.imatrix is not None and (pruned or not self.store.has(block.index)))
        onward = bool(parts) and (recorder.on or block.index < self.walked[-1])
        record = {"index": block.index, **self.prune_block(block, parts, onward, recorder)} if pruned else {}
        if onward and not pruned:
            record = {"parts": _advance(block, parts, recorder)}
        if recorder.on:
            self.store.put(block.index, recorder.entries())
        add(self.spent, record.get("parts", {}))
        return partial(self.write_block, record) if pruned else None

    def write_block(self, record: dict[str, Any], slot: Slot) -> None:
        """Runs in the writing thread."""
        name = self.shards[record["index"]]
        tensors = [(tensor, _pieces(slot.stored[tensor.name])) for tensor in self.task.block_tensors(record["index"])]
        with slot.clocked("write"):
            shard = write_shard(self.job.path / name, tensors)
        record["parts"] |= slot.seconds
        now = time.perf_counter()
        record |= {"nbytes": shard.nbytes, "sha256": shard.sha256, "host_bytes": anonymous()}
        record["seconds"], self.last = now - self.last, now
        self.job.record(name, record)
        self.notify(record)

    def prune_block(self, block: Block, parts: Parts, onward: bool, recorder: Recorder) -> dict[str, Any]:
        """Prunes each selected linear and moves the hidden states on; gives the record of what came of it."""
        task, paths, statistic = self.task, self.task.selected[block.index], self.task.rule.statistic
        linears: dict[str, Any] = {}

        def prune(path: str, inputs: Any) -> None:
            linears[paths[path]] = self.prune_linear(block, path, paths[path], inputs)

        if task.measures and statistic is not None:
            measuring = Measuring(block, parts, statistic, paths, prune, recorder)
            measuring.run(task.statistics, onward, self.layout.held)
            return {"linears": linears, "passes": measuring.passes, "parts": measuring.clock.seconds()}
        clock = Clock(block.device)
        with clock.part("prune"):
            for path, name in paths.items():
                prune(path, task.norms.inputs(name, block.device) if task.norms else None)
        moved = _advance(block, parts, recorder) if onward else {}
        return {"linears": linears, "passes": float(onward), "parts": clock.seconds() | moved}

    def prune_linear(self, block: Block, path: str, name: str, inputs: Any) -> dict[str, Any]:
        start = time.perf_counter()
        weight = block.weight(path)
        try:
            scores = self.task.rule.scores(weight, inputs)
            sample = Sample(scores, *weight.shape)
            prune_lowest(weight, scores, self.task.pattern, self.layout.chunk)
        except NumberError as error:
            raise NumberError(f"tensor {name}: {error}") from None
        zeros, holds = survey(weight, self.task.pattern, self.layout.chunk)
        if not holds:
            raise ModelError(
                f"tensor {name}: does not hold {self.task.pattern} after pruning ({zeros} zeros of "
                f"{weight.numel()}); report this bug"
            )
        spread, filled = sample.spread(weight), {}
        if self.task.zeros == "signed-tiny":
            count, tiny = sign_zeros(weight, self.task.seed, name)
            filled = {"filled": count, "tiny": tiny}
        return {
            "shape": list(weight.shape),
            "transposed": name in self.task.hollow.transposed,
            "pattern": str(self.task.pattern),
            "holds": holds,
            "zeros": 0 if filled else zeros,
            **filled,
            "sparsity": zeros / weight.numel(),
            "score": spread,
            "seconds": time.perf_counter() - start,
        }


def shard_names(depth: int) -> list[str]:
    """The Hugging Face names of the shard outside the blocks and of each block's; other names convert to an
    empty GGUF without an error."""
    return [f"model-{index + 1:05d}-of-{depth + 1:05d}.safetensors" for index in range(depth + 1)]


def _finish(task: Task, job: Job, report: dict[str, Any], store: Store) -> None:
    """Small files byte for byte, the index, the importance matrix, the report, config.json."""
    weight_map = {
        name: shard.name for shard in sorted(job.path.glob("model-*.safetensors")) for name in read_header(shard)
    }
    if weight_map.keys() != task.checkpoint.tensors.keys():
        missing = sorted(weight_map.keys() ^ task.checkpoint.tensors.keys())
        raise OutputError(f"{job.path}: tensor {missing[0]} is not in both source and output; report this bug")
    for file in task.files:
        if file.name != CONFIG:
            (job.path / file).parent.mkdir(exist_ok=True)
            write_bytes(job.path / file, (task.checkpoint.path / file).read_bytes())
    write_json(
        job.path / INDEX,
        {"metadata": {"total_size": task.checkpoint.nbytes}, "weight_map": dict(sorted(weight_map.items()))},
    )
    if task.imatrix and task.calibration:
        save_imatrix(task.imatrix, task, task.calibration, task.names, store)
        report["imatrix"] |= {"sha256": sha256_of(task.imatrix)}
    report["quantization"] = outlook(Checkpoint(job.path), report)
    save(job.path, report)
    write_bytes(job.path / CONFIG, (task.checkpoint.path / CONFIG).read_bytes())
    _end(job)


def _end(job: Job) -> None:
    """Removes what only an unfinished job needs."""
    Store(job.path).remove()
    job.end()


def _advance(block: Block, parts: Parts, recorder: Recorder) -> dict[str, float]:
    """Moves the hidden states on while the recorder listens; gives the seconds."""
    clock = Clock(block.device)
    with clock.part("onward"), recorder.listening():
        advance(block, parts)
    return clock.seconds()


def _verified(task: Task, job: Job) -> dict[str, Any]:
    """The report of a finished job, once its files are found to be what it says. Raises OutputError."""
    again = f"delete {job.path} and prune again"
    try:
        report = read_json(job.path / REPORT)
        expected = {shard["name"]: shard["sha256"] for shard in report["shards"]}
        index = read_json(job.path / INDEX)["weight_map"]
        report["summary"]["sparsity"], dict(report.get("imatrix") or {})
    except (CheckpointError, KeyError, TypeError, ValueError):
        raise OutputError(f"{job.path}: its {REPORT} or {INDEX} is damaged; {again}") from None
    for name, sha256 in expected.items():
        if not (job.path / name).exists() or sha256_of(job.path / name) != sha256:
            raise OutputError(f"{job.path / name}: is not the shard that was written; {again}")
    if index != {name: shard for shard in expected for name in read_header(job.path / shard)}:
        raise OutputError(f"{job.path / INDEX}: does not say where the tensors are; {again}")
    for file in differing(task.files, task.checkpoint.path, job.path):
        raise OutputError(f"{job.path / file}: is not the source's; {again}")
    made = report.get("imatrix") or {}
    same = made.get("recorded_on") == task.recorded_on and task.imatrix and task.imatrix.exists()
    if task.imatrix and not (same and sha256_of(task.imatrix) == made.get("sha256")):
        raise OutputError(
            f"{job.path}: is done, and {task.imatrix} is not the importance matrix that was made with it on this "
            f"text; make one by: imatrix {job.path} NEW.gguf with its own --text, --sequences, --length and --seed"
        )
    _end(job)
    return report


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A host tensor's bytes without a copy, 16 MiB at a time."""
    flat = raw(tensor)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].data
