"""Zero-shot tasks of lm-evaluation-harness on a streamed model, and the harness's own command line with such models.

The harness does not find models of other packages by itself (0.4.13 has no entry points for them). Its command line is

    python -m lowmem_wanda.evaluation.zeroshot run --model lowmem --model_args pretrained=DIR --tasks boolq
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from lowmem_wanda.errors import CalibrationError, LowmemError, ModelError, first_line
from lowmem_wanda.evaluation.harness import GENERATES, Lowmem
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.walk import Notify

BOOTSTRAP = 1000  # samples for a standard error without a formula, good to 2 %; the harness's 100,000 take minutes


def run(
    model: StreamedModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    on_block: Notify | None = None,
) -> dict[str, dict[str, float]]:
    """{task or group: {metric: value}} of an opened model; a standard error is the metric with the suffix "_stderr".

    `tasks` are names, patterns or YAML files of tasks, which may be those in `include_path`. The first `limit`
    documents of each are asked (default: all). `on_block` is called with each block's record (see `Lowmem`). Raises
    LowmemError.
    """
    lowmem = Lowmem(str(model.checkpoint.path), model=model, on_block=on_block)
    return answers(lowmem, tasks, include_path=include_path, limit=limit, num_fewshot=num_fewshot)


def answers(
    lowmem: Lowmem, tasks: Sequence[str], *, include_path: str | None, limit: int | None, num_fewshot: int | None
) -> dict[str, dict[str, float]]:
    """What `run` gives, for a `Lowmem` that is made already; it counts its sweeps."""
    with _quiet():
        manager, loaded = load_tasks(tasks, include_path)
        results = lm_eval.simple_evaluate(
            lowmem,
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return {task: dict(_metrics(found)) for task, found in results["results"].items()}


def load_tasks(tasks: Sequence[str], include_path: str | None) -> tuple[Any, list[Any]]:
    """The harness's task manager, and the tasks and groups that are named, with their data sets.

    Raises CalibrationError for a task that is unknown or whose data is not available, ModelError for one that generates
    text.
    """
    manager, names = _find(tasks, include_path)
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except (OSError, ValueError, RuntimeError, LookupError, ImportError) as error:
            raise CalibrationError(
                f"task {name}: it or its data set cannot be loaded ({first_line(error)}); data sets are downloaded "
                "when they are first used, unless the task, found with --include-path, reads local files"
            ) from None
        for task in found["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                raise ModelError(f"task {task.config.task}: {GENERATES}")
        groups = found["groups"]
        loaded += [groups[name]] if name in groups else found["tasks"].values()
    try:
        manager.load(loaded)
    except ValueError as error:  # a task is named by itself and in a group
        raise CalibrationError(f"--tasks: {first_line(error)}; name it once") from None
    return manager, loaded


def _find(tasks: Sequence[str], include_path: str | None) -> tuple[Any, list[str]]:
    """A task manager that knows all of the tasks, and the names of the tasks."""
    if include_path is not None and not Path(include_path).is_dir():
        raise CalibrationError(f"--include-path {include_path} is not a folder")
    for defaults in (False, True):  # it takes 15 s to read the harness's own 14,000 tasks
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        found = {task: [task] if _is_file(task) else manager.match_tasks([task]) for task in tasks}
        unknown = [task for task, names in found.items() if not names]
        if not unknown and not set(found) & set(manager.all_groups):
            break
    if unknown:
        raise CalibrationError(
            f"--tasks {unknown[0]}: lm-evaluation-harness knows no such task; `lm-eval ls tasks` lists its own, "
            "--include-path adds others"
        )
    return manager, list(dict.fromkeys(name for names in found.values() for name in names))


def _is_file(task: str) -> bool:
    return task.endswith(".yaml") and Path(task).is_file()


def _metrics(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields metrics by plain names, such as "acc" for "acc,none"; after the comma stands a filter of the harness."""
    for key, value in found.items():
        name, comma, rule = key.partition(",")
        if comma and isinstance(value, (int, float)):
            yield name if rule == "none" else key, float(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the harness's log except for errors, and sends what the harness prints to stderr."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LowmemError as problem:
        raise SystemExit(f"error: {problem}") from None
