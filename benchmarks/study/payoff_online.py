"""Does a better estimate help online where the outer step heeds magnitudes and stated errors?  And several steps of one?

Estimates by outer steps, on the 1,000 steps of the restarts' task (lr, momentum, L2) and on class weights with L2 a layer,
which are the loss's own.  The truth is the hypergradient at the horizon itself: the rest of the run is trained, at fixed
phi, with the tangents as they stand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo import Space, koopman, krylov, log, outer
from koopman_hpo.strategies import Window

from .methods import Cost, rounded, seeds, tuned
from .page import table
from .restarts import clean
from .settings import Settings
from .tasks import Task, imbalanced

Array = np.ndarray
FIRST_SEED, BASE = 10, "last value"
STRIDE, LONGEST = 0.125, 0.25  # of a window's step, in any coordinate: Adam's by default, and what it never exceeds
FADE = 100.0  # steps: tangents that keep .99 a step are about as old
EPOCH = 31  # batches that the model-based operator takes its mean gradient on
RATE = 3.0  # of sgd: of .3, 1 and 3 the best on other seeds


class View(NamedTuple):
    """An estimate, its error, and the outer loss that it expects at the horizon; NaN where it does not say."""

    value: Array  # (q,)
    error: Array  # (q,)
    loss: float = math.nan


# -- estimates ---------------------------------------------------------------------------------------------------------

Estimate = Callable[[Task, Array, int, Window], View]


def clipped(value: Array, H: Array) -> Array:
    """As `Glocal` clips what it extrapolates."""
    limit = 3.0 * np.abs(H).max(axis=0)
    return np.clip(value, -limit, limit)


def last(task: Task, H: Array, ahead: int, window: Window) -> View:
    """The last value; its error is the window's deviation."""
    return View(H[-1], H.std(axis=0))


def aged(task: Task, H: Array, ahead: int, window: Window) -> View:
    """With the training's age, and tangents as old as their fading lets them be."""
    first = window.run.t - len(H) + 1.0
    found = koopman.extrapolate(H, ahead, age=(first, min(first, FADE)))
    return View(clipped(found.value, H), found.error)


def model_based(task: Task, H: Array, ahead: int, window: Window) -> View:
    """The operator of training, frozen and rolled.  Its gate would close on batches as small as these: it is left open."""
    data = tuple(np.concatenate(part) for part in zip(*(task.batch(t) for t in range(EPOCH)), strict=True))
    few = tuple(part[:256] for part in data)
    found = krylov.estimate(window.run, data, window.val_batch, window.steps, columns=10, hvp_batch=few)
    if not np.isfinite([*found.estimate, *found.error]).all():
        return last(task, H, ahead, window)
    return View(clipped(found.estimate, H), found.error, found.outer_loss)


def truth(task: Task, H: Array, ahead: int, window: Window) -> View:
    """The rest of the run at this phi."""
    run, start = window.run, window.run.mark()
    for t in range(run.t, run.t + window.steps):
        run.step(run.phi, task.batch(t))
    end = run.hypergradient(window.val_batch)
    run.restore(start)
    if not np.isfinite(end.grad).all():
        return last(task, H, ahead, window)
    return View(end.grad, np.zeros_like(end.grad), end.value)


def mean(task: Task, H: Array, ahead: int, window: Window) -> View:
    """Of the window."""
    return View(H.mean(axis=0), H.std(axis=0) / np.sqrt(len(H)))


ESTIMATES: dict[str, Estimate] = {
    "last value": last,
    "window's mean": mean,
    "aged": aged,
    "krylov": model_based,
    "truth": truth,
}


# -- steps -------------------------------------------------------------------------------------------------------------


class Adam:
    """The tuner's own, by default; of `times` equal updates."""

    def __init__(self, times: int = 1):
        self.rule, self.times = outer.adam(), times
        self.state: Any = None

    def __call__(self, view: View) -> Array:
        self.state = self.rule.init(len(view.value)) if self.state is None else self.state
        total = np.zeros_like(view.value)
        for _ in range(self.times):
            step, self.state = self.rule.update(view.value, self.state, STRIDE)
            total += step
        return total


def sgd(rate: float) -> Callable[[View], Array]:
    """Magnitudes count, up to the longest step."""
    return lambda view: np.clip(rate * view.value, -LONGEST, LONGEST)


def signal(view: View) -> Array:
    """Each coordinate by its signal to noise: half of the longest step where the error is as large as the estimate."""
    return LONGEST * view.value / np.maximum(np.abs(view.value) + view.error, 1e-300)


class Region:
    """Along the estimate, as far as a radius allows that shrinks and grows with the loss expected at the horizon."""

    def __init__(self) -> None:
        self.radius, self.before, self.promise = STRIDE, math.nan, math.nan

    def __call__(self, view: View) -> Array:
        if math.isfinite(self.before - view.loss) and self.promise > 0:
            share = (self.before - view.loss) / self.promise
            self.radius *= 0.5 if share < 0.25 else 2.0 if share > 0.75 else 1.0
        self.radius = min(max(self.radius, STRIDE / 16), 2 * LONGEST)
        step = self.radius * view.value / max(float(np.abs(view.value).max()), 1e-300)
        self.before, self.promise = view.loss, float(step @ view.value)
        return step


STEPS: dict[str, Callable[[], Callable[[View], Array]]] = {
    "Adam": Adam,
    "sgd, clipped": lambda: sgd(RATE),
    "signal to noise": lambda: signal,
    "trust region": Region,
}
AS_GIVEN = outer.Outer("as given", outer.adam().init, lambda h, state, lr: (h, state), STRIDE)


