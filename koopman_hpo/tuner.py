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
from .modes import MODES, begin_again
from .outer import Outer, OuterState
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


class Best(NamedTuple):
    """The best run or window's end so far: everything from the one moment."""

    value: float  # outer loss
    phi: Array  # (q,) that it ran with
    params: NDArray  # (p,)
    steps: int  # inner steps of its run


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
        self.outer = outer or outer_optimizers.adam()
        settings.strategy(self.strategy)
        self.mode = mode or self.strategy.mode
        self.steps, self.window, self.runs, self.forget, self.every = steps, window, runs, forget, every
        settings.check(self)
        self._mode = MODES[self.mode]
        space = inner.space
        settings.parts(self.outer, guard, callbacks, space)
        self.callbacks = tuple(callbacks)
        self.phi = space.clip(space.check(space.phi0 if phi is None else phi, "Tuner"))
        self.history = History(space.labels, space.transforms)
        self.used, self.reason, self.cut = 0, "", self.strategy.cut
        self._outer_state: OuterState = self.outer.init(space.q)
        self.initial = inner.snapshot()
        self.value0 = math.nan
        self._value = math.nan
        self._rollbacks = 0
        self._best: Best | None = None
        self._trained = False  # mode restart: whether the final run has been
        self.norms: list[tuple[int, float]] = []
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
        """What stands now; in mode `restart`, the best of the longest runs so far."""
        best, phi, value, params = self._best, self.phi, self._value, self.inner.params
        if self.mode == "restart" and best is not None:
            value, phi, params = best.value, best.phi, best.params
        hyper = self.inner.space.natural(phi)
        return Result(params, hyper, phi.copy(), value, self.used, self.reason or "not finished", self.history, best)

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
        loss, w = self.inner.step(self.phi, batch), self.progress
        first = loss if w.done == 0 else w.first
        w = w._replace(done=w.done + 1, first=first, loss=w.loss + loss)
        # counted from the end, so evenly spaced up to it; a close that was interrupted is due still
        due = w.done >= w.length or (w.length - w.done) % self._spacing(w.length) == 0
        found = self.inner.hypergradient(val_batch) if due and math.isfinite(loss) else None
        self.used, self.progress = self.used + 1, w  # not before: a batch that was refused leaves the count as it was
        if found is not None:
            w.H.append(found.grad)
            if np.isfinite(found.grad).all():
                self.history.observe(self.used, found.grad)
            if w.done >= w.length:
                self._close(found.value)
        elif not math.isfinite(loss):
            self._roll_back(f"inner loss is {loss}")
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
        inner_batch = source("Tuner.fit", "batches", batches)
        val_batch = source("Tuner.fit", "val_batches", val_batches)
        window, val = -1, None
        while not self.done:
            if window != self.progress.number:  # one outer batch a window: its trajectory is of one function
                window, val = self.progress.number, val_batch(self.progress.number)
            self.step(inner_batch(self.used), val)
        if self.mode == "restart" and self.reason == "finished" and not self._trained:
            self._final_run(inner_batch, val_batch)
        return self.result

    def snapshot(self) -> dict[str, Any]:
        """Everything that a resumed run needs: `{name: array}` and, under "meta", plain numbers and strings."""
        w, best = self.progress, self._best
        meta = {
            "settings": settings.of(self),
            "scalars": [
                self.used,
                self.reason,
                self.cut,
                self.value0,
                self._value,
                self._rollbacks,
                self.norms,
            ],
            "window": [w.number, w.length, w.done, w.first, w.loss],
            "outer": self._outer_state.steps,
            "trained": self._trained,
            "best": None if best is None else [best.value, best.steps],
        }
        arrays = {f"inner/{k}": v for k, v in self.inner.snapshot().items()}
        arrays |= {f"start/{k}": v for k, v in w.start.items()}
        if self.mode == "restart":
            arrays |= {f"initial/{k}": v for k, v in self.initial.items()}
        arrays |= {f"history/{k}": v for k, v in self.history.arrays().items()}
        arrays |= {"phi": self.phi.copy(), "mean": self._outer_state.mean, "square": self._outer_state.square}
        arrays |= {"H": np.array(w.H).reshape(-1, self.phi.size)}
        if best is not None:
            arrays |= {"best/phi": best.phi, "best/params": best.params}
        return {"meta": meta, **arrays}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot of a tuner with the same settings; nothing changes if it does not fit.

        Raises:
          CheckpointError: it was taken with other settings.
          ShapeError: it belongs to another model or space.
        """
        meta = snapshot["meta"]
        settings.same(settings.of(self), meta["settings"])
        part = lambda head: {k.removeprefix(head): v for k, v in snapshot.items() if k.startswith(head)}
        history, phi = History.from_arrays(part("history/")), np.array(snapshot["phi"])
        number, length, done, first, loss = meta["window"]
        window = Window(part("start/"), number, length, done, first, loss, list(snapshot["H"]))
        outer_state = OuterState(snapshot["mean"], snapshot["square"], meta["outer"])
        best = meta["best"]
        if best is not None:
            best = Best(best[0], snapshot["best/phi"], snapshot["best/params"], best[1])
        used, reason, cut, value0, value, rollbacks, norms = meta["scalars"]
        self.inner.restore(part("inner/"))  # refuses what does not fit; nothing else has moved yet
        self.history, self.phi, self.progress = history, phi, window
        self._outer_state, self._best = outer_state, best
        self.used, self.reason, self.cut, self.value0, self._value = used, reason, cut, value0, value
        self._trained = meta["trained"]
        self._rollbacks, self.norms = rollbacks, [(int(n), float(size)) for n, size in norms]
        self.initial = part("initial/") or self.initial

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
        verdict = self._verdict(value, H)
        if verdict:
            self._roll_back(verdict, value)
            return
        self._rollbacks, self._value = 0, value
        ahead = max(0, round(self._mode.left(self) / self._spacing(w.length)))
        forecast = self.strategy.estimate(H, ahead)
        doubt, target = self._doubt(H[-1]), self.phi
        if doubt and self.guard is not None:
            target = self.guard.shrunk(self.inner.space, self.phi)
            if self.mode == "restart" and np.array_equal(target, self.phi):
                doubt = ""  # nothing to shrink: the same run would give the same doubt, so its sign is followed
        if doubt:
            self._outer_state = self.outer.init(self.phi.size)
            self.norms.clear()
        else:
            step, self._outer_state = self.outer.update(forecast.value, self._outer_state, self._lr())
            target = self.inner.space.clip(self.phi - step)
        self._record(H, forecast, self.phi - target, value, f"not used, {doubt}" if doubt else "")
        self._keep_best(value, w.length)
        self.phi = target
        self._mode.advance(self, forecast.value, reset=bool(doubt))
        self._next()

    def _verdict(self, value: float, H: Array) -> str:
        """Why the window must go, or an empty string; H (m, q) is its trajectory."""
        if not math.isfinite(value):
            return f"validation loss is {value}"
        if not np.isfinite(H).all():
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

    def _keep_best(self, value: float, steps: int) -> None:
        """Online the lowest outer loss counts; in mode `restart` a longer run comes before a shorter one."""
        rank = lambda value, steps: (-steps if self.mode == "restart" else 0, value)
        if self._best is None or rank(value, steps) < rank(self._best.value, self._best.steps):
            self._best = Best(value, self.phi.copy(), self.inner.params, steps)

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
        if self.done:
            shrunk = self.phi  # nothing will run with it
        self._record_event(event, why, value, self.phi - shrunk)
        begin_again(self.inner, w.start)
        self._outer_state = self.outer.init(self.inner.space.q)
        self.norms.clear()
        self.phi = shrunk
        self._next()

    def _record_event(self, event: str, why: str, value: float, move: Array) -> None:
        """A window without an estimate."""
        nothing = np.full(self.inner.space.q, np.nan)
        H = np.array(self.progress.H) if self.progress.H else nothing[None]
        self._record(H, Forecast(nothing, nothing, False, why, "none", math.nan, math.nan), move, value, event)

    def _doubt(self, h: Array) -> str:
        """The guard's doubt about a hypergradient, with how fast the tangents have been growing."""
        if self.guard is None:
            return ""
        now, size = self.used, self.inner.tangent_norm()
        self.norms.append((now, size))
        while len(self.norms) > 1 and now - self.norms[1][0] >= self.guard.chaos_steps:
            self.norms.pop(0)  # the oldest one kept is the youngest that is old enough
        (then, before), growth = self.norms[0], math.nan
        if now - then >= self.guard.chaos_steps and before > 0 and size > 0:
            growth = math.log(size / before) / (now - then)
        recent = self.history.recent(now - self.guard.chaos_steps)
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
        """Train once, to the end and without tangents, with the hyperparameters found; a run that diverges is recorded
        and repeated with a smaller step, three times at most.  The best full run stands, whichever it was."""
        self._trained = True
        for _ in range(3):
            value, why = self._train(inner_batch, val_batch(self.progress.number + 1))
            if not why:
                self._value = value
                self._keep_best(value, self.steps)
                return
            shrunk = (self.guard or Guard()).shrunk(self.inner.space, self.phi)
            self._record_event(f"final run rolled back: {why}", why, value, self.phi - shrunk)
            self.inner.restore(self.initial)
            if np.array_equal(shrunk, self.phi):
                break
            self.phi = shrunk
        self.reason = "finished, but the final run diverged: the best run before it stands, if there is one"
        warnings.warn(f"Tuner.fit: {self.reason}.", DivergenceWarning, stacklevel=3)

    def _train(self, inner_batch: Callable[[int], Any], val_batch: Any) -> tuple[float, str]:
        """A plain run from the start: its outer loss, and why it must go or an empty string."""
        self.inner.restore(self.initial)
        total, first, value = 0.0, math.nan, math.nan
        for t in range(self.steps):
            loss = self.inner.step(self.phi, inner_batch(self.used), tangents=False)
            self.used += 1
            total, first = total + loss, loss if t == 0 else first
            if not math.isfinite(loss):
                return value, f"inner loss is {loss}"
        value = self.inner.hypergradient(val_batch).value
        self.progress = Window(self.initial, self.progress.number, self.steps, self.steps, first, total, [])
        return value, self._verdict(value, np.zeros(1))
