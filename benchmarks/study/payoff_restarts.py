"""Other loops for mode `restart`: fewer hypergradients a run, the age, racing, several outer steps an estimate, brackets.

Judged by the setting that stands after each run: the newest while runs are cut short, of whole runs that of the lowest
validation loss.  Its quality is the mean validation loss of three plain runs with batches of their own, for one run's loss
differs from the next one's by more than the hundredth that is asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo import Global, Glocal, Local, Tuner, koopman, outer
from koopman_hpo.koopman import aging
from koopman_hpo.strategies import Window

from . import restarts
from .methods import Cost, cost, rounded, seeds, train
from .page import percent, table
from .settings import Settings
from .tasks import Task, scheduled

FIRST_SEED, RUNS, GLOBAL_RUNS = 10, 3, 12
LONGEST = 1.8  # of a step that grows


@dataclass(frozen=True)
class Aged:
    """The window extrapolated with the age that training and tangents have in mode `restart`; 3 snapshots do."""

    snapshots: int = 25
    mode: str = "restart"
    cut: float = 0.1

    def estimate(self, H: np.ndarray, ahead: int) -> koopman.Forecast:
        raise NotImplementedError

    def look(self, H: np.ndarray, ahead: int, window: Window) -> koopman.Forecast:
        spacing = -(-window.length // self.snapshots)
        first = (window.length - (len(H) - 1) * spacing) / spacing
        if len(H) >= 10:
            return koopman.extrapolate(H, ahead, age=(first, first))
        last = koopman.extrapolate(H[-1:], 0, method="last")
        scale = np.maximum(np.abs(H).max(axis=0), 1e-300)
        value, error = aging.forecast(H / scale, ahead, aging.Age(first, first))
        return replace(last, value=value * scale, error=error * scale, accepted=True, method="aging")


def repeated(times: int) -> outer.Outer:
    """The default outer optimizer, given every estimate several times."""
    one = outer.adam()

    def update(h: Any, state: Any, lr: float) -> Any:
        total = np.zeros_like(h)
        for _ in range(times):
            step, state = one.update(h, state, lr)
            total += step
        return total, state

    return one._replace(name=f"adam, {times} times", update=update)


After = Callable[[Tuner, np.ndarray, float], float]  # (tuner, phi and cut before) -> plain steps spent; may set tuner.phi


def bracketed(growth: float = 1.0) -> After:
    """Where a coordinate's estimate has changed its sign, to the zero of the line through the last two: magnitudes count.
    Where it has not, at most `growth` times the step before."""

    def after(tuner: Tuner, phi: np.ndarray, cut: float) -> float:
        rows = [r for r in tuner.history if not r.event][-2:]
        if len(rows) < 2 or not np.array_equal(rows[1].phi, phi):
            return 0.0
        (a, x), (b, y) = ((r.estimate, r.phi) for r in rows)
        size = np.abs(a) + np.abs(b)
        zero = x + (y - x) * np.abs(a) / np.where(size > 0, size, 1.0)
        target = np.where((a * b < 0) & (x != y), zero, tuner.phi)
        if growth > 1:
            on = (a * b > 0) & ((y - x) * b < 0)
            far = y + np.clip(growth * (y - x), -LONGEST, LONGEST)
            target = np.where(on & (np.abs(far - y) > np.abs(target - y)), far, target)
        tuner.phi = tuner.inner.space.clip(target)
        return 0.0

    return after


def racing(task: Task, tuner: Tuner, phi: np.ndarray, cut: float) -> float:
    """After a run cut short: plain runs as long with half, one and two steps; the lowest validation loss goes on."""
    if cut >= 1:
        return 0.0
    steps = round(cut * task.steps)
    tried = [tuner.inner.space.clip(phi + s * (tuner.phi - phi)) for s in (0.5, 1.0, 2.0)]
    tuner.phi = min(tried, key=lambda at: train(replace(task, steps=steps), at).val)
    return 3.0 * steps


class Loop(NamedTuple):
    """What a restart loop is made of."""

    strategy: Any
    after: Callable[[Task], After | None] = lambda task: None
    outer: Any = None
    warm: bool = False  # an online run first; the loop begins at the mean of its phi


LAST, GLOCAL = Local(mode="restart"), Glocal(mode="restart")
LOOPS = {
    "true global": Loop(Global()),
    "last value": Loop(LAST),
    "glocal": Loop(GLOCAL),
    "glocal, 12 hypergradients a run": Loop(replace(GLOCAL, snapshots=12)),
    "aged": Loop(Aged()),
    "aged, 4 hypergradients a run": Loop(Aged(4)),
    "last value, two steps an estimate": Loop(LAST, outer=repeated(2)),
    "last value, brackets and growth": Loop(LAST, lambda task: bracketed(1.5)),
    "last value, racing": Loop(LAST, lambda task: partial(racing, task)),
    "online first, then last value from .8": Loop(replace(LAST, cut=0.8), warm=True),
}


class Leg(NamedTuple):
    """A run of the loop, and what stands after it."""

    spent: float  # plain steps, so far
    cut: float
    phi: np.ndarray  # of the run
    value: float  # its validation loss
    then: np.ndarray  # the phi that follows


def online(task: Task, c: Cost) -> tuple[np.ndarray, float]:
    """The mean phi of an online run, and the plain steps that it costs."""
    made = Tuner(task.run(), Local(), steps=task.steps, window=task.window)
    made.fit(task.batch, [task.val])
    return made.history.phi.mean(axis=0), task.steps * c.tangent + (len(made.history.trajectory) + 1) * c.hypergradient


def walk(task: Task, c: Cost, loop: Loop, budget: float, most: int = 60) -> list[Leg]:
    """The loop's runs, until `budget` plain steps are spent."""
    phi, more = online(task, c) if loop.warm else (task.space.phi0, 0.0)
    made = Tuner(task.run(), loop.strategy, steps=task.steps, runs=10_000, mode="restart", outer=loop.outer, phi=phi)
    after, legs = loop.after(task), [Leg(more, 0.0, phi, math.inf, phi)] if loop.warm else []
    while not made.done and len(legs) < most and (not legs or legs[-1].spent < budget):
        phi, cut, windows = made.phi, made.cut, len(made.history)
        while len(made.history) == windows:
            made.step(task.batch(made.used), task.val)
        row = made.history[-1]
        if after is not None and not row.event:
            more += after(made, phi, cut)
        spent = made.used * c.tangent + (len(made.history.trajectory) + 1) * c.hypergradient + more
        legs.append(Leg(spent, cut, phi, math.inf if row.event.startswith("rolled") else row.value, made.phi))
    return legs


