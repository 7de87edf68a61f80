"""Scores layers in several processes at once, because numpy's short operations do not gain from threads.

Each process is this module run by Python: it reads the model's header again, scores its share of each layer's experts,
and writes a line of JSON for each layer to its standard output.
"""

import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowmem_wanda import errors
from lowmem_wanda.llamacpp.expert_layers import ExpertLayers, expert_layers
from lowmem_wanda.llamacpp.expert_scores import ExpertCounts, read_counts, score_layer
from lowmem_wanda.llamacpp.gguf_file import GGUF, read_gguf

WORTH = 1 << 28  # weights to read, about 0.8 s in one process, from which on several are worth their start
MOST = 8  # processes; each holds about 60 MB and the header

Named = Mapping[int, str]  # {block of a layer: its score}


def score_layers(
    model: GGUF, experts: ExpertLayers, scores: Named, matrix: Path | None, known: Mapping[int, ExpertCounts], seed: int
) -> Generator[np.ndarray, None, None]:
    """Yields the scores of each layer of `scores` in its order, float64 (experts,).

    `matrix` is the importance matrix whose content is `known`. Raises ModelError for weights that cannot be read.
    """
    weights = sum(model.tensors[name].numel for block, score in scores.items() for name in _read(experts, block, score))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, MOST, experts.count) if weights > WORTH else 1
    if count == 1:
        for block, score in scores.items():
            yield score_layer(score, model, experts, block, known.get(block), seed)
        return
    ends = [experts.count * place // count for place in range(count + 1)]
    job = {"model": str(model.path), "matrix": matrix and str(matrix), "scores": scores, "seed": seed}
    with ExitStack() as stack:
        outputs = [stack.enter_context(_process({**job, "experts": span})) for span in pairwise(ends)]
        for _ in scores:
            yield np.concatenate([_answer(output) for output in outputs])


def _read(experts: ExpertLayers, block: int, score: str) -> list[str]:
    """The names of the tensors whose weights a score reads."""
    return {"ean": [experts.down(block)], "aimer": experts.matrices(block)}.get(score, [])


@contextmanager
def _process(job: Mapping[str, Any]) -> Iterator[BinaryIO]:
    """The output of a process that does a job; it ends with the context. Ctrl-C reaches the first process alone.

    It is started by its path, because `-m` would look for modules in the user's folder first.
    """
    search = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(job)],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    try:
        assert child.stdout is not None
        yield child.stdout  # type: ignore[misc]
    finally:
        child.kill()
        child.communicate()


def _answer(output: BinaryIO) -> np.ndarray:
    """The next scores of a process. Raises the error that it met, or LowmemError if it ended."""
    line = output.readline()
    if not line:
        raise errors.LowmemError("a process that scores experts ended early; is memory short? Run the command again")
    answer = json.loads(line)
    if isinstance(answer, dict):
        raise getattr(errors, answer["error"])(answer["message"])
    return np.array(answer, np.float64)


def main(job: Mapping[str, Any]) -> None:
    """Scores some experts of the layers of a job; writes their scores, or the error that was met."""
    try:
        model = read_gguf(job["model"])
        experts = expert_layers(model)
        known = read_counts(job["matrix"], model, experts) if job["matrix"] else {}
        for block, score in job["scores"].items():
            at = int(block)
            scores = score_layer(score, model, experts, at, known.get(at), job["seed"], slice(*job["experts"]))
            sys.stdout.write(json.dumps(scores.tolist()) + "\n")
            sys.stdout.flush()
    except errors.LowmemError as error:
        sys.stdout.write(json.dumps({"error": type(error).__name__, "message": str(error)}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
