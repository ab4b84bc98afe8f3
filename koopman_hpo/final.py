"""How mode `restart` ends: one plain run with the hyperparameters found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import closing
from .guard import Guard
from .state import State, Window, frozen

if TYPE_CHECKING:
    from .tuner import Tuner

ATTEMPTS = 3
LOOK = 25  # steps between looks at losses that are not the host's: each waits for a card


def train(tuner: Tuner, inner_batch: Callable[[int], Any], val_batch: Callable[[int], Any]) -> str:
    """Train once, to the end and without tangents; a run that diverges is recorded and repeated with a smaller step.

    The best full run stands, whichever it was.  Interrupted, it is begun again by the next call, with the same batches.
    Returns a warning, or an empty string.
    """
    if tuner.state.trained:
        return ""
    while not tuner.state.trained:
        s, value = _run(tuner, inner_batch, val_batch)
        total = s.window.loss
        why = closing.verdict(tuner, s, value, np.zeros(1)) if math.isfinite(total) else f"inner loss is {total}"
        if not why:
            tuner.state = s._replace(value=value, best=closing.better(tuner, s, value), trained=True)
            return ""
        shrunk = (tuner.guard or Guard()).shrunk(tuner.inner.space, s.phi)
        record = closing.without(tuner, s, f"final run rolled back: {why}", why, value, s.phi - shrunk)
        over = s.attempts + 1 >= ATTEMPTS or np.array_equal(shrunk, s.phi)
        tuner.inner.restore(tuner.initial)
        tuner.history.append(record)
        tuner.state = s._replace(phi=frozen(shrunk), attempts=s.attempts + 1, t=tuner.inner.t, trained=over)
    reason = "finished, but the final run diverged: the best run before it stands, if there is one"
    tuner.state = tuner.state._replace(reason=reason)
    return reason


def adopt(tuner: Tuner) -> None:
    """Leave the run, where it can, at the best: its model is the result."""
    best = tuner.state.best
    if best is not None and hasattr(tuner.inner, "adopt"):
        tuner.inner.adopt(best.phi, best.params, best.buffers)


def _run(tuner: Tuner, inner_batch: Callable[[int], Any], val_batch: Callable[[int], Any]) -> tuple[State, float]:
    """A plain run from the start: the state after it, and its outer loss."""
    s = tuner.state
    w, value = Window(tuner.initial, s.window.number, tuner.steps), math.nan
    tuner.inner.restore(tuner.initial)
    while w.done < w.length and not (isinstance(w.loss, float) and not math.isfinite(w.loss)):
        loss = tuner.inner.step(s.phi, inner_batch(s.used + w.done), tangents=False)
        w = w._replace(owed=loss).settled()
        w = w.read() if w.done % LOOK == 0 else w
    w = w.read()
    if math.isfinite(w.loss):
        value = tuner.inner.hypergradient(val_batch(w.number + 1)).value
    return s._replace(window=w, used=s.used + w.done, t=tuner.inner.t), value
