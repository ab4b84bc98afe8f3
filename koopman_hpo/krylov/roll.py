"""Stages one after the other: the state to the horizon, the adjoint back."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..problem import Array
from . import stage as stages
from .frozen import duals
from .model import Model
from .stage import Adjoint, Path, Stage, State

FORWARD = 0.6  # share of the columns that the parameters get; the adjoint gets the rest
RATIO = 1.6  # of a stage's length to that of the one before, as planned
GROWTH = (0.5, 2.5)  # bounds of that ratio as the defects ask for it
MIXED = 1e-2  # share of the mixed derivative's change along a stage that may be left out
EARLY = 2.0  # times the tolerance may be missed by a stage with others behind it: they begin with the true gradient
SKETCH = 2  # columns that tell where the middle of the first stage is
LOOSE = 10.0  # times the tolerance may be missed by the adjoint: what it does to h is smaller
TRUST = 0.04  # defect of a stage that is as large as it should be
ASTRAY = 0.1  # defect beyond which a stage is cut short
CUTS = 3  # how often it may be halved


class Rolled(NamedTuple):
    """Training, rolled to the horizon."""

    stages: list[tuple[Stage, Path]]
    bends: list[float]  # of each stage, what the change of curvature and preconditioner does to its gradient, as a share
    defects: list[float]  # of each stage, the same with what its columns leave out
    end: State
    gradient: Array  # (p,) there


def first(steps: int, count: int) -> int:
    """Steps of the first of `count` stages, each `RATIO` times as long as the one before, `steps` together."""
    return max(1, round(steps * (RATIO - 1) / (RATIO**count - 1)))


def split(columns: int, p: int) -> tuple[int, int]:
    """Columns for the parameters and for the adjoint; all of p for both, where there are so many."""
    return (p, p) if columns >= p else (max(1, round(FORWARD * columns)), columns - max(1, round(FORWARD * columns)))


def state(model: Model) -> State:
    """Where the run stands, in float64."""
    theta, slots = (a.astype(np.float64) for a in model.dynamics.state[:2])
    t, rule = model.dynamics.t, model.dynamics.rule
    if rule.name == "sgd":
        return State(theta, slots[0], None, None, t)
    if rule.name == "rmsprop":
        return State(theta, slots[2], slots[0], slots[1] if rule.flag else None, t)
    return State(theta, slots[0], slots[1], None, t)


def forward(
    model: Model, steps: int, count: int, columns: int, tolerance: float, midpoint: bool, variance: Array | float
) -> Rolled:
    """The run, `steps` inner steps ahead, in about `count` stages, twice that at most: a stage that ends where its frozen
    gradient is far from the true one is cut short, and where it is near the next is longer.  With a tolerance and
    `midpoint`, a sketch of its first half tells where the first stage's middle is, and how long the stage may be.

    tolerance: share of the change of its gradient that a stage may leave out.
    variance: (p,) of the gradient of one batch around the mean gradient.
    """
    share, _ = split(columns, model.dynamics.state.theta.size)
    here, bends, defects = state(model), [], []
    out: list[tuple[Stage, Path]] = []
    gradient, ahead, k, left = model.gradient(here.theta, here.t), None, first(steps, count), steps
    if midpoint and tolerance and count > 1 and k > 1:
        sketch = stages.begin(here, k // 2, model, gradient, here.theta, SKETCH, tolerance)
        sketch, way = _trusted(sketch, model, CUTS)[:2]
        ahead, k = partial(stages.where, sketch, way), 2 * sketch.steps
    while left:
        k = left if len(out) + 1 == 2 * count or 1.25 * k > left else k
        centre = ahead(k // 2) if ahead is not None else here.theta
        loose = min(left / k, EARLY)
        stage = stages.begin(here, k, model, gradient, centre, share, min(loose * tolerance, 0.9))
        stage, way, there, gradient, (defect, whole) = _trusted(stage, model, CUTS if len(out) + 1 < 2 * count else 0)
        out.append((stage, way))
        ahead = partial(_beyond, stage, way) if midpoint and defect < ASTRAY else None
        here = squared(stage, there, gradient, model, variance)
        moved = stages.moved(stage, here, model)
        bends.append(defect + moved)
        missed = max(whole - defect, 0.0)  # it moves the preconditioner too, where there is one
        defects.append(defect + (missed / loose if here.square is None else missed) + moved)
        left -= stage.steps
        k = max(1, int(stage.steps * np.clip(np.sqrt(TRUST / max(defect, 1e-12)), *GROWTH)))
    return Rolled(out, bends, defects, here, gradient)


def _trusted(stage: Stage, model: Model, cuts: int) -> tuple[Stage, Path, State, Array, tuple[float, float]]:
    """The stage, halved while its end is astray: with its products as they are, for a gradient each time."""
    while True:
        way = stages.path(stage, model, stage.basis)
        there = stages.end(stage, way)
        gradient = model.gradient(there.theta, there.t)
        defect = stages.defect(stage, way, gradient)
        if defect[0] <= ASTRAY or not cuts or stage.steps < 2:
            if not np.isfinite(defect).all():
                raise np.linalg.LinAlgError("its gradient is not finite")
            return stage, way, there, gradient, defect
        cuts -= 1
        stage = stages.shorter(stage, model, stage.steps // 2)


def _beyond(stage: Stage, way: Path, steps: int) -> Array:
    """(p,) the parameters some steps after the stage's end, if it went on."""
    return stages.where(stage, way, stage.steps + steps)


