"""What a tuning method reaches, and at what cost, counted in plain training steps.

A trace lists the full models that a method has trained, in order, with what had been spent by then.  What stands after a
cost is the model of lowest validation loss among those.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo import Glocal, Local, Tuner
from koopman_hpo.koopman.forecast import LEAST_SNAPSHOTS

from .tasks import CLASSES, Quality, Task

Array = np.ndarray
CHANCE = math.log(CLASSES)  # of ten classes: what a model that has diverged counts as


class Cost(NamedTuple):
    """Of one call, in plain steps."""

    tangent: float  # a step with tangents
    hypergradient: float  # the outer loss and its gradient; an evaluation is counted the same
    keeping: float = 0.0  # what the tuner itself does beside a step
    closing: float = 0.0  # and at a window's end
    estimating: float = 0.0  # and there for Glocal's estimate from its snapshots


class Point(NamedTuple):
    """A trained model: what had been spent, in runs of plain training, and how good it is."""

    runs: float
    val: float
    test: float
    accuracy: float


Trace = list[Point]


def cost(task: Task, calls: int = 40) -> Cost:
    """The shortest of several calls each, alternating: what other processes take is not counted."""
    run, least = task.run(), {"plain": math.inf, "tangent": math.inf, "hypergradient": math.inf}
    phi = run.space.phi0
    todo: dict[str, Callable[[Any], Any]] = {
        "plain": lambda batch: run.step(phi, batch, tangents=False),
        "tangent": lambda batch: run.step(phi, batch),
        "hypergradient": lambda batch: run.hypergradient(task.val),
    }
    for t in range(calls):
        for name, call in todo.items():
            batch, clock = task.batch(t), time.perf_counter()
            call(batch)
            least[name] = min(least[name], time.perf_counter() - clock)
    (step, closing), (_, with_estimate) = own(task, Local()), own(task, Glocal())
    own_time = (step, closing, max(with_estimate - closing, 0.0))
    return Cost(*(x / least["plain"] for x in (least["tangent"], least["hypergradient"], *own_time)))


def own(task: Task, strategy: Any, windows: int = 6) -> tuple[float, float]:
    """Seconds of the tuner's own beside a step, and at a window's end: the shortest of several."""
    run, inside = task.run(), [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **named: Any) -> Any:
            clock = time.perf_counter()
            out = call(*args, **named)
            inside[0] += time.perf_counter() - clock
            return out

        return timing

    run.step, run.hypergradient = timed(run.step), timed(run.hypergradient)
    tuner = Tuner(run, strategy, steps=task.steps, window=task.window)
    rest: tuple[list[float], list[float]] = [], []
    for t in range(min(task.steps, windows * task.window)):
        batch, closed, inside[0], clock = task.batch(t), len(tuner.history), 0.0, time.perf_counter()
        tuner.step(batch, task.val)
        rest[len(tuner.history) > closed].append(time.perf_counter() - clock - inside[0])
    return min(rest[0]), min(rest[1])


def train(task: Task, phi: Array, at: Callable[[Array, int], Array] | None = None) -> Quality:
    """What stands of a plain run with phi (q,), or with `at(phi, t)` at step t; early stopping's looks are not counted."""
    run, lowest, stands = task.run(), math.inf, None
    with np.errstate(all="ignore"):
        for t in range(task.steps):
            if not math.isfinite(run.step(phi if at is None else at(phi, t), task.batch(t), tangents=False)):
                break
            if task.stops and ((t + 1) % task.window == 0 or t + 1 == task.steps):
                value = float(task.model.outer(run.params, {}, task.val)[0])
                if value < lowest:
                    lowest, stands = value, run.params
        else:
            stands = stands if task.stops else run.params
    return task.failed if stands is None else task.quality(stands)


def cosine(task: Task) -> Callable[[Array, int], Array]:
    """phi with its lr falling to zero along half a cosine."""
    where = task.space.where("lr")

    def at(phi: Array, t: int) -> Array:
        out = phi.copy()
        out[where] += math.log(max(0.5 + 0.5 * math.cos(math.pi * t / task.steps), 1e-6))
        return out

    return at


def point(task: Task, spent: float, quality: Quality) -> Point:
    return Point(spent / task.steps, *quality)


def tuned(task: Task, c: Cost, strategy: Any, **settings: Any) -> tuple[Point, Any]:
    """The tuner's own loop, to its end: one online run, or the restarts and the last run of mode `restart`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = Tuner(task.run(), strategy, steps=task.steps, **({"window": task.window} | settings))
        result = tuner.fit(task.batch, [task.val])
    plain = task.steps if tuner.mode == "restart" else 0
    spent = (
        plain + (result.steps - plain) * (c.tangent + c.keeping) + (len(result.history.trajectory) + 1) * c.hypergradient
    )
    estimates = isinstance(strategy, Glocal) and tuner.window // (tuner.every or 1) >= LEAST_SNAPSHOTS
    spent += len(result.history) * (c.closing + estimates * c.estimating)
    return point(task, spent, _stands(task, tuner.mode, result)), result


def _stands(task: Task, mode: str, result: Any) -> Quality:
    """Of a tuned run; with early stopping a setting that was tuned for whole runs is trained once more, uncounted."""
    if not task.stops:
        return task.quality(result.params)
    return train(task, task.space.phi(result.hyper)) if mode == "restart" else task.quality(result.best.params)


def standing(trace: Trace) -> Trace:
    """What stands after each point of the trace: the best so far by validation loss."""
    out: Trace = []
    for p in trace:
        best = p if not out or p.val < out[-1].val else out[-1]
        out.append(best._replace(runs=p.runs))
    return out


def expected(trace: Trace, n: int, chance: float = CHANCE) -> float:
    """Test loss of the best by validation loss of n points of the trace drawn at random: exact, no sampling."""
    ranked = sorted(trace, key=lambda p: p.val)
    N = len(ranked)
    share = [math.comb(N - i - 1, n - 1) / math.comb(N, n) for i in range(N - n + 1)]
    return float(sum(w * min(p.test, chance) for w, p in zip(share, ranked, strict=False) if w > 0))


def curve(trace: Trace, ordered: bool) -> list[tuple[int, float]]:
    """(n, test loss of what stands after n runs), n dense at first and then in steps of a tenth.

    `ordered`: the search learns as it goes; otherwise its runs are independent, and the mean over their orders is taken.
    """
    N, ns = len(trace), [1]
    while ns[-1] < N:
        ns.append(min(N, max(ns[-1] + 1, round(1.1 * ns[-1]))))
    best = standing(trace)
    return [(n, min(best[n - 1].test, CHANCE) if ordered else expected(trace, n)) for n in ns]


def rounded(rows: Sequence[Any], digits: int = 4) -> list[Any]:
    """Floats of nested lists and tuples, for a small file; infinity as None."""
    short = lambda x: (
        rounded(x, digits)
        if isinstance(x, list | tuple)
        else (round(x, digits) if math.isfinite(x) else None)
        if isinstance(x, float)
        else x
    )
    return [short(x) for x in rows]


def seeds(record: dict[str, Any]) -> str:
    """What a record's figures are means over."""
    found = {r["seed"] for r in record["results"]["rows"]}
    return "One seed." if len(found) == 1 else f"Means over {len(found)} seeds."
