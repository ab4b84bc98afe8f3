"""A loop of several runs, for a short training from an unknown learning rate: search first, then train.

A short online run at a constant lr, with large outer steps, finds an lr and a momentum and is thrown away.  Training
begins anew at a multiple of that lr, which falls linearly to zero and whose height is tuned, and at a penalty rather too
strong than too weak: a window sees what there is too much of, and not what would pay later.  docs/evidence.md has what it
gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import outer
from .batches import source
from .errors import HyperparameterError, ShapeError, number, short, whole
from .guard import Guard
from .hyperparameters import Hyperparameter
from .inner import Inner
from .settings import form
from .space import Space
from .strategies import Local, Strategy
from .tuner import Result, Tuner

# chosen on seeds of the study that are not reported
SHARE, MOVES, RATE = 1 / 3, 20, 0.5  # of a run that the search takes, outer steps in it, and their size
PEAK, PENALTY = 10.0, 5e-3  # times the rate found; and where a penalty begins
THEN = 0.25  # the size of outer steps in the runs that follow
START, MOMENTUM = 0.5, (0.1, 0.9)  # of momentum: a long memory undoes what lr does about noise
SOUGHT, PENALTIES = ("lr", "momentum"), ("l2", "weight_decay")  # what is handed on of a search, and what begins high
CAREFUL = Guard(again=0.3, excess=0.5, chaos_growth=math.inf)  # late flips of a hypergradient's sign are noise here
SEARCHING = replace(CAREFUL, again=1.0)
CALL = "search_first"


class Searched(NamedTuple):
    """What `search_first` leaves."""

    search: Result  # of the short run; in its `learned` are the lr and the momentum from which the others began
    runs: tuple[Result, ...]  # that followed, in order

    @property
    def best(self) -> Result:
        """The run that ended with the lowest outer loss, the search left aside; where all diverged, the first."""
        return min(self.runs, key=lambda result: result.value if math.isfinite(result.value) else math.inf)

    @property
    def steps(self) -> int:
        """Inner steps spent in all."""
        return self.search.steps + sum(result.steps for result in self.runs)


def searching(space: Space) -> Space:
    """The space that is searched: `space`, but momentum begins at .5 and is kept within .1 and .9, if it has no knots."""
    entries = dict(space)
    if "momentum" in entries and entries["momentum"].knots is None:
        entries["momentum"] = _begun(entries["momentum"], START, MOMENTUM)
    return Space(**entries)


def window(steps: int) -> int:
    """Inner steps of a search of so many steps between its moves."""
    return max(1, round(steps / MOVES))


def falling(
    space: Space, found: Mapping[str, Any], steps: int, *, peak: float = PEAK, penalty: float | None = PENALTY
) -> Space:
    """The space of the runs proper: `searching(space)`, momentum begun as found, {name: natural value}, and lr at `peak`
    times the one found, falling linearly to zero at step `steps`; penalties begin at `penalty` (None: as in `space`)."""
    entries = dict(searching(space).replace(**{name: found[name] for name in SOUGHT if name in found}))
    lr = _begun(entries["lr"], peak * entries["lr"].value)
    entries["lr"] = replace(lr, knots=(0, steps), factors=(1.0, 0.0), schedule="linear")
    for name in PENALTIES:
        if penalty is not None and name in entries:
            entries[name] = _begun(entries[name], penalty)
    return Space(**entries)


def _begun(h: Hyperparameter, at: ArrayLike, within: tuple[float, float] | None = None) -> Hyperparameter:
    """h begun there, or as near as its bounds allow; kept `within` too, where its own bounds leave something of that."""
    low, high = h.bounds if within is None else (max(h.bounds[0], within[0]), min(h.bounds[1], within[1]))
    low, high = (low, high) if low < high else h.bounds
    value, domain = np.clip(np.broadcast_to(at, h.value.shape), low, high), h.transform
    if not ((value > domain.low) & (value < domain.high)).all():  # an open edge: as near as is still inside
        value = np.clip(domain.to_natural(domain.nearest(value)), low, high)
    return replace(h, value=value, bounds=(low, high))


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
      make: from a `Space` a new run at its start, the model's parameters the same each time: build or seed the model inside
        it.  Called 1 + `runs` times.
      space: what is tuned, and from where: lr by `log`, a scalar or one a group, without knots; any will do to begin
        with.  A momentum without knots begins at .5 and is kept within .1 and .9.  Of the search lr and momentum are handed
        on; all else, which a search is too short to judge, begins where the space says, and penalties at `penalty`.
      batches, val_batches: as for `Tuner.fit`.  A function of the steps spent is asked for the batches of run k (0, 1, ...)
        from k * `steps` on, and for those of the search from 0 on; one of the window's number from 0 on in each of them.
        An iterator goes on from one to the next: what can be read once must hold (`share` + `runs`) * `steps` batches.
      steps: of a run proper.
      runs: that follow the search; each further one begins where the one before has learned (`Result.learned`).
      strategy: an online one; default `Local()`.
      share: of a run that the search takes, in 20 windows or about.
      peak: the lr that begins to fall, over the one found.
      penalty: where `l2` and `weight_decay` begin after the search, in every group; None: where the space says.
      callbacks: of every tuner.

    Returns:
      `Searched`: `best` is the `Result` to take.

    Raises:
      HyperparameterError: a space without such an lr, or settings that cannot work.  ShapeError: `make` gives no run of the
        space it was given, at the start of the same model, or batches make no sense.
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
    every = tuple(callbacks) if isinstance(callbacks, Iterable) else callbacks
    batch, val = source(CALL, "batches", batches), source(CALL, "val_batches", val_batches)
    starts: list[np.ndarray] = []

    def tuned(space: Space, spent: int, **settings: Any) -> Result:
        run = _made(make, space, starts)
        tuner = Tuner(run, strategy, mode="online", callbacks=every, **settings)
        return tuner.fit(lambda t: batch(spent + t), val)

    moves = {"window": window(short_run), "outer": outer.adam(RATE)}
    search = tuned(searching(space), 0, steps=short_run, guard=SEARCHING, **moves)
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


def _made(make: Callable[[Space], Inner], space: Space, starts: list[np.ndarray]) -> Inner:
    """A new run of that space, at the start that the first one had; `starts` remembers it."""
    run = make(space)
    if not isinstance(run, Inner):
        raise ShapeError(f"{CALL}: make must return a run, as inner.sgd(model, space) does, got {short(run)}.")
    if run.t != 0:
        raise ShapeError(
            f"{CALL}: make must return a run at its start, it returned one at step {run.t}. Build a new one in each call."
        )
    if form(run.space) != form(space) or not np.array_equal(run.space.phi0, space.phi0):
        raise ShapeError(
            f"{CALL}: make must return a run of the space that it is given; it returned one of {run.space}, or with other "
            f"bounds or schedules. Write lambda space: inner.sgd(model, space)."
        )
    starts.append(np.array(run.params))
    if not np.array_equal(starts[0], starts[-1], equal_nan=True):
        raise ShapeError(
            f"{CALL}: make must begin every run with the same parameters, call {len(starts)} returned others: a model that "
            f"has been trained already, or drawn anew. Build the model in make, from a seed."
        )
    return run
