"""A loop of several runs, for a short training from an unknown learning rate: search first, then train.

A short online run at a constant lr, with large outer steps, finds where to begin and is thrown away.  Training begins anew
at a multiple of the rate found, which falls linearly to zero and whose height is tuned, and at a penalty rather too strong
than too weak: a window sees what there is too much of, and not what would pay later.  docs/evidence.md has what it gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import outer
from .batches import source
from .errors import HyperparameterError, ShapeError, number, short, whole
from .guard import Guard
from .hyperparameters import Hyperparameter
from .inner import Inner
from .space import Space
from .strategies import Local, Strategy
from .tuner import Result, Tuner

# chosen on seeds of the study that are not reported
SHARE, MOVES, RATE = 1 / 3, 20, 0.5  # of a run that the search takes, outer steps in it, and their size
PEAK, PENALTY = 10.0, 5e-3  # times the rate found; and where a penalty begins
THEN = 0.25  # the size of outer steps in the runs that follow
START, MOMENTUM = 0.5, (0.1, 0.9)  # of momentum: a long memory undoes what lr does about noise
PENALTIES = ("l2", "weight_decay")
CAREFUL = Guard(again=0.3, excess=0.5, chaos_growth=math.inf)  # late flips of a hypergradient's sign are noise here
SEARCHING = replace(CAREFUL, again=1.0)
CALL = "search_first"


class Searched(NamedTuple):
    """What `search_first` leaves."""

    search: Result  # of the short run; its `learned` is where the others began
    runs: tuple[Result, ...]  # that followed, in order

    @property
    def best(self) -> Result:
        """The run that ended with the lowest outer loss."""
        return min(self.runs, key=lambda result: result.value if math.isfinite(result.value) else math.inf)

    @property
    def steps(self) -> int:
        """Inner steps spent in all."""
        return self.search.steps + sum(result.steps for result in self.runs)


def searching(space: Space) -> Space:
    """The space that is searched: `space`, momentum begun at .5 and kept within .1 and .9, where it is tuned."""
    entries = dict(space)
    if "momentum" in entries and entries["momentum"].knots is None:
        entries["momentum"] = _moved(entries["momentum"], np.full(entries["momentum"].value.shape, START), MOMENTUM)
    return Space(**entries)


def falling(
    space: Space, found: Mapping[str, Any], steps: int, *, peak: float = PEAK, penalty: float | None = PENALTY
) -> Space:
    """The space of the runs proper: `searching(space)` begun at `found`, {name: natural value}, with `peak` times its lr,
    which falls linearly to zero at step `steps`, and penalties begun at `penalty` (None: as found)."""
    entries = dict(searching(space).replace(**found))
    entries["lr"] = replace(_moved(entries["lr"], peak * entries["lr"].value), knots=(0, steps), factors=(1.0, 0.0))
    for name in PENALTIES:
        if penalty is not None and name in entries:
            entries[name] = _moved(entries[name], np.full(entries[name].value.shape, penalty))
    return Space(**entries)


def _moved(h: Hyperparameter, value: np.ndarray, within: tuple[float, float] | None = None) -> Hyperparameter:
    """h begun at the value, kept `within` too where its own bounds leave something of that; the value in bounds."""
    low, high = h.bounds if within is None else (max(h.bounds[0], within[0]), min(h.bounds[1], within[1]))
    low, high = (low, high) if low < high else h.bounds
    return replace(h, value=np.clip(value, low, high), bounds=(low, high))


def search_first(
    make: Callable[[Space], Inner],
    space: Space,
    batches: Any,
    val_batches: Any,
    *,
    steps: int,
    runs: int = 1,
    strategy: Strategy | None = None,
    share: float = SHARE,
    peak: float = PEAK,
    penalty: float | None = PENALTY,
    callbacks: Iterable[Callable[[Tuner], None]] = (),
) -> Searched:
    """Search for a learning rate in a short run, then train from there with an lr that falls to zero; both tune online.

    Args:
      make: from a `Space` a new run at its start, always the same one; called 1 + `runs` times.
      space: what is tuned, and from where: lr by `log`, a scalar or one a group, without knots.  Any lr will do to begin
        with; momentum begins at .5 and is kept within .1 and .9.
      batches, val_batches: as for `Tuner.fit`.  A function of the steps spent is asked for the batches of run k (0, 1, ...)
        from k * `steps` on, and for those of the search from 0 on.
      steps: of a run proper.
      runs: that follow the search; each further one begins where the one before has learned (`Result.learned`).
      strategy: an online one; default `Local()`.
      share: of a run that the search takes.
      peak: the lr that begins to fall, over the one found.
      penalty: where `l2` and `weight_decay` begin after the search; None: where it ended.
      callbacks: of every tuner.

    Returns:
      `Searched`: `best` is the `Result` to take.

    Raises:
      HyperparameterError: a space without such an lr, or settings that cannot work.  ShapeError: `make` gives no run of the
        space it was given, or batches make no sense.
    """
    _check(make, space)
    each = whole(CALL, "steps", steps)
    many = whole(CALL, "runs", runs)
    number(CALL, "share", share, "a share of a run in (0, 1]", 0.0, 1.0, open_low=True)
    number(CALL, "peak", peak, "a finite number > 0", 0.0, math.inf, open_low=True, open_high=True)
    if penalty is not None:
        number(CALL, "penalty", penalty, "a finite number > 0, or None", 0.0, math.inf, open_low=True, open_high=True)
    short_run = round(share * each)
    if short_run < MOVES:
        raise HyperparameterError(
            f"{CALL}: the search needs {MOVES} inner steps or more, got share * steps = {short_run}. Train for longer, or "
            f"give a larger share."
        )
    strategy = Local() if strategy is None else strategy
    if getattr(strategy, "mode", "online") != "online":
        raise HyperparameterError(f"{CALL}: needs an online strategy, got {short(strategy)}. Local() and Glocal() are.")
    batch, val = source(CALL, "batches", batches), source(CALL, "val_batches", val_batches)

    def tuned(space: Space, first: int, **settings: Any) -> Result:
        run = _made(make, space)
        tuner = Tuner(run, strategy, mode="online", callbacks=callbacks, **settings)
        return tuner.fit(lambda t: batch(first + t), val)

    window = max(1, short_run // MOVES)
    search = tuned(searching(space), 0, steps=short_run, window=window, guard=SEARCHING, outer=outer.adam(RATE))
    begin = falling(space, search.learned, each, peak=peak, penalty=penalty)
    found: list[Result] = []
    for k in range(many):
        found.append(tuned(begin, k * each, steps=each, window=min(25, each), guard=CAREFUL, outer=outer.adam(THEN)))
        begin = begin.replace(**found[-1].learned)
    return Searched(search, tuple(found))


def _check(make: Any, space: Any) -> None:
    if not callable(make):
        raise HyperparameterError(
            f"{CALL}: make must be a function of a Space that returns a new run, got {short(make)}. "
            f"For example lambda space: inner.sgd(model, space)."
        )
    if not isinstance(space, Space):
        raise HyperparameterError(f"{CALL}: space must be a Space, got {short(space)}.")
    if "lr" not in space:
        raise HyperparameterError(f"{CALL}: the space must have an 'lr' to search for, it has {space.names}.")
    lr = space["lr"]
    if lr.transform.name != "log" or lr.knots is not None:
        raise HyperparameterError(
            f"{CALL}: lr must be made by log and have no knots, for the schedule is given here. Write lr=log(1e-3)."
        )


def _made(make: Callable[[Space], Inner], space: Space) -> Inner:
    """A new run of that space."""
    run = make(space)
    if not isinstance(run, Inner):
        raise ShapeError(f"{CALL}: make must return a run, as inner.sgd(model, space) does, got {short(run)}.")
    if run.space.labels != space.labels or not np.array_equal(run.space.phi0, space.phi0):
        raise ShapeError(
            f"{CALL}: make must return a run of the space that it is given; it returned one of {run.space}. "
            f"Write lambda space: inner.sgd(model, space)."
        )
    if run.t != 0:
        raise ShapeError(f"{CALL}: make must return a run at its start, it returned one at step {run.t}.")
    return run
