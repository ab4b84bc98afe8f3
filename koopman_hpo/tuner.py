"""The one outer loop: inner steps with tangents, a window's trajectory, an estimate, a step of phi, and a guard.

Mode `online`: phi moves while the model trains, one pass; it becomes a schedule.  Mode `restart`: phi is constant during a
run, tangents are never reset, phi is updated at the run's end and training begins again; runs are cut short at first and
double in length whenever two successive outer gradients oppose each other (horizon continuation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import outer as outer_optimizers
from . import settings
from .batches import source
from .errors import DivergenceWarning, ShapeError
from .guard import Guard, coherence
from .history import History, Record
from .inner import Inner
from .koopman import Forecast
from .modes import MODES
from .outer import Outer, OuterState
from .strategies import Glocal, Strategy

Array = NDArray[Any]


class Result(NamedTuple):
    """What tuning leaves: the model, the hyperparameters, and the story."""

    params: NDArray  # (p,) trained parameters; the last good ones if training diverged
    hyper: dict[str, Any]  # natural values
    phi: Array  # (q,)
    value: float  # last outer loss measured
    steps: int  # inner steps spent
    reason: str  # why it ended
    history: History


class Window(NamedTuple):
    """The window under way."""

    start: dict[str, NDArray]  # snapshot to go back to
    number: int  # windows begun before
    length: int  # inner steps planned
    done: int  # inner steps taken
    first: float  # inner loss before the first step
    loss: float  # sum of inner losses
    H: list[Array]  # hypergradients recorded, (q,) each


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
      phi: (q,) current hyperparameters.  used: inner steps spent.  done: whether it has ended.  reason: why.
      history: `History`.  cut: in mode `restart`, the share of the horizon that runs go at present.

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
        callbacks: Sequence[Callable[[Tuner], None]] = (),
    ):
        self.inner, self.strategy, self.guard = inner, strategy or Glocal(), guard
        self.outer, self.callbacks = outer or outer_optimizers.adam(), tuple(callbacks)
        settings.strategy(self.strategy)
        self.mode = mode or self.strategy.mode
        self.steps, self.window, self.runs, self.forget, self.every = steps, window, runs, forget, every
        settings.check(self)
        self._mode = MODES[self.mode]
        space = inner.space
        self.phi = space.clip(space.check(space.phi0 if phi is None else phi, "Tuner"))
        self.history = History(space.labels, space.transforms)
        self.used, self.reason, self.cut = 0, "", self.strategy.cut
        self._outer_state: OuterState = self.outer.init(space.q)
        self.initial = inner.snapshot()
        self.value0 = math.nan
        self._value = math.nan
        self._rollbacks = 0
        self._best: tuple[float, Array, NDArray] | None = None
        self._norms: list[tuple[int, float]] = []
        self.progress = self._open(0)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return bool(self.reason)

    @property
    def hyper(self) -> dict[str, Any]:
        """Current hyperparameters in natural values."""
        return self.inner.space.natural(self.phi)

    @property
    def value(self) -> float:
        """The last outer loss measured at a window's end; NaN before the first."""
        return self._value

    @property
    def budget(self) -> int:
        """The most inner steps that tuning takes."""
        return self._mode.budget(self)

    @property
    def result(self) -> Result:
        """What stands now; in mode `restart`, the best full run so far if there is one."""
        phi, value, params = self.phi, self._value, self.inner.params
        if self.mode == "restart" and self._best is not None:
            value, phi, params = self._best
        hyper = self.inner.space.natural(phi)
        return Result(params, hyper, phi.copy(), value, self.used, self.reason or "not finished", self.history)

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self, batch: Any, val_batch: Any) -> float:
        """One inner step, for a loop of one's own; at a window's end phi moves.  Returns the inner loss.

        `val_batch` is looked at only where a hypergradient is due.

        Raises:
          RuntimeError: tuning has ended (`done`).
        """
        if self.done:
            raise RuntimeError(f"Tuner.step: tuning has ended ({self.reason}); look at tuner.result.")
        if math.isnan(self.value0):
            self.value0 = self._start_value(val_batch)
        loss = self.inner.step(self.phi, batch)
        self.used += 1
        w = self.progress
        first = loss if w.done == 0 else w.first
        w = self.progress = w._replace(done=w.done + 1, first=first, loss=w.loss + loss)
        if not math.isfinite(loss):
            self._roll_back(f"inner loss is {loss}")
        elif w.done % self._spacing(w.length) == 0 or w.done == w.length:
            found = self.inner.hypergradient(val_batch)
            w.H.append(found.grad)
            if np.isfinite(found.grad).all():
                self.history.observe(self.used, found.grad)
            if w.done == w.length:
                self._close(found.value)
        return loss

    def fit(self, batches: Any, val_batches: Any) -> Result:
        """Run to the end.

        Args:
          batches: inner batches: a callable of the number of steps spent, a list (cycled), or an iterable (begun again
            when exhausted).  A callable or a list makes a resumed run repeat an uninterrupted one.
          val_batches: outer batches, likewise, one a window.

        Returns:
          `Result`; in mode `restart` its parameters come from a full run with the hyperparameters found.
        """
        inner_batch, val_batch = (
            source("Tuner.fit", "batches", batches),
            source("Tuner.fit", "val_batches", val_batches),
        )
        window, val = -1, None
        while not self.done:
            if window != self.progress.number:  # one outer batch a window: its trajectory is of one function
                window, val = self.progress.number, val_batch(self.progress.number)
            self.step(inner_batch(self.used), val)
        if self.mode == "restart" and self.reason == "finished":
            self._final_run(inner_batch, val_batch)
        return self.result

    def snapshot(self) -> dict[str, Any]:
        """Everything that a resumed run needs: `{name: array}` and, under "meta", plain numbers and strings."""
        w, best = self.progress, self._best
        meta = {
            "settings": self.settings,
            "scalars": [
                self.used,
                self.reason,
                self.cut,
                self.value0,
                self._value,
                self._rollbacks,
                self._norms,
            ],
            "window": [w.number, w.length, w.done, w.first, w.loss],
            "outer": self._outer_state.steps,
            "best": None if best is None else best[0],
        }
        arrays = {f"inner/{k}": v for k, v in self.inner.snapshot().items()}
        arrays |= {f"start/{k}": v for k, v in w.start.items()}
        if self.mode == "restart":
            arrays |= {f"initial/{k}": v for k, v in self.initial.items()}
        arrays |= {f"history/{k}": v for k, v in self.history.arrays().items()}
        arrays |= {"phi": self.phi.copy(), "mean": self._outer_state.mean, "square": self._outer_state.square}
        arrays |= {"H": np.array(w.H).reshape(-1, self.phi.size)}
        if best is not None:
            arrays |= {"best/phi": best[1], "best/params": best[2]}
        return {"meta": meta, **arrays}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot of a tuner with the same settings; nothing changes if it does not fit.

        Raises:
          CheckpointError: it was taken with other settings.
          ShapeError: it belongs to another model or space.
        """
        meta = snapshot["meta"]
        settings.same(self.settings, meta["settings"])
        part = lambda head: {k.removeprefix(head): v for k, v in snapshot.items() if k.startswith(head)}
        history, phi = History.from_arrays(part("history/")), np.array(snapshot["phi"])
        number, length, done, first, loss = meta["window"]
        window = Window(part("start/"), number, length, done, first, loss, list(snapshot["H"]))
        outer_state = OuterState(snapshot["mean"], snapshot["square"], meta["outer"])
        best = meta["best"]
        best = None if best is None else (best, snapshot["best/phi"], snapshot["best/params"])
        used, reason, cut, value0, value, rollbacks, norms = meta["scalars"]
        self.inner.restore(part("inner/"))  # refuses what does not fit; nothing else has moved yet
        self.history, self.phi, self.progress, self._outer_state, self._best = (
            history,
            phi,
            window,
            outer_state,
            best,
        )
        self.used, self.reason, self.cut, self.value0, self._value = used, reason, cut, value0, value
        self._rollbacks, self._norms = rollbacks, [(int(n), float(size)) for n, size in norms]
        self.initial = part("initial/") or self.initial

    @property
    def settings(self) -> dict[str, Any]:
        """What two tuners must share for one to go on where the other stopped."""
        names = ("mode", "steps", "window", "runs", "forget", "every")
        shared = {n: getattr(self, n) for n in names} | {"labels": list(self.inner.space.labels)}
        outer = f"{self.outer.name}(lr={self.outer.lr})"
        return shared | {"strategy": repr(self.strategy), "guard": repr(self.guard), "outer": outer}

    # -- windows ---------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> Window:
        return Window(self._mode.start(self), number, self._mode.length(self), 0, math.nan, 0.0, [])

    def _spacing(self, length: int) -> int:
        return self.every or max(1, math.ceil(length / self.strategy.snapshots))

    def _start_value(self, val_batch: Any) -> float:
        value = self.inner.hypergradient(val_batch).value
        if not math.isfinite(value):
            raise ShapeError(
                f"Tuner.step: the outer loss is {value} before training. Look for NaN or inf in the validation batch."
            )
        return value

    def _close(self, value: float) -> None:
        w = self.progress
        H = np.array(w.H)
        verdict = self._verdict(value, H[-1])
        if verdict:
            self._roll_back(verdict, value)
            return
        self._rollbacks, self._value = 0, value
        ahead = max(0, round(self._mode.left(self) / self._spacing(w.length)))
        forecast = self.strategy.estimate(H, ahead)
        doubt = self._doubt(H[-1])
        elsewhere = self._mode.after_doubt(self) if doubt else None
        if elsewhere is not None:
            target = elsewhere
            self._outer_state = self.outer.init(self.phi.size)
            self._norms.clear()
        else:
            step, self._outer_state = self.outer.update(forecast.value, self._outer_state, self._lr())
            target = self.inner.space.clip(self.phi - step)
        self._record(H, forecast, self.phi - target, value, f"not used, {doubt}" if elsewhere is not None else "")
        self._keep_best(value)
        self.phi = target
        self._mode.advance(self, forecast.value, reset=elsewhere is not None)
        self._next()

    def _verdict(self, value: float, h: Array) -> str:
        """Why the window must go, or an empty string."""
        if not math.isfinite(value):
            return f"validation loss is {value}"
        if not np.isfinite(h).all():
            return "hypergradient is not finite"
        return self._mode.verdict(self, value) if self.guard is not None else ""

    def _lr(self) -> float:
        return self.outer.lr if self.outer.lr is not None else self._mode.lr(self)

    def _next(self) -> None:
        """Open the next window, or end; either way the callbacks look on."""
        if not self.done and self._mode.ended(self):
            self.reason = "finished"
        if not self.done:
            self.progress = self._open(self.progress.number + 1)
        for call in self.callbacks:
            call(self)

    def _keep_best(self, value: float) -> None:
        full = self.mode == "restart" and self.progress.length == self.steps
        if full and (self._best is None or value < self._best[0]):
            self._best = (value, self.phi.copy(), self.inner.params)

    # -- when things go wrong --------------------------------------------------------------------------------------

    def _roll_back(self, why: str, value: float = math.nan) -> None:
        """Back to the window's start with zero tangents and a smaller step, or the end of tuning."""
        w = self.progress
        self._rollbacks += 1
        guard = self.guard or Guard()
        shrunk = guard.shrunk(self.inner.space, self.phi)
        stuck = np.array_equal(shrunk, self.phi)
        event = f"rolled back: {why}"
        if self._rollbacks >= (min(3, guard.patience) if stuck else guard.patience):
            self.reason = f"stopped: {self._rollbacks} rollbacks in a row, the last one because {why}"
            event += "; stopped"
            advice = "Tune lr, or start from a smaller one." if stuck else "Start from a smaller lr."
            warnings.warn(f"Tuner: {self.reason}. {advice}", DivergenceWarning, stacklevel=4)
        H = np.array(w.H) if w.H else np.full((1, self.inner.space.q), np.nan)
        nothing = np.full(self.inner.space.q, np.nan)
        self._record(H, Forecast(nothing, nothing, False, why, "none", math.nan, math.nan), self.phi - shrunk, value, event)
        self.inner.restore(w.start)
        self.inner.forget(0)
        self._outer_state = self.outer.init(self.inner.space.q)
        self._norms.clear()
        self.phi = shrunk
        self._next()

    def _doubt(self, h: Array) -> str:
        """The guard's doubt about a hypergradient, with how fast the tangents have been growing."""
        if self.guard is None:
            return ""
        now, size = self.used, self.inner.tangent_norm()
        self._norms = [n for n in self._norms if now - n[0] <= self.guard.chaos_steps] + [(now, size)]
        (then, before), growth = self._norms[0], math.nan
        if now - then >= self.guard.chaos_steps and before > 0 and size > 0:
            growth = math.log(size / before) / (now - then)
        recent = self.history.trajectory_since(now - self.guard.chaos_steps)
        return self.guard.doubt(h, self._lr(), self.value0, growth, recent)

    def _record(self, H: Array, forecast: Forecast, move: Array, value: float, event: str) -> None:
        w = self.progress
        with np.errstate(invalid="ignore"):
            wave = coherence(H)
        self.history.append(
            Record(
                step=self.used,
                t=self.inner.t,
                phi=self.phi.copy(),
                h=H[-1],
                estimate=forecast.value,
                error=forecast.error,
                move=move,
                coherence=wave,
                loss=w.loss / max(w.done, 1),
                value=value,
                accepted=bool(forecast.accepted),
                method=forecast.method,
                reason=forecast.reason,
                event=event,
            )
        )

    def _final_run(self, inner_batch: Callable[[int], Any], val_batch: Callable[[int], Any]) -> None:
        """Train once, to the end and without tangents, with the hyperparameters found; keep the better of it and the
        best full run before."""
        self.inner.restore(self.initial)
        for t in range(self.steps):
            loss = self.inner.step(self.phi, inner_batch(t), tangents=False)
            if not math.isfinite(loss):
                break
        self.used += self.steps
        value = self.inner.hypergradient(val_batch(self.progress.number + 1)).value
        if not math.isfinite(value):
            self.reason = "finished, but the final run diverged: best full run before it, or the start"
            warnings.warn(f"Tuner.fit: {self.reason}.", DivergenceWarning, stacklevel=3)
            self.inner.restore(self.initial)
        elif self._best is None or value <= self._best[0]:
            self._value = value
            self._best = (value, self.phi.copy(), self.inner.params)
