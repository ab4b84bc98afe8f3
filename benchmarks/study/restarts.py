"""Mode `restart`: runs cut short, then longer and longer, against true global tuning, which takes whole runs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from koopman_hpo import Global, Glocal, Local, Tuner, koopman

from .methods import CHANCE, Cost, Trace, cost, point, rounded, train
from .page import canvas, number, percent, table
from .settings import Settings
from .tasks import Task, imbalanced, plain

FIRST_SEED, NEAR = 10, 0.01  # within a hundredth of the loss counts as reached
GLOBAL_RUNS = 12


@dataclass(frozen=True)
class Constant:
    """The control: a direction that knows nothing.  It asks for more of every hyperparameter, always."""

    mode: str = "restart"
    snapshots: int = 1
    cut: float = 0.1

    def estimate(self, H: np.ndarray, ahead: int) -> Any:
        return replace(koopman.extrapolate(H[-1:], 0, method="last"), value=-np.ones(H.shape[1]), accepted=True)


STRATEGIES = {
    "global": Global(),
    "continuation": Local(mode="restart"),
    "glocal": Glocal(mode="restart"),
    "constant": Constant(),
}
NAMES = {
    "global": "true global",
    "continuation": "continuation, last value",
    "glocal": "continuation, glocal",
    "constant": "continuation, a constant direction",
}
LOOK = {"global": "#5c3566", "continuation": "#f57900", "glocal": "#cc0000", "constant": "#999999"}


def clean(data: Any, seed: int, lr: float) -> Task:
    return replace(plain(data, seed), steps=1000).starting(lr=lr)


TASKS = {
    "lr 0.001": partial(clean, lr=1e-3),
    "lr 0.01": partial(clean, lr=1e-2),
    "lr 0.3": partial(clean, lr=0.3),
    "layers": partial(imbalanced, layers=True),
}
LABELS = {
    **{name: f"KMNIST, q = 3, from {name}" for name in TASKS if name != "layers"},
    "layers": "long-tailed KMNIST, class weights, lr and L2 a layer, q = 14",
}


def path(task: Task, c: Cost, strategy: Any, budget: float) -> Trace:
    """What would stand if tuning ended after each run: a model trained to the end with what has been found.

    A run cut short must still be followed by a whole one, which is counted; a whole run leaves its own model.
    """
    tuner = Tuner(task.run(), strategy, steps=task.steps, runs=10_000, mode="restart")
    trace: Trace = []
    while not tuner.done and (not trace or trace[-1].runs < budget):
        phi, whole, windows = tuner.phi, tuner.cut >= 1, len(tuner.history)
        while len(tuner.history) == windows:
            tuner.step(task.batch(tuner.used), task.val)
        spent = tuner.used * c.tangent + (len(tuner.history.trajectory) + 1) * c.hypergradient
        if not whole:
            phi, spent = tuner.phi, spent + task.steps
        trace.append(point(task, spent, train(task, phi)))
    return trace


def row(job: tuple[str, int, str], data: Any, costs: dict[str, Cost]) -> dict[str, Any]:
    name, seed, method = job
    c = costs[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = path(TASKS[name](data, seed), c, STRATEGIES[method], GLOBAL_RUNS * c.tangent)
    return {"task": name, "seed": seed, "method": method, "trace": rounded(trace)}


def measure(settings: Settings) -> dict[str, Any]:
    if settings.data is None:
        return {}
    seeds = range(FIRST_SEED, FIRST_SEED + (5 if settings.full else 2))
    costs = {name: cost(make(settings.data, FIRST_SEED)) for name, make in TASKS.items()}
    jobs = [(name, seed, method) for name in TASKS for seed in seeds for method in STRATEGIES]
    return {"rows": settings.map(partial(row, data=settings.data, costs=costs), jobs)}


# -- reading -------------------------------------------------------------------------------------------------------

GRID = np.geomspace(1.0, 60.0, 60)


def standing(record: dict[str, Any], name: str, method: str, column: int = 1) -> np.ndarray:
    """(60,) on GRID, runs: validation loss (column 1) or test loss (2) of the best model so far, mean over seeds."""
    rows = [r["trace"] for r in record["results"]["rows"] if r["task"] == name and r["method"] == method]
    out = np.full((len(rows), len(GRID)), CHANCE)
    for i, trace in enumerate(rows):
        best = CHANCE
        points = [[math.inf if x is None else x for x in p] for p in trace]
        for p in points:
            if p[1] < best:
                best = p[1]
                out[i, p[0] <= GRID] = min(p[column], CHANCE)
    last = min(trace[-1][0] for trace in rows)
    mean = out.mean(axis=0)
    mean[1.05 * last < GRID] = math.nan
    return mean


def first(values: np.ndarray, target: float) -> float:
    """Runs at which a curve on GRID first lies at the target or below; infinite if it never does."""
    there = np.flatnonzero(values <= target)
    return float(GRID[there[0]]) if there.size else math.inf


def shares(record: dict[str, Any], name: str) -> dict[str, float]:
    """Of the cost at which true global first comes near its own end, what each needs to come as near."""
    whole = standing(record, name, "global")
    target = (1 + NEAR) * float(np.nanmin(whole))
    base = first(whole, target)
    return {m: first(standing(record, name, m), target) / base for m in STRATEGIES}


def table_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    rows = []
    for name in TASKS:
        whole = standing(record, name, "global")
        base = first(whole, (1 + NEAR) * float(np.nanmin(whole)))
        for method, share in shares(record, name).items():
            val, test = (float(np.nanmin(standing(record, name, method, k))) for k in (1, 2))
            there = [percent(share), number(base * share)] if math.isfinite(share) else ["not reached", None]
            rows.append([LABELS[name], NAMES[method], f"{val:.3f}", f"{test:.3f}", *there])
    heads = ["task", "estimate", "best validation loss", "best test loss", "cost for true global's quality", "in runs"]
    return table(heads, rows)


def verdict_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    parts = []
    for method in ("continuation", "glocal", "constant"):
        found = [shares(record, name)[method] for name in TASKS]
        reached = [x for x in found if math.isfinite(x)]
        third = sum(x <= 1 / 3 for x in reached)
        middle = f", at {percent(float(np.median(reached)))} of its cost in the median" if reached else ""
        parts.append(
            f"{NAMES[method]}: reaches the quality of true global on {len(reached)} of {len(found)} tasks{middle}; "
            f"at a third or less on {third}"
        )
    return "; ".join(parts) + "."


def picture(record: dict[str, Any]) -> Any:
    """Validation loss of what stands against cost."""
    figure, axes = canvas(9.6, 5.4, 2, 2)
    if not record["data"]:
        return figure
    for ax, name in zip(axes.ravel(), TASKS, strict=True):
        for method, color in LOOK.items():
            ax.plot(GRID, standing(record, name, method), color=color, label=NAMES[method], drawstyle="steps-post")
        low = np.nanmin([standing(record, name, m) for m in STRATEGIES])
        ax.set(xscale="log", title=LABELS[name], ylim=(0.96 * low, 1.5 * low))
    for ax in axes[1]:
        ax.set_xlabel("cost, in full runs")
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss")
    axes[0][0].legend(fontsize="small")
    return figure


BLOCKS = {"restarts.table": table_block, "restarts.verdict": verdict_block}
FIGURES = {"evidence_restarts.png": picture}
