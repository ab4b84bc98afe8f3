"""A window's end, worked out whole before anything moves: the estimate and its step of phi, or the way back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import strategies
from .errors import HyperparameterError
from .guard import Guard, coherence
from .history import Record
from .inner import buffers, mark_params
from .koopman import Forecast
from .state import Best, State, Window, frozen

if TYPE_CHECKING:
    from .tuner import Tuner

Array = NDArray[Any]


class Outcome(NamedTuple):
    """What a window's end leads to."""

    state: State  # of the tuner, after it
    record: Record
    kept: float | None  # share of the tangents that the run goes on with; None: it begins again
    start: dict[str, NDArray]  # from this snapshot
    warning: str = ""


def opened(tuner: Tuner, s: State, number: int, start: dict[str, NDArray] | None = None) -> State:
    """The state with a fresh window; `start` when it does not begin where the run stands."""
    start = tuner.mode_of.start(tuner) if start is None else start
    return s._replace(window=Window(start, number, tuner.mode_of.length(tuner, s)))


def close(tuner: Tuner, s: State, value: float, val_batch: Any) -> Outcome:
    """The end of the window that s has run through, with the outer loss found there on `val_batch`."""
    H, mode, space = np.array(s.window.H), tuner.mode_of, tuner.inner.space
    why = verdict(tuner, s, value, H)
    if why:
        return back(tuner, s, why, value)
    s = s._replace(rollbacks=0, value=value, best=better(tuner, s, value))
    forecast = _estimate(tuner, s, H, val_batch)
    s, doubt = _doubt(tuner, s, H[-1])
    target = s.phi
    if not np.isfinite(forecast.value).all():
        doubt = "the estimate is not finite"
    elif doubt and tuner.guard is not None:
        target = tuner.guard.shrunk(space, s.phi)
        if tuner.mode == "restart" and np.array_equal(target, s.phi):
            doubt = ""  # nothing to shrink: the same run would give the same doubt, so its sign is followed
        elif doubt.startswith("excess") and mode.early(tuner, s):
            return back(tuner, s._replace(window=s.window._replace(start=tuner.initial)), doubt, value)
    moved, kept = s, mode.kept(tuner, s)
    if doubt:
        moved = s._replace(outer=tuner.outer.init(space.q), norms=())
        kept = None if kept is None else 0.0
    else:
        step, memory = _step(tuner, forecast.value, s)
        target = space.clip(mode.slowed(tuner, s, s.phi - step))
        moved = mode.lengthened(tuner, s._replace(outer=memory), forecast.value)
    record = _record(tuner, s, H, forecast, s.phi - target, value, f"not used, {doubt}" if doubt else "")
    moved = moved._replace(phi=frozen(target))
    return _next(tuner, moved, record, kept)


def back(tuner: Tuner, s: State, why: str, value: float = math.nan) -> Outcome:
    """Back to where the window of s begins with zero tangents and a smaller step, or the end of tuning."""
    guard, event, warning = tuner.guard or Guard(), f"rolled back: {why}", ""
    count = s.rollbacks + 1
    times = min(count, 3) if tuner.mode_of.early(tuner, s) else 1
    shrunk = guard.shrunk(tuner.inner.space, s.phi, times)
    stuck = np.array_equal(shrunk, s.phi)
    if count >= (min(3, guard.patience) if stuck else guard.patience):
        s = s._replace(reason=f"stopped: {count} rollbacks in a row, the last one because {why}")
        event += "; stopped"
        shrunk = s.phi  # nothing will run with it
        warning = f"{s.reason}. {'Tune lr, or start from a smaller one.' if stuck else 'Start from a smaller lr.'}"
    record = without(tuner, s, event, why, value, s.phi - shrunk)
    moved = s._replace(rollbacks=count, outer=tuner.outer.init(tuner.inner.space.q), norms=(), phi=frozen(shrunk))
    return _next(tuner, moved, record, None, warning)


def _next(tuner: Tuner, s: State, record: Record, kept: float | None, warning: str = "") -> Outcome:
    """Open the next window, or end."""
    w = s.window
    if not s.reason and tuner.mode_of.ended(tuner, s):
        s = s._replace(reason="finished")
        if math.isnan(s.value):
            s = s._replace(reason="finished, but every window was rolled back")
            warning = f"{s.reason}. Start from a smaller lr, or look at history.event for why."
    if kept is None:  # of tangents that are gone
        s = s._replace(norms=())
    if not s.reason:
        s = opened(tuner, s, w.number + 1, w.start if kept is None else None)
    return Outcome(s, record, kept, w.start, warning)