def standing(legs: list[Leg]) -> list[np.ndarray]:
    """After each run, the phi that stands: of whole runs that of the lowest validation loss, else the newest."""
    out, best = [], None
    for leg in legs:
        if leg.cut >= 1 and (best is None or leg.value < best.value):
            best = leg
        out.append(leg.then if best is None else best.phi)
    return out


def trace(task: Task, c: Cost, loop: Loop, budget: float) -> list[list[float]]:
    """[cost in runs, mean validation loss, mean test loss] of what stands after each run; a last plain run is counted where
    none has been whole."""
    legs, known, out = walk(task, c, loop, budget), {}, []
    for leg, phi in zip(legs, standing(legs), strict=True):
        key = phi.tobytes()
        if key not in known:
            known[key] = np.mean([train(other(task, k), phi)[:2] for k in range(RUNS)], axis=0)
        last = 0 if leg.cut >= 1 else task.steps
        out.append([(leg.spent + last) / task.steps, *map(float, known[key])])
    return out


def other(task: Task, k: int) -> Task:
    """The same task with other batches."""
    return replace(task, batch=lambda t: task.batch(t + 1_000_000 * (k + 1)))


def row(job: tuple[str, int, str], data: Any, costs: dict[str, Cost]) -> dict[str, Any]:
    name, seed, method = job
    c, task = costs[name], TASKS[name](data, seed)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = trace(task, c, LOOPS[method], GLOBAL_RUNS * c.tangent * task.steps)
    return {"task": name, "seed": seed, "method": method, "trace": rounded(found)}


# -- measuring and reading ---------------------------------------------------------------------------------------------

