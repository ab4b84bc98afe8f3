"""The two outer loops, as what differs between them: how long a window is, where it begins, and what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .inner import Inner, mark
from .state import State

if TYPE_CHECKING:
    from .tuner import Tuner

Array = NDArray[Any]


def begin_again(inner: Inner, snapshot: dict[str, NDArray]) -> None:
    """Back to a snapshot, with zero tangents and, where these are random, directions that were not drawn before."""
    inner.restore(snapshot | {"rng": mark(inner)["rng"]} if inner.directions is not None else snapshot)
    inner.forget(0)


class Online:
    """One pass: phi moves while the model trains, tangents are carried on and slowly forgotten."""

    def length(self, tuner: Tuner, s: State) -> int:
        return min(tuner.window, tuner.steps - s.used)

    def start(self, tuner: Tuner) -> dict[str, NDArray]:
        return mark(tuner.inner)

    def budget(self, tuner: Tuner) -> int:
        return tuner.steps

    def left(self, tuner: Tuner, s: State) -> int:
        """Inner steps between the window's end and the horizon."""
        return tuner.steps - s.used

    def lr(self, s: State) -> float:
        """Default size of an outer step: .005 an inner step, so that windows of any length travel alike."""
        return 0.005 * s.window.length

    def verdict(self, tuner: Tuner, s: State, value: float) -> str:
        """The validation loss against its value before training."""
        assert tuner.guard is not None
        return tuner.guard.stray("validation loss", value, s.value0)

    def kept(self, tuner: Tuner, s: State) -> float | None:
        """The share of the tangents that the next window begins with; None: training begins again."""
        fresh = tuner.inner.directions is not None  # new random directions carry nothing
        return 0.0 if fresh else tuner.forget**s.window.length

    def early(self, tuner: Tuner, s: State) -> bool:
        """Whether training may begin again."""
        return tuner.guard is not None and tuner.guard.early(s.used, tuner.steps)

    def slowed(self, tuner: Tuner, s: State, target: Array) -> Array:
        """The phi that a step leads to, no lower than the guard lets it fall."""
        if tuner.guard is None:
            return target
        return tuner.guard.slowed(tuner.inner.space, s.phi, target, s.window.length, self.left(tuner, s))

    def returns(self, tuner: Tuner) -> bool:
        """Whether the run's start may be gone back to, and so belongs in a checkpoint."""
        return tuner.guard is not None and tuner.guard.again > 0

    def lengthened(self, tuner: Tuner, s: State, estimate: Array) -> State:
        """The state after an estimate that was used."""
        return s

    def ended(self, tuner: Tuner, s: State) -> bool:
        return s.used >= tuner.steps


class Restart:
    """Whole runs, or runs cut short: phi is constant in a run, tangents are never reset, then training begins again."""

    def length(self, tuner: Tuner, s: State) -> int:
        return max(1, round(s.cut * tuner.steps))

    def start(self, tuner: Tuner) -> dict[str, NDArray]:
        return tuner.initial

    def budget(self, tuner: Tuner) -> int:
        return tuner.steps * (tuner.runs + 1)

    def left(self, tuner: Tuner, s: State) -> int:
        return tuner.steps - s.window.length

    def lr(self, s: State) -> float:
        """Default size of an outer step: a fixed stride, and a long one, since every step costs a run."""
        return 0.6

    def verdict(self, tuner: Tuner, s: State, value: float) -> str:
        """Both losses must have risen.  The validation loss alone may: overfitting is what h will mend."""
        assert tuner.guard is not None
        w, stray = s.window, tuner.guard.stray
        inner = stray("mean inner loss", w.loss / w.done, w.first)
        return inner if stray("validation loss", value, s.value0) else ""

    def kept(self, tuner: Tuner, s: State) -> float | None:
        return None

    def early(self, tuner: Tuner, s: State) -> bool:
        return False

    def slowed(self, tuner: Tuner, s: State, target: Array) -> Array:
        return target

    def returns(self, tuner: Tuner) -> bool:
        return True

    def lengthened(self, tuner: Tuner, s: State, estimate: Array) -> State:
        """Double the cut when this outer gradient opposes the last one (horizon continuation)."""
        last = next((r.estimate for r in reversed(list(tuner.history)) if not r.event), estimate)
        return s._replace(cut=min(1.0, 2 * s.cut)) if float(np.dot(last, estimate)) < 0 else s

    def ended(self, tuner: Tuner, s: State) -> bool:
        return s.window.number + 1 >= tuner.runs


MODES: dict[str, Online | Restart] = {"online": Online(), "restart": Restart()}
