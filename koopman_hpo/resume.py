"""A tuner as arrays and plain numbers, and back: everything is read and checked before anything moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import settings
from .errors import CheckpointError
from .history import History
from .inner import buffers
from .outer import OuterState
from .snapshots import hosted
from .state import Best, State, Window, frozen

if TYPE_CHECKING:
    from .tuner import Tuner

Array = NDArray[Any]
_BUFFERS = "best/buffers/"
_WINDOW = ("number", "length", "done", "first", "loss", "owed")
_SCALARS = ("t", "cut", "used", "reason", "value0", "value", "rollbacks", "norms", "trained", "attempts", "strayed")


def pack(tuner: Tuner) -> dict[str, Any]:
    """`{name: array}` and, under "meta", what goes into JSON."""
    s = tuner.read()
    w = s.window
    best = None if s.best is None else s.best.read()
    meta = {
        "settings": settings.of(tuner),
        "scalars": {n: getattr(s, n) for n in _SCALARS},
        "window": {n: getattr(w, n) for n in _WINDOW},
        "outer": s.outer.steps,
        "best": None if best is None else [best.value, best.steps],
    }
    arrays = {f"inner/{k}": v for k, v in tuner.inner.snapshot().items()}  # first: it waits for a card
    arrays |= {f"start/{k}": hosted(v) for k, v in w.start.items()}
    if w.start is not tuner.initial and tuner.mode_of.returns(tuner):
        arrays |= {f"initial/{k}": v for k, v in tuner.initial.items()}
    arrays |= {f"history/{k}": v for k, v in tuner.history.arrays().items()}
    arrays |= {"phi": s.phi.copy(), "mean": s.outer.mean.copy(), "square": s.outer.square.copy()}
    arrays |= {"H": np.array(w.H).reshape(-1, s.phi.size)}
    if best is not None:
        arrays |= {"best/phi": best.phi.copy(), "best/params": best.params}
        arrays |= {f"{_BUFFERS}{k}": v for k, v in best.buffers.items()}
    return {"meta": meta, **arrays}


def unpack(tuner: Tuner, snapshot: Mapping[str, Any]) -> tuple[State, History, dict[str, NDArray]]:
    """State, history and initial snapshot of a tuner; its run is brought to where it was, last of all.

    Raises:
      CheckpointError: other settings, something missing, of another shape, or impossible.
      ShapeError: the run refuses its part.
    """
    if not isinstance(snapshot, Mapping) or not isinstance(snapshot.get("meta"), Mapping):
        raise CheckpointError("Tuner.restore: needs what Tuner.snapshot returned, with its 'meta'.")
    meta = snapshot["meta"]
    try:
        settings.same(settings.of(tuner), meta["settings"])
        part = lambda head: {k.removeprefix(head): v for k, v in snapshot.items() if k.startswith(head)}
        state = _state(tuner, snapshot, meta, part("start/"))
        history = History.from_arrays(part("history/"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"Tuner.restore: something is missing or of another kind ({error!r}).") from error
    if history.labels != tuner.inner.space.labels:
        raise CheckpointError(f"Tuner.restore: the history is of {history.labels}, expected {tuner.inner.space.labels}.")
    initial = part("initial/") or (state.window.start if tuner.mode_of.returns(tuner) else tuner.initial)
    _run(tuner, state.window.start, initial, part("inner/"))
    return state._replace(t=tuner.inner.t), history, initial


def _state(tuner: Tuner, snapshot: Mapping[str, Any], meta: Mapping[str, Any], start: dict[str, NDArray]) -> State:
    q, p = tuner.inner.space.q, tuner.inner.params.size
    phi, mean, square = (_array(snapshot, n, (q,)) for n in ("phi", "mean", "square"))
    H = _array(snapshot, "H", (None, q), finite=False)
    scalars, window = dict(meta["scalars"]), Window(start, H=tuple(H), **meta["window"])
    _true("window", 0 <= window.done < window.length or bool(scalars["reason"]), meta["window"])
    _true("window", len(H) <= window.done and window.number >= 0, meta["window"])
    _true("used", scalars["used"] >= window.done and scalars["rollbacks"] >= 0, scalars)
    _true("cut", 0 < scalars["cut"] <= 1, scalars["cut"])
    scalars["norms"] = tuple((int(n), float(size)) for n, size in scalars["norms"])
    best = None
    if meta["best"] is not None:
        value, steps = meta["best"]
        phi_then, params = _array(snapshot, "best/phi", (q,)), _array(snapshot, "best/params", (p,))
        best = Best(value, phi_then, params, steps, _buffers(tuner, snapshot))
    return State(frozen(phi), OuterState(mean, square, int(meta["outer"])), window, best=best, **scalars)


def _buffers(tuner: Tuner, snapshot: Mapping[str, Any]) -> dict[str, NDArray]:
    found = {k.removeprefix(_BUFFERS): np.array(v) for k, v in snapshot.items() if k.startswith(_BUFFERS)}
    kinds = lambda arrays: {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()}
    _true("best/buffers", kinds(found) == kinds(buffers(tuner.inner)), kinds(found))
    return found


def _array(snapshot: Mapping[str, Any], name: str, shape: tuple[int | None, ...], finite: bool = True) -> Array:
    a = np.array(snapshot[name])
    fits = a.ndim == len(shape) and all(want in (None, n) for want, n in zip(shape, a.shape, strict=True))
    _true(name, fits and a.dtype.kind == "f" and (not finite or bool(np.isfinite(a).all())), f"{a.shape} of {a.dtype}")
    return a


def _true(name: str, holds: bool, came: Any) -> None:
    if not holds:
        raise CheckpointError(f"Tuner.restore: {name} does not fit this tuner or is not finite, got {came}.")


def _run(tuner: Tuner, *snapshots: Mapping[str, NDArray]) -> None:
    """Restore the last of these; all must fit, or the run stays where it is."""
    before = tuner.inner.snapshot()
    try:
        for snapshot in snapshots:
            tuner.inner.restore(snapshot)
    except BaseException:
        tuner.inner.restore(before)
        raise
