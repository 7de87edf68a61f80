"""The main job: measure, score and mask each block, write it out, carry the hidden states on."""

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lowmem_wanda.checkpoint import CONFIG, INDEX, PIECE, Tensor, read_header, read_json
from lowmem_wanda.decoder import Block, Decoder
from lowmem_wanda.errors import CheckpointError, ModelError, NumberError, OutputError
from lowmem_wanda.job import REPORT, Job, check_disk, refuse, working
from lowmem_wanda.memory import Peak, anonymous
from lowmem_wanda.orders import Measuring
from lowmem_wanda.patterns import survey
from lowmem_wanda.plan import predict
from lowmem_wanda.report import build
from lowmem_wanda.task import Task
from lowmem_wanda.walk import advance, walk
from lowmem_wanda.writer import differing, sha256_of, write_bytes, write_json, write_shard

Notify = Callable[[dict[str, Any]], None]  # called with each block's record when its shard is done


def prune(task: Task, target: str | Path, notify: Notify = lambda record: None) -> dict[str, Any]:
    """Prunes into `target`, taking up what is done there already, and gives the report (see `report`).

    Shards come first, then the small files, the index, the report, and config.json last: until then the
    directory loads as nothing. Raises OutputError, NumberError or CheckpointError; what is written stays.
    """
    target = Path(target)
    refuse(target, task.checkpoint.path)
    plan, arguments = predict(task), task.arguments()
    if not target.exists():
        check_disk(target, plan.disk)
    with torch.no_grad(), working(target), Peak(task.device) as peak:
        job = Job(target, arguments)
        if job.complete:
            return _verified(task, job)
        run = _Run(task, job, notify, plan.held)
        job.begin(plan.disk, [run.rest, *run.shards])
        run.write_rest()
        run.prune_blocks()
        report = build(task, plan, peak, job.finished, job.arguments)
        _finish(task, job, report)
    return report


