"""Which experts of a GGUF are kept: by a plan that is given, or by a score."""

import json
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowmem_wanda.checkpoint.reader import opened
from lowmem_wanda.errors import PatternError
from lowmem_wanda.llamacpp.expert_layers import ExpertLayers
from lowmem_wanda.llamacpp.expert_scores import ExpertCounts
from lowmem_wanda.llamacpp.gguf_file import GGUF
from lowmem_wanda.llamacpp.score_processes import score_layers
from lowmem_wanda.sparsity import EXPERT_SCORES
from lowmem_wanda.sparsity.expert_plan import Ids, kept_experts
from lowmem_wanda.sparsity.experts import highest, kept_count


@dataclass(frozen=True)
class LayerChoice:
    """The ids of the experts that a layer keeps, what chose them, and the scores of all, (experts,) or None."""

    kept: tuple[int, ...]
    by: str
    scores: np.ndarray | None


class Choices(Mapping[int, LayerChoice]):
    """{block: its choice}, each taken from an iterator over all `blocks` when it is first asked for."""

    def __init__(self, found: Generator[tuple[int, LayerChoice], None, None], blocks: Collection[int]) -> None:
        self._found, self._blocks = found, blocks
        self._known: dict[int, LayerChoice] = {}

    def __getitem__(self, block: int) -> LayerChoice:
        while block not in self._known:
            place, choice = next(self._found)
            self._known[place] = choice
        return self._known[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def close(self) -> None:
        """Ends the processes that score."""
        self._found.close()


def chosen_score(score: str | None, scores_from: Any, plan: Any, imatrix_out: Any, seed: int | None) -> str:
    """The score that decides; "plan" where a plan does. Raises PatternError if the flags do not go together."""
    if imatrix_out is not None and scores_from is None:
        raise PatternError("--imatrix-out needs the importance matrix that it is cut from: --from imatrix.gguf")
    if seed is not None and score != "random":
        raise PatternError(f"seed {seed} has no effect without --score random; leave it out")
    if plan is not None:
        if score is not None:
            raise PatternError("--plan says which experts are kept, so --score has no place beside it; leave one out")
        return "plan"
    if seed is not None and seed < 0:
        raise PatternError(f"seed {seed}: give 0 or a number above")
    score = score or ("ean" if scores_from is not None else None)
    if score is None:
        raise PatternError(
            "say which experts are kept: --from imatrix.gguf (the importance matrix of this model), --plan plan.json, "
            "or --score aimer, which needs neither"
        )
    if score not in EXPERT_SCORES:
        raise PatternError(f"score {score!r} is not known; one of {', '.join(EXPERT_SCORES)}")
    if score in ("ean", "frequency") and scores_from is None:
        raise PatternError(f"--score {score} needs an importance matrix: --from imatrix.gguf; --score aimer does not")
    return score


class HasExperts(Protocol):
    """Layers with experts."""

    @property
    def count(self) -> int:
        """The experts of each layer."""

    @property
    def groups(self) -> int:
        """The groups that they lie in."""

    @property
    def layers(self) -> Collection[int]:
        """The numbers of the layers."""

    @property
    def predicting(self) -> Collection[int]:
        """The numbers of those that predict further tokens (MTP)."""


def numbers(experts: HasExperts, drop: str | float | None, keep: int | None, plan: Path | None) -> tuple[int, Ids]:
    """How many experts each layer keeps, and which, if a plan says so. Raises PatternError."""
    if plan is None:
        return kept_count(experts.count, drop, keep), {}
    try:
        running = [block for block in experts.layers if block not in experts.predicting]
        ids = kept_experts(_read_plan(plan), list(experts.layers), experts.count, plan.name, running)
    except PatternError as error:
        raise PatternError(f"{plan}: {error}") from None
    missing = [block for block in experts.layers if block not in ids and block not in experts.predicting]
    if missing:
        raise PatternError(f"{plan}: says nothing of layer {missing[0]}; every layer with experts must be in it")
    sizes = {len(kept): block for block, kept in ids.items()}
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise PatternError(
            f"{plan}: keeps {one} experts in layer {first} and {other} in layer {second}; only models with one "
            "number for all layers are loaded"
        )
    (count,) = sizes
    if (drop is not None or keep is not None) and kept_count(experts.count, drop, keep) != count:
        raise PatternError(f"{plan}: keeps {count} of {experts.count} experts, the flags say otherwise; leave them out")
    size = experts.count // experts.groups
    for block, kept in ids.items():
        if len({sum(one // size == group for one in kept) for group in range(experts.groups)}) > 1:
            raise PatternError(
                f"{plan}: layer {block} does not keep as many experts in each of its {experts.groups} groups, as the "
                "router needs"
            )
    return count, ids


def _read_plan(path: Path) -> Any:
    """The JSON of a plan. Raises PatternError."""
    with opened(path) as file:
        content = file.read()
    try:
        return json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise PatternError(f"is not JSON ({str(error)[:100]})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises PatternError for a key that stands in it twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:place]])
        raise PatternError(f"{twice!r} stands in it twice")
    return content


def choose(
    model: GGUF, experts: ExpertLayers, keep: int, planned: Ids, score: str, matrix: Path | None,
    known: Mapping[int, ExpertCounts], seed: int,
) -> Generator[tuple[int, LayerChoice], None, None]:  # fmt: skip
    """Yields the block and the choice of each layer in turn: the plan's, or the highest of a score.

    A layer that predicts further tokens, of which plans and importance matrices say nothing, is chosen by its weights.
    """
    measured = score in ("ean", "frequency")
    names = {
        block: "aimer" if score == "plan" or (measured and block not in known) else score
        for block in experts.layers
        if block not in planned
    }
    with closing(score_layers(model, experts, names, matrix, known, seed)) as scored:
        for block in experts.layers:
            if block in planned:
                yield block, LayerChoice(planned[block], "plan", None)
            else:
                scores = next(scored)
                yield block, LayerChoice(highest(scores, keep, experts.groups), names[block], scores)


def plan_text(choices: Mapping[int, LayerChoice]) -> str:
    """The JSON of a plan, a line for each layer."""
    lines = (f'  "{block}": {json.dumps(choice.kept)}' for block, choice in choices.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"
