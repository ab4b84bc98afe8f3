"""Tuning by trying: random search, Optuna's TPE, successive halving, Hyperband, a grid.  Each returns a trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from .methods import Cost, Trace, point, train
from .tasks import Task

Array = np.ndarray
HAS_OPTUNA = find_spec("optuna") is not None


def random(task: Task, c: Cost, n: int, seed: int, at: Any = None) -> Trace:
    """n full runs, uniformly from the box."""
    rng, (low, high) = np.random.default_rng(seed), task.bounds()
    each = task.steps + c.hypergradient
    return [point(task, (i + 1) * each, train(task, rng.uniform(low, high), at)) for i in range(n)]


def tpe(task: Task, c: Cost, n: int, seed: int, at: Any = None) -> Trace:
    """n full runs proposed by Optuna's TPE with its defaults.  What proposing costs is not counted."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    (low, high), trace = task.bounds(), []

    def objective(trial: Any) -> float:
        phi = np.array([trial.suggest_float(str(j), low[j], high[j]) for j in range(len(low))])
        quality = train(task, phi, at)
        trace.append(point(task, (len(trace) + 1) * (task.steps + c.hypergradient), quality))
        return min(quality.val, 1e6)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)).optimize(objective, n_trials=n)
    return trace


def halving(task: Task, c: Cost, brackets: int, seed: int, eta: int = 3, rungs: int = 4) -> Trace:
    """Successive halving: eta^(rungs - 1) random settings, of which the best third goes on, three times as long; then the
    same with fresh settings."""
    return _brackets(task, c, [(eta ** (rungs - 1), rungs)] * brackets, seed, eta)


def hyperband(task: Task, c: Cost, sweeps: int, seed: int, eta: int = 3, rungs: int = 4) -> Trace:
    """Hyperband (Li et al. 2018): a bracket of halving from many runs of eta^(1 - rungs) of the horizon, one from fewer
    that begin longer, and so on to whole runs; then the same with fresh settings."""
    sweep = [(math.ceil(rungs / r * eta ** (r - 1)), r) for r in range(rungs, 0, -1)]
    return _brackets(task, c, sweep * sweeps, seed, eta)


def _brackets(task: Task, c: Cost, brackets: list[tuple[int, int]], seed: int, eta: int) -> Trace:
    """Brackets (settings, rungs) of successive halving one after the other; a point where one ends."""
    rng, (low, high) = np.random.default_rng(seed), task.bounds()
    trace: Trace = []
    spent = 0.0
    for count, rungs in brackets:
        alive: list[tuple[Array, Any]] = [(rng.uniform(low, high), None) for _ in range(count)]
        begun = 0
        for rung in range(rungs):
            end = round(task.steps / eta ** (rungs - 1 - rung))
            ended = [_on(task, phi, state, begun, end) for phi, state in alive]
            spent += len(alive) * (end - begun + c.hypergradient)
            order = np.argsort([quality.val for *_, quality in ended], kind="stable")
            alive = [ended[i][:2] for i in order[: max(1, len(alive) // eta)]]
            begun = end
        trace.append(point(task, spent, ended[order[0]][2]))
    return trace


def _on(task: Task, phi: Array, state: Any, begun: int, end: int) -> Any:
    """Training from a snapshot at step `begun` to `end`: phi, the new snapshot, its quality."""
    run = task.run()
    if state is not None:
        run.restore(state)
    with np.errstate(all="ignore"):
        for t in range(begun, end):
            if not math.isfinite(run.step(phi, task.batch(t), tangents=False)):
                break
    return phi, run.snapshot(), task.quality(run.params)


def grid(task: Task, c: Cost, rates: Array, at: Callable[[Array, int], Array] | None = None) -> Trace:
    """A full run with each learning rate, the rest as at the start."""
    each = task.steps + c.hypergradient
    runs = (train(task, task.starting(lr=float(lr)).space.phi0, at) for lr in rates)
    return [point(task, (i + 1) * each, quality) for i, quality in enumerate(runs)]
