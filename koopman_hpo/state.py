"""What a tuner carries from step to step: one immutable value that is replaced whole, so that whatever fails on the way to
the next one leaves it as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .outer import OuterState
from .snapshots import hosted

Array = NDArray[Any]


class Best(NamedTuple):
    """The best run or window's end so far: everything from the one moment."""

    value: float  # outer loss
    phi: Array  # (q,) that it ran with
    params: NDArray  # (p,); on a card, perhaps
    steps: int  # inner steps of its run
    buffers: Mapping[str, NDArray] = MappingProxyType({})  # what the model holds beside its parameters

    def read(self) -> Best:
        """The same on the host."""
        return self._replace(params=hosted(self.params), buffers={k: hosted(v) for k, v in self.buffers.items()})


class Recorded(NamedTuple):
    """A hypergradient that nobody has waited for."""

    used: int  # inner steps spent then
    look: Any  # what the run's `record` gave


class Window(NamedTuple):
    """The window under way."""

    start: dict[str, NDArray]  # snapshot to go back to; on a card, perhaps
    number: int  # windows begun before
    length: int  # inner steps planned
    done: int = 0  # inner steps taken and settled
    first: float = math.nan  # inner loss before the first step
    loss: float = 0.0  # sum of inner losses; like the others a number on a card, perhaps, that nobody has waited for
    H: tuple[Array | Recorded, ...] = ()  # hypergradients recorded, (q,) each; the last ones unread, perhaps
    owed: float | None = None  # inner loss of a step that is taken and not settled: its hypergradient failed, say

    def settled(self) -> Window:
        """The window with the step that was taken."""
        assert self.owed is not None
        first = self.owed if self.done == 0 else self.first
        return self._replace(done=self.done + 1, first=first, loss=self.loss + self.owed, owed=None)

    def unread(self) -> list[Recorded]:
        return [h for h in self.H if isinstance(h, Recorded)]

    def read(self) -> Window:
        """The window with losses of the host's: this waits for a card."""
        owed = None if self.owed is None else float(self.owed)
        return self._replace(first=float(self.first), loss=float(self.loss), owed=owed)


class State(NamedTuple):
    """Everything about a tuner that changes, but for the run and the history."""

    phi: Array  # (q,) read-only
    outer: OuterState
    window: Window
    t: int  # where the run stands
    cut: float  # share of the horizon that restarted runs go at present
    used: int = 0  # inner steps spent
    reason: str = ""  # why tuning ended; empty while it goes on
    value0: float = math.nan  # outer loss before training
    value: float = math.nan  # at the last window's end
    rollbacks: int = 0  # in a row
    norms: tuple[tuple[int, float], ...] = ()  # (step, size) of the tangents at the last windows' ends
    best: Best | None = None
    trained: bool = False  # mode restart: whether the final run has been
    attempts: int = 0  # final runs that diverged
    strayed: bool = False  # whether a step was on a batch that the strategy does not recognise


def frozen(phi: Array) -> Array:
    """A read-only copy: a state never changes in place."""
    out = np.array(phi, np.float64)
    out.flags.writeable = False
    return out
