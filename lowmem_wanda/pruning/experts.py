"""How the experts of a mixture are measured."""

from dataclasses import dataclass
from typing import Any

from lowmem_wanda.streaming.watching import Observe

MIN_TOKENS = 8  # an expert that saw fewer is scored by more than its own


@dataclass(frozen=True)
class OfExperts:
    """How experts are measured: below `min_tokens` by all tokens of their layer; for the rest see `Observe`."""

    min_tokens: int = MIN_TOKENS
    observe: Observe = Observe()

    @property
    def settings(self) -> dict[str, Any]:
        """What of it can change the result, as it stands in job.json."""
        return {
            "min_tokens": self.min_tokens,
            "all_experts": self.observe.every,
            "gate_weighted": self.observe.weighted,
        }


USUAL = OfExperts()
