"""Mode `restart`: runs cut short, then longer and longer, against true global tuning, which takes whole runs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from koopman_hpo import Global, Glocal, Local, Tuner, koopman
from koopman_hpo.strategies import Window

from .methods import CHANCE, Cost, Trace, cost, point, rounded, seeds, standing, train
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


class Krylov:
    """The model-based operator where its gate passes, with an epoch's noise; elsewhere what Glocal says.

    `spent`, in plain steps, is the processor time of its estimates; `asked` and `accepted` count them.
    """

    mode, snapshots, cut = "restart", 25, 0.1

    def __init__(self, task: Task):
        epoch = [task.batch(t) for t in range(task.batch.steps)]
        whole = tuple(np.concatenate(part) for part in zip(*epoch, strict=True))
        settings = {"estimator": "krylov", "train_batch": whole, "batches": epoch, "noise": "epoch"}
        self.strategy = Glocal(mode="restart", settings={"stages": 6}, **settings)
        self.strategy.look(np.ones((25, task.space.q)), 1, Window(task.run(), task.val, 2, 25))  # what it compiles is free
        self.spent, self.asked, self.accepted = 0.0, 0, 0
        self._step = seconds(task)

    def estimate(self, H: np.ndarray, ahead: int) -> Any:
        return self.strategy.estimate(H, ahead)

    def look(self, H: np.ndarray, ahead: int, window: Window) -> Any:
        clock = time.process_time()
        found = self.strategy.look(H, ahead, window)
        self.spent += (time.process_time() - clock) / self._step
        if window.steps:  # a whole run has nothing to foresee
            self.asked, self.accepted = self.asked + 1, self.accepted + (found.method == "krylov")
        return found


STRATEGIES: dict[str, Callable[[Task], Any]] = {
    "global": lambda task: Global(),
    "continuation": lambda task: Local(mode="restart"),
    "glocal": lambda task: Glocal(mode="restart"),
    "krylov": Krylov,
    "constant": lambda task: Constant(),
}
NAMES = {
    "global": "true global",
    "continuation": "continuation, last value",
    "glocal": "continuation, glocal",
    "krylov": "continuation, krylov",
    "constant": "continuation, a constant direction",
}
LOOK = {"global": "#5c3566", "continuation": "#f57900", "glocal": "#cc0000", "krylov": "#3465a4", "constant": "#999999"}


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
    "layers": "long-tailed, weights, lr and L2 a layer, q = 14",
}


def seconds(task: Task, calls: int = 100) -> float:
    """Processor time of a plain step: the shortest of many."""
    run, least = task.run(), math.inf
    for t in range(calls):
        batch, clock = task.batch(t), time.process_time()
        run.step(run.space.phi0, batch, tangents=False)
        least = min(least, time.process_time() - clock)
    return least


def path(task: Task, c: Cost, strategy: Any, budget: float, most: int = 50) -> Trace:
    """What would stand if tuning ended after each run, the cost of making it included.

    After a run cut short that is a model yet to be trained, whole, with what has been found; after whole runs the best of
    their own models by validation loss.
    """
    tuner = Tuner(task.run(), strategy, steps=task.steps, runs=10_000, mode="restart")
    trace: Trace = []
    whole: Trace = []
    while not tuner.done and len(trace) < most and (not trace or trace[-1].runs < budget):
        phi, cut, windows = tuner.phi, tuner.cut < 1, len(tuner.history)
        while len(tuner.history) == windows:
            tuner.step(task.batch(tuner.used), task.val)
        spent = tuner.used * c.tangent + (len(tuner.history.trajectory) + 1) * c.hypergradient
        spent += getattr(strategy, "spent", 0.0)
        if cut:
            trace.append(point(task, spent + task.steps, train(task, tuner.phi)))
        else:
            whole.append(point(task, spent, train(task, phi)))
            trace.append(standing(whole)[-1])
    return trace


def row(job: tuple[str, int, str], data: Any, costs: dict[str, Cost]) -> dict[str, Any]:
    name, seed, method = job
    c = costs[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = TASKS[name](data, seed)
        strategy = STRATEGIES[method](task)
        trace = path(task, c, strategy, GLOBAL_RUNS * c.tangent)
    out = {"task": name, "seed": seed, "method": method, "trace": rounded(trace)}
    return out | ({"gate": [strategy.accepted, strategy.asked]} if isinstance(strategy, Krylov) else {})


def measure(settings: Settings) -> dict[str, Any]:
    if settings.data is None:
        return {}
    seeds = range(FIRST_SEED, FIRST_SEED + (5 if settings.full else 2))
    costs = {name: cost(make(settings.data, FIRST_SEED)) for name, make in TASKS.items()}
    jobs = [(name, seed, method) for name in TASKS for seed in seeds for method in STRATEGIES]
    return {"rows": settings.map(partial(row, data=settings.data, costs=costs), jobs)}


# -- reading -------------------------------------------------------------------------------------------------------

GRID = np.geomspace(1.0, 60.0, 60)


def reached(record: dict[str, Any], name: str, method: str, column: int = 1) -> np.ndarray:
    """(60,) on GRID, runs: validation loss (column 1) or test loss (2) of what stands then, mean over seeds."""
    traces = [r["trace"] for r in record["results"]["rows"] if r["task"] == name and r["method"] == method]
    out = np.full((len(traces), len(GRID)), CHANCE)
    for values, trace in zip(out, traces, strict=True):
        for p in trace:
            values[p[0] <= GRID] = CHANCE if p[column] is None else min(p[column], CHANCE)
    mean = out.mean(axis=0)
    mean[min(trace[-1][0] for trace in traces) * 1.05 < GRID] = math.nan
    return mean


def end(values: np.ndarray) -> float:
    """The last known value of a curve on GRID."""
    return float(values[np.isfinite(values)][-1])


def first(values: np.ndarray, target: float) -> float:
    """Runs from which on a curve on GRID lies at the target or below; infinite if it never does."""
    known = np.flatnonzero(np.isfinite(values))
    above = known[values[known] > target]
    after = known[known > above[-1]] if above.size else known
    return float(GRID[after[0]]) if after.size else math.inf


def shares(record: dict[str, Any], name: str) -> dict[str, float]:
    """Of the cost at which true global first comes near its own end, what each needs to come as near."""
    whole = reached(record, name, "global")
    target = (1 + NEAR) * end(whole)
    base = first(whole, target)
    return {m: first(reached(record, name, m), target) / base for m in STRATEGIES}


def table_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    rows = []
    for name in TASKS:
        whole = reached(record, name, "global")
        base = first(whole, (1 + NEAR) * end(whole))
        for method, share in shares(record, name).items():
            val, test = (end(reached(record, name, method, k)) for k in (1, 2))
            there = [percent(share), number(base * share)] if math.isfinite(share) else ["not reached", None]
            rows.append([LABELS[name], NAMES[method], f"{val:.3f}", f"{test:.3f}", *there])
    heads = [
        "task",
        "estimate",
        "validation loss in the end",
        "test loss in the end",
        "cost for true global's quality",
        "in runs",
    ]
    return f"{seeds(record)}\n\n{table(heads, rows)}"


def verdict_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    parts = []
    for method in (m for m in NAMES if m != "global"):
        found = [shares(record, name)[method] for name in TASKS]
        there = [x for x in found if math.isfinite(x)]
        third = sum(x <= 1 / 3 for x in there)
        middle = f", at {percent(float(np.median(there)))} of its cost in the median" if there else ""
        parts.append(
            f"{NAMES[method]}: reaches the quality of true global on {len(there)} of {len(found)} tasks{middle}; "
            f"at a third or less on {third}"
        )
    asked = np.sum([r["gate"] for r in record["results"]["rows"] if "gate" in r], axis=0)
    return f"{'; '.join(parts)}. The gate of krylov lets {asked[0]} of {asked[1]} estimates through."


def picture(record: dict[str, Any]) -> Any:
    """Validation loss of what stands against cost."""
    figure, axes = canvas(9.6, 6.0, 2, 2)
    if not record["data"]:
        return figure
    for ax, name in zip(axes.ravel(), TASKS, strict=True):
        for method, color in LOOK.items():
            ax.plot(GRID, reached(record, name, method), color=color, label=NAMES[method], drawstyle="steps-post")
        low = np.nanmin([reached(record, name, m) for m in STRATEGIES])
        ax.set(xscale="log", title=LABELS[name], ylim=(0.96 * low, 1.5 * low))
    for ax in axes[1]:
        ax.set_xlabel("cost, in full runs")
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOK))
    return figure


BLOCKS = {"restarts.table": table_block, "restarts.verdict": verdict_block}
FIGURES = {"evidence_restarts.png": picture}