class _Run:
    """One walk over the blocks: those that are done are replayed from the output, the others pruned."""

    def __init__(self, task: Task, job: Job, notify: Notify, held: int) -> None:
        self.task, self.job, self.notify, self.held = task, job, notify, held
        depth = len(task.selected)
        self.rest, *self.shards = [shard_name(index, depth + 1) for index in range(depth + 1)]

    @cached_property
    def open(self) -> list[int]:
        """The blocks that were not finished when this run began."""
        return [index for index, shard in enumerate(self.shards) if shard not in self.job.finished]

    def write_rest(self) -> None:
        """The first shard: everything outside the blocks, copied through."""
        name = self.rest
        if name not in self.job.finished:
            inside = {tensor.name for index in range(len(self.shards)) for tensor in self.task.block_tensors(index)}
            rest = [tensor for tensor in self.task.checkpoint.tensors.values() if tensor.name not in inside]
            shard = write_shard(self.job.path / name, [(tensor, tensor.pieces()) for tensor in rest])
            self.job.record(
                name, {"nbytes": shard.nbytes, "sha256": shard.sha256, "tensors": [tensor.name for tensor in rest]}
            )

    def prune_blocks(self) -> None:
        if not self.open:
            return
        decoder = Decoder(self.task.hollow, self.task.checkpoint.tensors, self.task.device, self.task.dtype)
        calibration = self.task.calibration
        hidden = decoder.embed(calibration.tokens, self.task.batch) if calibration else None
        # without hidden states to carry, finished blocks need not be seen again
        walk(decoder, hidden, self.source, self.step, self.open if hidden is None else range(self.open[-1] + 1))

    def source(self, index: int) -> dict[str, Tensor]:
        """Where a block is read: a finished one as it stands in the output, if that is what moved the states on."""
        if index in self.open or self.task.statistics == "dense":
            return self.task.checkpoint.tensors
        return read_header(self.job.path / self.shards[index])

    def step(self, block: Block, hidden: torch.Tensor | None) -> None:
        onward = hidden is not None and block.index < self.open[-1]
        if block.index in self.open:
            start = time.perf_counter()
            record = {"index": block.index, **self.prune_block(block, hidden, onward)}
            files = self.task.block_tensors(block.index)
            tensors = [(tensor, _pieces(block.stored[tensor.name])) for tensor in files]
            shard = write_shard(self.job.path / self.shards[block.index], tensors)
            record |= {"nbytes": shard.nbytes, "sha256": shard.sha256, "host_bytes": anonymous()}
            record["seconds"] = time.perf_counter() - start
            self.job.record(self.shards[block.index], record)
            self.notify(record)
        elif hidden is not None and onward:
            advance(block, hidden, self.task.batch)

    def prune_block(self, block: Block, hidden: torch.Tensor | None, onward: bool) -> dict[str, Any]:
        """Prunes each selected linear and moves the hidden states on; gives the record of what came of it."""
        paths, statistic = self.task.selected[block.index], self.task.rule.statistic
        linears: dict[str, Any] = {}

        def prune(path: str, inputs: Any) -> None:
            linears[paths[path]] = self.prune_linear(block, path, paths[path], inputs)

        if hidden is None or statistic is None:
            for path in paths:
                prune(path, None)
            return {"linears": linears, "passes": 0.0}
        measuring = Measuring(block, hidden, self.task.batch, statistic, paths, prune)
        measuring.run(self.task.statistics, onward, self.held)
        return {"linears": linears, "passes": measuring.passes}

    def prune_linear(self, block: Block, path: str, name: str, inputs: Any) -> dict[str, Any]:
        start = time.perf_counter()
        weight = block.weight(path)
        try:
            pruned = self.task.rule.prune(weight, inputs, self.task.pattern)
        except NumberError as error:
            raise NumberError(f"tensor {name}: {error}") from None
        if pruned is not weight:
            weight.copy_(pruned)
        block.update(path)
        zeros, holds = survey(weight, self.task.pattern)
        if not holds:
            raise ModelError(
                f"tensor {name}: does not hold {self.task.pattern} after pruning ({zeros} zeros of "
                f"{weight.numel()}); report this bug"
            )
        return {
            "shape": list(weight.shape),
            "transposed": name in self.task.hollow.transposed,
            "pattern": str(self.task.pattern),
            "holds": holds,
            "zeros": zeros,
            "sparsity": zeros / weight.numel(),
            "seconds": time.perf_counter() - start,
        }


def shard_name(index: int, count: int) -> str:
    """The Hugging Face name of shard `index` (from 0); other names convert to an empty GGUF without an error."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _finish(task: Task, job: Job, report: dict[str, Any]) -> None:
    """Small files byte for byte, the index, the report, config.json."""
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
    write_json(job.path / REPORT, report)
    write_bytes(job.path / CONFIG, (task.checkpoint.path / CONFIG).read_bytes())
    job.end()


def _verified(task: Task, job: Job) -> dict[str, Any]:
    """The report of a finished job, once its files are found to be what it says. Raises OutputError."""
    again = f"delete {job.path} and prune again"
    try:
        report = read_json(job.path / REPORT)
        expected = {shard["name"]: shard["sha256"] for shard in report["shards"]}
        index = read_json(job.path / INDEX)["weight_map"]
        report["summary"]["sparsity"]
    except (CheckpointError, KeyError, TypeError):
        raise OutputError(f"{job.path}: its {REPORT} or {INDEX} is damaged; {again}") from None
    for name, sha256 in expected.items():
        if not (job.path / name).exists() or sha256_of(job.path / name) != sha256:
            raise OutputError(f"{job.path / name}: is not the shard that was written; {again}")
    if index != {name: shard for shard in expected for name in read_header(job.path / shard)}:
        raise OutputError(f"{job.path / INDEX}: does not say where the tensors are; {again}")
    for file in differing(task.files, task.checkpoint.path, job.path):
        raise OutputError(f"{job.path / file}: is not the source's; {again}")
    job.end()
    return report


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, without a copy where it lies on the host, and 16 MiB at a time where it does not."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].cpu().numpy().data