def squared(before: Stage, here: State, gradient: Array, model: Model, variance: Array | float) -> State:
    """The state with its moving averages of the gradient and its square: those of the stage's two ends, averaged."""
    if here.square is None:
        return here
    dynamics = model.dynamics
    values = duals(dynamics, model.point(here.t))
    wd = 0.0 if dynamics.rule.name == "adamw" else stages.spread(values["weight_decay"].x, model)
    name = "alpha" if dynamics.rule.name == "rmsprop" else "beta2"
    kept = stages.spread(values[name].x, model) ** before.steps
    d0, d1 = before.gradient + wd * before.start.theta, gradient + wd * here.theta
    square = kept * here.square + (1 - kept) * ((d0**2 + d0 * d1 + d1**2) / 3 + variance)
    mean = None if here.mean is None else kept * here.mean + (1 - kept) * (d0 + d1) / 2
    return here._replace(square=square, mean=mean)


class Swept(NamedTuple):
    """What the adjoint tells."""

    h: Array  # (q,) derivative of the outer loss at the horizon, through all that happens after now and happened before
    fewer: Array  # (q,) the same from fewer columns, at no product more
    missed: float  # what the frozen gradients' mismatches add to the outer loss
    paths: list[Path]  # each stage's way in its final basis
    pulls: list[Array]  # (p,) of each stage, the sum over its steps of the adjoint of the gradient


def backward(model: Model, rolled: Rolled, columns: int, tolerance: float) -> Swept:
    """The adjoint of the outer loss, from the horizon to now."""
    p = model.dynamics.state.theta.size
    dE, direct = model.outer(rolled.end.theta, rolled.end.t)
    h, fewer = direct.copy(), direct.copy()
    adjoint = rough = Adjoint(dE, np.zeros(p))
    paths, pulls, missed, gradient = [], [], 0.0, rolled.gradient
    for stage, there in reversed(rolled.stages):
        basis = stages.grown(stage, model, adjoint, split(columns, p)[1], min(LOOSE * tolerance, 0.9))
        way = stages.path(stage, model, basis)
        before, optimizer, D = stages.back(stage, model, way, basis, adjoint)
        pull = way.U @ D[..., -1].ravel()
        missed += pull @ (basis.Q @ stages.mismatch(stage, model, there, gradient))
        coarse = stages.thinned(stage, model, way, fewer_columns(len(basis.Q), len(stage.basis.Q)))
        rough, optimizer_fewer, _ = stages.back(stage, model, coarse, basis, rough)
        loss = stages.mixed(stage, model, way, basis, D, MIXED if tolerance else 0.0) if model.dynamics.loss_names else 0.0
        h, fewer, adjoint, gradient = h + optimizer + loss, fewer + optimizer_fewer + loss, before, stage.gradient
        paths.append(way)
        pulls.append(stage.scale * (pull @ basis.Q))
    return Swept(h + past(model, adjoint), fewer + past(model, rough), float(missed), paths[::-1], pulls[::-1])


def fewer_columns(m: int, own: int) -> Array:
    """Positions of m columns without the last quarter of the first `own` and of the others, one at least where there are
    two: what one level less would give."""
    kept = lambda n: n - max(n // 4, int(n > 1))
    return np.concatenate([np.arange(kept(own)), np.arange(own, own + kept(m - own))])


def variance(model: Model, batches: list[Any]) -> Array:
    """(p,) of the batches' gradients around their mean."""
    here = state(model)
    return np.var([model.gradient(here.theta, here.t, batch) for batch in batches], axis=0, ddof=min(1, len(batches) - 1))


def past(model: Model, adjoint: Adjoint) -> Array:
    """(q,) what the run's tangents bring along."""
    dynamics = model.dynamics
    slot = 2 if dynamics.rule.name == "rmsprop" else 0
    return dynamics.directions.spread(dynamics.state.Z @ adjoint.theta + dynamics.state.dslots[slot] @ adjoint.momentum)
