"""Micro-batches on their way through a block, all of which wait for each other."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from lowmem_wanda.errors import LowmemError

GROUP, INPUTS = "group", "inputs"  # what flows wait for: that experts are loaded, that inputs are measured


class Flows:
    """Runs `run` on each of some micro-batches, in a greenlet each, so that it can wait within.

    Whatever they wait for, all of them do, because a block computes every micro-batch alike. Those that still wait when
    the context is left are ended: a suspended greenlet would hold all that it works on.
    """

    def __init__(self, run: Callable[[torch.Tensor], None], states: Iterable[torch.Tensor]) -> None:
        self._greenlet, self._run = require_greenlet(), run
        self._flows: list[Any] = []
        self._known = set[Any]()
        self.add(states)
        self.reason: str | None = None  # what they wait for
        self.groups = 0  # that they have come to so far

    def add(self, states: Iterable[torch.Tensor]) -> None:
        """Lets more micro-batches run, from their start to where the others will wait next."""
        self._flows += [self._greenlet.greenlet(partial(self._run, state)) for state in states]
        self._known = set(self._flows)

    def go_on(self) -> str | None:
        """Lets each run to the next place where it waits, or to its end; gives what they wait for, None at the end."""
        found = [flow.switch() for flow in self._flows if not flow.dead]
        self.reason = found[0] if found else None
        self.groups += self.reason == GROUP
        return self.reason

    def __enter__(self) -> "Flows":
        return self

    def __exit__(self, *exception: object) -> None:
        for flow in self._flows:
            flow.throw(self._greenlet.GreenletExit)

    def __contains__(self, flow: Any) -> bool:
        return flow in self._known


def current() -> Any:
    """The greenlet that runs now; one without a parent is no flow."""
    return require_greenlet().getcurrent()


def wait(reason: str) -> None:
    """Waits, within a flow, until it is let go on."""
    current().parent.switch(reason)


def require_greenlet() -> Any:
    """The greenlet package. Raises LowmemError, saying how to install it."""
    try:
        import greenlet
    except ImportError:
        raise LowmemError(
            "--statistics sequential, and experts that wait for each other, need a package that is not installed: "
            "pip install greenlet"
        ) from None
    return greenlet