def verdict(tuner: Tuner, s: State, value: float, H: Array) -> str:
    """Why the window must go, or an empty string; H (m, q) is its trajectory."""
    if not math.isfinite(value):
        return f"validation loss is {value}"
    if not np.isfinite(H).all():
        return "hypergradient is not finite"
    return tuner.mode_of.verdict(tuner, s, value) if tuner.guard is not None else ""


def better(tuner: Tuner, s: State, value: float) -> Best:
    """The best so far.  Online the lowest outer loss counts; in mode `restart` a longer run comes before a shorter one."""
    steps, best = s.window.length, s.best
    rank = lambda value, steps: (-steps if tuner.mode == "restart" else 0, value)
    if best is None or rank(value, steps) < rank(best.value, best.steps):
        return Best(value, s.phi, mark_params(tuner.inner), steps, buffers(tuner.inner))
    return best


def _estimate(tuner: Tuner, s: State, H: Array, val_batch: Any) -> Forecast:
    steps, length, q = max(0, tuner.mode_of.left(tuner, s)), s.window.length, H.shape[1]
    ahead, look = round(steps / tuner.spacing(length)), getattr(tuner.strategy, "look", None)
    if look is None:
        forecast = tuner.strategy.estimate(H, ahead)
    else:
        forecast = look(H, ahead, strategies.Window(tuner.inner, val_batch, steps, length, s.strayed))
    if not (isinstance(forecast, Forecast) and np.shape(forecast.value) == np.shape(forecast.error) == (q,)):
        raise HyperparameterError(
            f"Tuner: {type(tuner.strategy).__name__}.estimate must return a Forecast with value and error (q,) = ({q},), "
            f"got {type(forecast).__name__}. Make one with koopman.extrapolate or dataclasses.replace."
        )
    return forecast


def _step(tuner: Tuner, estimate: Array, s: State) -> tuple[Array, Any]:
    step, memory = tuner.outer.update(estimate, s.outer, _lr(tuner, s))
    if np.shape(step) != estimate.shape or not np.isfinite(step).all():
        raise HyperparameterError(
            f"Tuner: outer.update must return a finite step (q,) = {estimate.shape}, got {step!r} from {estimate}."
        )
    return step, memory


def _lr(tuner: Tuner, s: State) -> float:
    return tuner.outer.lr if tuner.outer.lr is not None else tuner.mode_of.lr(s)


def _doubt(tuner: Tuner, s: State, h: Array) -> tuple[State, str]:
    """The guard's doubt about a hypergradient, with how fast the tangents have been growing."""
    if tuner.guard is None:
        return s, ""
    now, size, span = s.used, tuner.inner.tangent_norm(), tuner.guard.chaos_steps
    norms = [*s.norms, (now, size)]
    while len(norms) > 1 and now - norms[1][0] >= span:
        norms.pop(0)  # the oldest one kept is the youngest that is old enough
    (then, before), growth = norms[0], math.nan
    if now - then >= span and before > 0 and size > 0:
        growth = math.log(size / before) / (now - then)
    recent = np.vstack([tuner.history.recent(now - span, least=9), h])  # h itself is not recorded yet
    return s._replace(norms=tuple(norms)), tuner.guard.doubt(h, _lr(tuner, s), s.value0, growth, recent)


def without(tuner: Tuner, s: State, event: str, why: str, value: float, move: Array) -> Record:
    """The record of a window that has no estimate."""
    nothing = np.full(tuner.inner.space.q, np.nan)
    H = np.array(s.window.H) if s.window.H else nothing[None]
    return _record(tuner, s, H, Forecast(nothing, nothing, False, why, "none", math.nan, math.nan), move, value, event)


def _record(tuner: Tuner, s: State, H: Array, forecast: Forecast, move: Array, value: float, event: str) -> Record:
    with np.errstate(invalid="ignore"):
        wave = coherence(H)
    return Record(
        step=s.used,
        t=tuner.inner.t,
        phi=s.phi.copy(),
        h=H[-1],
        estimate=forecast.value,
        error=forecast.error,
        move=move,
        coherence=wave,
        loss=s.window.loss / max(s.window.done, 1),
        value=value,
        accepted=bool(forecast.accepted),
        method=forecast.method,
        reason=forecast.reason,
        event=event,
    )
