"""The one outer loop: inner steps with tangents, a window's trajectory, an estimate, a step of phi, and a guard.

Mode `online`: phi moves while the model trains, one pass; it becomes a schedule.  Mode `restart`: phi is constant during a
run, tangents are never reset, phi is updated at the run's end and training begins again; runs are cut short at first and
double in length whenever two successive outer gradients oppose each other (horizon continuation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import closing, final, resume, settings
from . import outer as outer_optimizers
from .batches import source
from .errors import DivergenceWarning, ShapeError, number, whole
from .guard import Guard
from .history import History
from .inner import Inner
from .modes import MODES, Online, Restart, begin_again
from .outer import Outer
from .state import Best, Recorded, State, Window, frozen
from .strategies import Glocal, Strategy

Array = NDArray[Any]


class Result(NamedTuple):
    """What tuning leaves: the model, the hyperparameters, and the story."""

    params: NDArray  # (p,) online: at the end, the last good ones if training diverged; restart: of the best run
    hyper: dict[str, Any]  # natural values
    phi: Array  # (q,)
    value: float  # outer loss of these parameters, when it was last measured
    steps: int  # inner steps spent
    reason: str  # why it ended
    history: History
    best: Best | None  # where the outer loss was lowest: online, of all windows; restart, of the longest runs
    learned: dict[str, Any]  # natural values; online: with which it learned most (`History.learned`); restart: hyper


class Tuner:
    """Tunes the hyperparameters of an `Inner` while it trains.

    Args:
      inner: the run, at its start.
      strategy: `Local()`, `Global()`, `Glocal()` or one of yours; default `Glocal()`.
      steps: T, inner steps of one training run (the horizon).
      window: tau, inner steps between updates in mode `online`.
      runs: in mode `restart`, how many runs.
      outer: outer optimizer; default `outer.adam()`.
      guard: `Guard()`; None switches it off (a loss that is not finite is still rolled back).
      forget: rho, the share of the tangents kept a step, applied at the window's end (`online`).
      every: inner steps between recorded hypergradients; default: the strategy's number of snapshots a window.
      mode: "online" or "restart"; default: the strategy's.
      phi: (q,) where to start; default `inner.space.phi0`.
      callbacks: called with the tuner after every window.

    Attributes:
      phi: (q,) current hyperparameters; can be set.  used: inner steps spent.  done: whether it has ended.  reason: why.
      history: `History`.  cut: in mode `restart`, the share of the horizon that runs go at present.
      state: `State`, all that changes, one immutable value: what fails on the way to the next leaves it as it was.

    Raises:
      HyperparameterError: settings that cannot work, such as a window longer than the run.
    """

    def __init__(
        self,
        inner: Inner,
        strategy: Strategy | None = None,
        *,
        steps: int,
        window: int = 25,
        runs: int = 10,
        outer: Outer | None = None,
        guard: Guard | None = Guard(),  # noqa: B008 - frozen
        forget: float = 0.99,
        every: int | None = None,
        mode: str | None = None,
        phi: ArrayLike | None = None,
        callbacks: Iterable[Callable[[Tuner], None]] = (),
    ):
        self.inner, self.guard = inner, guard
        self.strategy = Glocal() if strategy is None else strategy
        self.outer = outer_optimizers.adam() if outer is None else outer
        settings.strategy(self.strategy)
        self.mode = self.strategy.mode if mode is None else mode
        self.steps, self.window = whole("Tuner", "steps", steps), whole("Tuner", "window", window)
        self.runs = whole("Tuner", "runs", runs)
        self.every = None if every is None else whole("Tuner", "every", every)
        self.forget = number("Tuner", "forget", forget, "in [0, 1]", 0.0, 1.0)
        settings.check(self)
        space = inner.space
        self.callbacks = settings.parts(self.outer, guard, callbacks, space)
        start = frozen(space.clip(space.check(space.phi0 if phi is None else phi, "Tuner")))
        self.history = History(space.labels, space.transforms)
        self.initial = inner.snapshot()
        empty = Window(self.initial, 0, 0)
        state = State(start, self.outer.init(space.q), empty, inner.t, float(self.strategy.cut))
        self.state = closing.opened(self, state, 0)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def phi(self) -> Array:
        return self.state.phi

    @phi.setter
    def phi(self, phi: ArrayLike) -> None:
        space = self.inner.space
        self.state = self.state._replace(phi=frozen(space.clip(space.check(phi, "Tuner.phi"))))

    @property
    def used(self) -> int:
        return self.state.used

    @property
    def reason(self) -> str:
        return self.state.reason

    @property
    def done(self) -> bool:
        return bool(self.state.reason)

    @property
    def cut(self) -> float:
        return self.state.cut

    @property
    def hyper(self) -> dict[str, Any]:
        """Current hyperparameters in natural values."""
        return self.inner.space.natural(self.phi)

    @property
    def value(self) -> float:
        """The last outer loss measured at a window's end; NaN before the first."""
        return self.state.value

    @property
    def budget(self) -> int:
        """The most inner steps that tuning takes."""
        return self.mode_of.budget(self)

    @property
    def mode_of(self) -> Online | Restart:
        """What the mode does."""
        return MODES[self.mode]

    @property
    def result(self) -> Result:
        """What stands now; in mode `restart`, the best of the longest runs so far."""
        s, params = self.state, self.inner.params  # first: it waits for a card
        best = None if s.best is None else s.best.read()
        value, phi = s.value, s.phi
        if self.mode == "restart" and best is not None:
            value, phi, params = best.value, best.phi, best.params
        space, at = self.inner.space, phi
        if self.mode == "online" and len(self.history):
            at = space.clip(self.history.learned(s.value0))
        hyper, learned = space.natural(phi), space.natural(at)
        reason = s.reason or "not finished"
        return Result(params, hyper, phi.copy(), value, s.used, reason, self.history, best, learned)

    def spacing(self, length: int) -> int:
        """Inner steps between recorded hypergradients in a window."""
        return self.every or max(1, math.ceil(length / self.strategy.snapshots))

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self, batch: Any, val_batch: Any) -> float:
        """One inner step, for a loop of one's own; at a window's end phi moves.  Returns the inner loss.

        `val_batch` is looked at only where a hypergradient is due.  When that fails, the call raises with the step taken
        and not settled, and the next call settles it with its own `val_batch` in place of a step of its own.

        Raises:
          RuntimeError: tuning has ended (`done`), or the run was moved by someone else.
        """
        s = self.state
        if s.reason:
            raise RuntimeError(f"Tuner.step: tuning has ended ({s.reason}); look at tuner.result.")
        if self.inner.t != s.t:
            raise RuntimeError(
                f"Tuner.step: the run stands at step {self.inner.t}, this tuner left it at {s.t}. Give each tuner a run of "
                f"its own, or bring it back with checkpoint.load."
            )
        if math.isnan(s.value0):
            s = self.state = s._replace(value0=self._start_value(val_batch))
        if s.window.owed is None:
            strayed = s.strayed or not getattr(self.strategy, "recognises", lambda batch: True)(batch)
            loss = self.inner.step(s.phi, batch)
            s = self.state = s._replace(t=s.t + 1, window=s.window._replace(owed=loss), strayed=strayed)
        return self._settle(s, val_batch)

    def fit(self, batches: Any, val_batches: Any) -> Result:
        """Run to the end.

        Args:
          batches: inner batches: a callable of the number of steps spent, a list (cycled), or an iterable (begun again
            when exhausted).  A callable or a list makes a resumed run repeat an uninterrupted one.
          val_batches: outer batches, likewise, one a window.

        Returns:
          `Result`; in mode `restart` its parameters come from the best full run, and the run is left with these, and with
          what its model holds beside them.
        """
        inner_batch = source("Tuner.fit", "batches", batches)
        val_batch = source("Tuner.fit", "val_batches", val_batches)
        window, val = -1, None
        while not self.done:
            w = self.state.window
            if window != w.number:  # one outer batch a window: its trajectory is of one function
                window, val = w.number, val_batch(w.number)
            self.step(None if w.owed is not None else inner_batch(self.used), val)
        if self.mode == "restart" and self.reason.startswith("finished"):
            self._warn(final.train(self, inner_batch, val_batch))
            final.adopt(self)
        return self.result

    def snapshot(self) -> dict[str, Any]:
        """Everything that a resumed run needs: `{name: array}` and, under "meta", plain numbers and strings."""
        return resume.pack(self)

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot of a tuner with the same settings; nothing changes if it does not fit.

        Raises:
          CheckpointError: it was taken with other settings, or is not whole.
          ShapeError: it belongs to another model or space.
        """
        self.state, self.history, self.initial = resume.unpack(self, snapshot)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _start_value(self, val_batch: Any) -> float:
        value = self.inner.hypergradient(val_batch).value
        if not math.isfinite(value):
            raise ShapeError(
                f"Tuner.step: the outer loss is {value} before training. Look for NaN or inf in the validation batch."
            )
        return value

    def _settle(self, s: State, val_batch: Any) -> float:
        """What follows a step that was taken: nothing yet, a hypergradient, or the window's end; all of it or nothing."""
        loss, due = s.window.owed, self._due(s.window)
        assert loss is not None
        seen = loss if isinstance(loss, float) else 0.0
        if not math.isfinite(seen):
            s = self.read()
        elif due == "read":  # a card is asked for losses where the host waits anyway
            s = self.read()
            seen = s.window.settled().loss
        w = s.window.settled()
        s = s._replace(used=s.used + 1, window=w)
        if not math.isfinite(seen):
            self._commit(closing.back(self, s, f"inner loss is {seen}"))
        elif due == "record":
            later = Recorded(s.used, self.inner.record(val_batch))  # type: ignore[attr-defined]
            self.state = s._replace(window=w._replace(H=(*w.H, later)))
        elif due:
            found = self.inner.hypergradient(val_batch)
            s = s._replace(window=w._replace(H=(*w.H, found.grad)))
            if w.done == w.length:
                self._commit(closing.close(self, s, found.value, val_batch), found.grad)
            else:
                self._observe(s.used, found.grad)
                self.state = s
        else:
            self.state = s
        return loss

    def _due(self, w: Window) -> str:
        """What is due after the step that w owes: "", or a hypergradient, to "record" where the run is, or to "read"."""
        spacing, left = self.spacing(w.length), w.length - w.done - 1
        if left % spacing:  # counted from the end, so evenly spaced up to it
            return ""
        wait = left == 0 or (len(w.unread()) + 1) * spacing > final.LOOK
        return "read" if wait or not hasattr(self.inner, "record") else "record"

    def read(self) -> State:
        """The state with numbers of the host's: this waits for a card, and tells the history what was recorded since."""
        s, w, later = self.state, self.state.window.read(), self.state.window.unread()
        found = self.inner.recorded([h.look for h in later]) if later else []  # type: ignore[attr-defined]
        self.state = s._replace(window=w._replace(H=(*w.H[: len(w.H) - len(later)], *(h.grad for h in found))))
        for at, h in zip(later, found, strict=True):
            self._observe(at.used, h.grad)
        return self.state

    def _observe(self, used: int, h: Array) -> None:
        if np.isfinite(h).all():
            self.history.observe(used, h)

    def _commit(self, outcome: closing.Outcome, h: Array | None = None) -> None:
        """A window's end, with the hypergradient found there, comes to pass: the run first, which may refuse, then what
        cannot fail; the callbacks look on."""
        if outcome.kept is None:
            begin_again(self.inner, outcome.start)
        else:
            self.inner.forget(outcome.kept)
        if h is not None:
            self._observe(outcome.state.used, h)
        self.history.append(outcome.record)
        self.state = outcome.state._replace(t=self.inner.t)
        for call in self.callbacks:
            call(self)
        self._warn(outcome.warning)

    def _warn(self, warning: str) -> None:
        if warning:
            warnings.warn(f"Tuner: {warning}", DivergenceWarning, stacklevel=4)