TASKS = {name: make for name, make in restarts.TASKS.items() if name != "layers"} | {"knots": scheduled}
LABELS = {name: name.replace("lr", "from lr") for name in TASKS} | {"knots": "8 knots"}
SOME = 15.0  # runs
OTHERS = ("true global", "last value", "glocal", "aged")  # on a schedule of knots


def measure(settings: Settings) -> list[dict[str, Any]]:
    several = range(FIRST_SEED, FIRST_SEED + (5 if settings.full else 2))
    costs = {name: cost(make(settings.data, FIRST_SEED)) for name, make in TASKS.items()}
    jobs = [(name, seed, m) for name in TASKS for seed in several for m in (OTHERS if name == "knots" else LOOPS)]
    return settings.map(partial(row, data=settings.data, costs=costs), jobs)


class Standing(NamedTuple):
    """Of a loop on one task, against true global."""

    share: float  # of the cost at which true global comes near its own end, what the loop needs to come as near
    third: float  # validation loss at a third of that cost, over true global's end, less one
    end: float  # in the end, the same


def standings(rows: list[dict[str, Any]], name: str) -> dict[str, Standing]:
    """Of each loop that was run on the task."""
    curves = partial(restarts.reached, {"results": {"rows": rows}}, name)
    whole = curves("true global")
    best = restarts.end(whole)
    base = restarts.first(whole, (1 + restarts.NEAR) * best)
    third = int(np.searchsorted(restarts.GRID, base / 3))
    out = {}
    for m in [m for m in LOOPS if any(r["task"] == name and r["method"] == m for r in rows)]:
        values = curves(m)
        share = restarts.first(values, (1 + restarts.NEAR) * best) / base
        out[m] = Standing(share, float(values[third]) / best - 1, restarts.end(values) / best - 1)
    return out


THREE = tuple(name for name in TASKS if name != "knots")


def block(record: dict[str, Any]) -> str:
    """A line a loop: shares on the tasks of q = 3 and their median; means over these of the rest; losses with knots."""
    rows = record["results"]["restarts"]
    found = {name: standings(rows, name) for name in THREE}
    over = lambda values: f"{100 * float(np.mean(values)):+.1f} %"
    lines = []
    for m in LOOPS:
        three = [found[n][m] for n in THREE]
        shares = [s.share for s in three]
        here = [
            *map(say, (*shares, float(np.median(shares)))),
            over([s.third for s in three]),
            over([s.end for s in three]),
        ]
        lines.append([m, *here, *knots(rows, m)])
    heads = ["loop", *(LABELS[n] for n in THREE), "median", "at a third of the cost", "in the end"]
    made = table([*heads, f"8 knots, {SOME:g} runs", "8 knots, in the end"], lines)
    return f"{seeds({'results': {'rows': rows}})}\n\n{made}"


def say(share: float) -> str:
    return percent(share) if math.isfinite(share) else "not reached"


def knots(rows: list[dict[str, Any]], method: str) -> list[str | None]:
    """Validation losses on the schedule of knots, after SOME runs and in the end."""
    if method not in OTHERS:
        return [None, None]
    values = restarts.reached({"results": {"rows": rows}}, "knots", method)
    return [f"{x:.3f}" for x in (float(values[np.searchsorted(restarts.GRID, SOME)]), restarts.end(values))]


def verdict(record: dict[str, Any]) -> str:
    """Which loops take a third or less, in the median, and which stand lowest there."""
    found = [standings(record["results"]["restarts"], name) for name in THREE]
    median = {m: float(np.median([part[m].share for part in found])) for m in LOOPS}
    cheap = [f"{m} ({say(x)})" for m, x in median.items() if x <= 1 / 3]
    third = {m: float(np.mean([part[m].third for part in found])) for m in LOOPS}
    low = min(third, key=third.__getitem__)
    reached = [m for m in LOOPS if all(math.isfinite(part[m].share) for part in found) and m != "true global"]
    per_cent = {m: f"{100 * x:+.1f} %" for m, x in third.items()}
    return (
        f"At a third of true global's cost or less, in the median: {'; '.join(cheap) or 'none'}. There true global stands "
        f"{per_cent['true global']} above its end, and lowest, at {per_cent[low]}: {low}. Reach it on all three tasks: "
        f"{'; '.join(reached) or 'none'}."
    )