@dataclass(frozen=True)
class Stepping:
    """A strategy whose estimate is the step itself, for `AS_GIVEN`.  `looks`: the estimate is made anew at the phi that a
    step leads to, without new training steps, so many times a window."""

    task: Task
    estimator: Estimate
    step: Callable[[View], Array]
    looks: int = 1
    mode: str = "online"
    snapshots: int = 25
    cut: float = 0.1

    def estimate(self, H: Array, ahead: int) -> koopman.Forecast:
        raise NotImplementedError

    def look(self, H: Array, ahead: int, window: Window) -> koopman.Forecast:
        run, start = window.run, window.run.mark()
        total = np.zeros(H.shape[1])
        for _ in range(self.looks):
            total += self.step(self.estimator(self.task, H, ahead, window))
            run.restore(start | {"phi": run.space.clip(start["phi"] - total)})
        run.restore(start)
        found = koopman.extrapolate(H, 0, "last")
        return replace(found, value=total, accepted=True, reason="a step")


# -- what is measured --------------------------------------------------------------------------------------------------


def reweighted(data: Any, seed: int) -> Task:
    """Long-tailed classes: ten class weights and L2 a layer; lr and momentum are held."""
    task = imbalanced(data, seed, layers=True)
    box = {name: ends for name, ends in task.box.items() if name != "lr"}
    space = Space(class_weights=log(np.ones(10), bounds=(1e-2, 1e2)), l2=log([1e-4, 1e-4]))
    return replace(task, space=space, box=box, fixed={"momentum": 0.9, "lr": 0.02})


TASKS = {"lr 0.001": partial(clean, lr=1e-3), "lr 0.1": partial(clean, lr=0.1), "loss": reweighted}
LABELS = {"lr 0.001": "q = 3, from lr 0.001", "lr 0.1": "q = 3, from lr 0.1", "loss": "class weights, L2 a layer"}
SEVERAL: dict[str, tuple[str, int, int]] = {  # estimate, updates of each, looks a window
    "last value, two steps of each": ("last value", 2, 1),
    "last value, three steps of each": ("last value", 3, 1),
    "krylov, two steps of each": ("krylov", 2, 1),
    "krylov, two looks a window": ("krylov", 1, 2),
    "krylov, three looks a window": ("krylov", 1, 3),
}


def row(job: tuple[str, int, str, str], data: Any) -> dict[str, Any]:
    """One online run: validation and test loss in the end.  An estimate with a step, or one of SEVERAL with none."""
    name, seed, estimate, step = job
    task = TASKS[name](data, seed)
    if step:
        strategy = Stepping(task, ESTIMATES[estimate], STEPS[step]())
    else:
        of, times, looks = SEVERAL[estimate]
        strategy = Stepping(task, ESTIMATES[of], Adam(times), looks)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        at, _ = tuned(task, Cost(1.0, 0.0), strategy, outer=AS_GIVEN)
    return {"task": name, "seed": seed, "estimate": estimate, "step": step, "end": rounded([at.val, at.test])}


def plan(several: Any) -> list[tuple[str, int, str, str]]:
    pairs = [(e, s) for e in ESTIMATES for s in STEPS if s != "trust region" or e in ("krylov", "truth")]
    pairs += [(name, "") for name in SEVERAL]
    return [(task, seed, e, s) for task in TASKS for seed in several for e, s in pairs]


def measure(settings: Settings) -> list[dict[str, Any]]:
    several = range(FIRST_SEED, FIRST_SEED + (5 if settings.full else 2))
    return settings.map(partial(row, data=settings.data), plan(several))


# -- reading -------------------------------------------------------------------------------------------------------


def mean_of(record: dict[str, Any], task: str, estimate: str, step: str, column: int = 1) -> float | None:
    """Test loss (column 1) or validation loss (0) in the end, mean over seeds; None where it was not run."""
    same = lambda r: (r["task"], r["estimate"], r["step"]) == (task, estimate, step)
    found = [math.inf if r["end"][column] is None else r["end"][column] for r in record["results"]["online"] if same(r)]
    return float(np.mean(found)) if found else None


def said(x: float | None) -> str | None:
    return None if x is None else f"{x:.3f}" if x < 100 else "diverged"


def block(record: dict[str, Any]) -> str:
    """Test losses, a table a task."""
    heads = lambda task: [LABELS[task], *STEPS]
    line = lambda task, e: [e, *(said(mean_of(record, task, e, s)) for s in STEPS)]
    tables = [table(heads(task), [line(task, e) for e in ESTIMATES]) for task in TASKS]
    return "\n\n".join([seeds({"results": {"rows": record["results"]["online"]}}), *tables])


def several_block(record: dict[str, Any]) -> str:
    ones = [[f"{e}, one step", *(said(mean_of(record, t, e, "Adam")) for t in TASKS)] for e in ("last value", "krylov")]
    lines = [[name, *(said(mean_of(record, t, name, "")) for t in TASKS)] for name in SEVERAL]
    return table(["Adam's steps a window", *LABELS.values()], [*ones, *lines])


def verdict(record: dict[str, Any]) -> str:
    """Of each outer step, what the estimates gain over the last value with the default step; then of several."""

    def gain(estimate: str, step: str) -> str | None:
        ends = [(mean_of(record, t, estimate, step), mean_of(record, t, BASE, "Adam")) for t in TASKS]
        if None in ends[0]:
            return None
        return f"{estimate} {100 * float(np.expm1(np.mean([math.log(a / b) for a, b in ends]))):+.1f} %"

    lines = [(step, [gain(e, step) for e in ESTIMATES]) for step in STEPS]
    lines.append(("Adam, more than once a window", [gain(name, "") for name in SEVERAL]))
    said = [f"- {step}: {'; '.join(g for g in gains if g)}." for step, gains in lines]
    return "\n".join(["Test loss against the last value with Adam, geometric mean over tasks:", "", *said])
