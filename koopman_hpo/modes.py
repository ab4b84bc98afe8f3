"""The two outer loops, as what differs between them: how long a window is, where it begins, and what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .inner import Inner

if TYPE_CHECKING:
    from .tuner import Tuner

Array = NDArray[Any]


def begin_again(inner: Inner, snapshot: dict[str, NDArray]) -> None:
    """Back to a snapshot, with zero tangents and, where these are random, directions that were not drawn before."""
    if getattr(inner, "directions", None) is None:
        inner.restore(snapshot)
    else:
        inner.restore(snapshot | {"rng": inner.snapshot()["rng"]})
    inner.forget(0)


class Online:
    """One pass: phi moves while the model trains, tangents are carried on and slowly forgotten."""

    def length(self, tuner: Tuner) -> int:
        return min(tuner.window, tuner.steps - tuner.used)

    def start(self, tuner: Tuner) -> dict[str, NDArray]:
        return tuner.inner.snapshot()

    def budget(self, tuner: Tuner) -> int:
        return tuner.steps

    def left(self, tuner: Tuner) -> int:
        """Inner steps between the window's end and the horizon."""
        return tuner.steps - tuner.used

    def lr(self, tuner: Tuner) -> float:
        """Default size of an outer step: .005 an inner step, so that windows of any length travel alike."""
        return 0.005 * tuner.progress.length

    def verdict(self, tuner: Tuner, value: float) -> str:
        """The validation loss against its value before training."""
        assert tuner.guard is not None
        return tuner.guard.stray("validation loss", value, tuner.value0)

    def advance(self, tuner: Tuner, estimate: Array, *, reset: bool) -> None:
        fresh = getattr(tuner.inner, "directions", None) is not None  # new random directions carry nothing
        tuner.inner.forget(0 if reset or fresh else tuner.forget**tuner.progress.length)

    def ended(self, tuner: Tuner) -> bool:
        return tuner.used >= tuner.steps


class Restart:
    """Whole runs, or runs cut short: phi is constant in a run, tangents are never reset, then training begins again."""

    def length(self, tuner: Tuner) -> int:
        return max(1, round(tuner.cut * tuner.steps))

    def start(self, tuner: Tuner) -> dict[str, NDArray]:
        return tuner.initial

    def budget(self, tuner: Tuner) -> int:
        return tuner.steps * (tuner.runs + 1)

    def left(self, tuner: Tuner) -> int:
        return tuner.steps - tuner.progress.length

    def lr(self, tuner: Tuner) -> float:
        """Default size of an outer step: a fixed stride, since phi is held for a whole run."""
        return 0.3

    def verdict(self, tuner: Tuner, value: float) -> str:
        """Both losses must have risen.  The validation loss alone may: overfitting is what h will mend."""
        assert tuner.guard is not None
        w, stray = tuner.progress, tuner.guard.stray
        inner = stray("mean inner loss", w.loss / w.done, w.first)
        return inner if stray("validation loss", value, tuner.value0) else ""

    def advance(self, tuner: Tuner, estimate: Array, *, reset: bool) -> None:
        """Begin again; double the cut when this outer gradient opposes the last one (horizon continuation)."""
        begin_again(tuner.inner, tuner.initial)
        tuner.norms.clear()  # of tangents that are gone
        last = [r for r in tuner.history if not r.event][:-1]
        if last and not reset and float(np.dot(last[-1].estimate, estimate)) < 0:
            tuner.cut = min(1.0, 2 * tuner.cut)

    def ended(self, tuner: Tuner) -> bool:
        return tuner.progress.number + 1 >= tuner.runs


MODES: dict[str, Online | Restart] = {"online": Online(), "restart": Restart()}
