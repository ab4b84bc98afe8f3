"""Many hyperparameters: quality at equal cost against how many there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from koopman_hpo import Global, Glocal, Local

from . import blackbox, more_tasks, searching
from .methods import Cost, cost, curve, point, rounded, seeds, train, tuned
from .page import canvas, percent, table
from .settings import Settings
from .tasks import Task, imbalanced, scheduled, sources

SOURCES = (2, 4, 10, 32, 100, 1000)
FIRST_SEED, MANY = 10, 1000  # constants were chosen on seeds from 100 on
TASKS: dict[str, Callable[..., Task]] = {
    **{f"sources-{q}": partial(sources, q=q) for q in SOURCES},
    "classes": imbalanced,
    "layers": partial(imbalanced, layers=True),
    "schedule": scheduled,
    "augmentation": more_tasks.augmentation,
    "weighted": more_tasks.weighted,
}
ONE_RATE = "lr, momentum, L2, noisy labels (q = 3)"  # what a search before a schedule tunes
NEED_JAX = ("augmentation", "weighted")
MEMORY = 0.997  # kept of the tangents a step where these are tuned: they act on all that a run becomes
HIGHER = {"peak": 20.0, "penalty": 0.015}  # where a schedule begins under noisy labels: twice and three times the recipe's
LABELS = {
    "classes": "class weights, long-tailed (q = 10)",
    "layers": "class weights, lr and L2 a layer, long-tailed (q = 14)",
    "schedule": "lr with 8 knots, momentum, L2, noisy labels (q = 10)",
    "augmentation": "strengths of augmentation, 300 images (q = 10)",
    "weighted": "weights of losses, 300 images, noisy labels (q = 10)",
}
OURS = {
    "local": (Local(), {}),
    "glocal": (Glocal(), {"every": 5}),
    "global": (Global(), {"runs": 10}),
}
NAMES = {
    "untuned": "untuned",
    "oracle": "bad sources left out by hand",
    "local": "local, online, all tangents",
    "directions-16": "local, online, 16 random tangents",
    "directions-64": "local, online, 64 random tangents",
    "glocal": "glocal, online",
    "search": "local, online, search first",
    "higher": "local, online, search first, begun higher",
    "global": "true global, 10 runs",
    "random": "random search",
    "tpe": "TPE",
}


def ours(name: str) -> tuple[str, ...]:
    """What is tried on a task."""
    if not name.startswith("sources"):
        return ("untuned", "local", "glocal", *(("search", "higher") if name == "schedule" else ()), "global")
    many = {"sources-100": ("directions-16",), "sources-1000": ("directions-16", "directions-64")}
    return ("untuned", "oracle", "local", *many.get(name, ()))


def trials(name: str, method: str, full: bool) -> int:
    """Runs of a searching method: ten times what ours costs, as far as the tier allows."""
    q = int(name.split("-")[1]) if name.startswith("sources") else 30 if name in NEED_JAX else 15
    if method == "tpe" and q == MANY:  # proposing takes several times as long as training
        return 120 if full else 60
    most = {("random", False): 400, ("random", True): 3500, ("tpe", False): 250, ("tpe", True): 350}[method, full]
    return min(most, max(20, 4 * q if q < MANY else most))


def several(name: str, full: bool) -> range:
    """The seeds of a task."""
    return range(FIRST_SEED, FIRST_SEED + (5 if full else 2 if name.startswith("sources") else 4))


def row(job: tuple[str, int, str, int], data: Any, costs: dict[str, Cost]) -> dict[str, Any]:
    """One method on one task: a point, or a searching method's curve."""
    name, seed, method, n = job
    task, c = TASKS[name](data, seed), costs[name]
    out = {"task": name, "seed": seed, "method": method}
    if method in ("random", "tpe"):
        search = blackbox.tpe if method == "tpe" else blackbox.random
        return out | {"curve": rounded(curve(search(task, c, n, seed), method == "tpe"))}
    if method == "untuned":
        return out | {"point": rounded(point(task, task.steps, train(task, task.space.phi0)))}
    if method == "oracle":
        return out | {"point": rounded(point(task, task.steps, train(task, task.space.phi(task.oracle))))}
    if method.startswith("directions"):
        s = int(method.split("-")[1])
        return out | {"point": rounded(tuned(sources(data, seed, task.space.q, s), costs[f"{name}-{s}"], Local())[0])}
    if method in ("search", "higher"):
        begun = HIGHER if method == "higher" else {}
        return out | {"point": rounded(searching.then_knots(task, c, costs[ONE_RATE], Local(), **begun))}
    strategy, settings = OURS[method]
    memory = {"forget": MEMORY} if name in NEED_JAX and method != "global" else {}
    return out | {"point": rounded(tuned(task, c, strategy, **settings, **memory)[0])}


def measure(settings: Settings) -> dict[str, Any]:
    if settings.data is None:
        return {}
    todo = [name for name in TASKS if find_spec("jax") or name not in NEED_JAX]
    costs = {name: cost(TASKS[name](settings.data, FIRST_SEED)) for name in todo}
    for q, s in ((100, 16), (MANY, 16), (MANY, 64)):
        costs[f"sources-{q}-{s}"] = cost(sources(settings.data, FIRST_SEED, q, s))
    costs[ONE_RATE] = cost(searching.one_rate(scheduled(settings.data, FIRST_SEED)))
    searches = ("random", "tpe") if blackbox.HAS_OPTUNA else ("random",)
    tried = {name: [(m, 0) for m in ours(name)] + [(m, trials(name, m, settings.full)) for m in searches] for name in todo}
    jobs = [(name, seed, m, n) for name in todo for seed in several(name, settings.full) for m, n in tried[name]]
    jobs.sort(key=lambda job: -job[3])  # the long ones first
    rows = settings.map(partial(row, data=settings.data, costs=costs), jobs)
    return {"costs": {name: rounded(c) for name, c in costs.items()}, "rows": rows}


# -- reading -------------------------------------------------------------------------------------------------------


def found(record: dict[str, Any], name: str, method: str, what: str) -> list[Any]:
    rows = record["results"]["rows"]
    return [r[what] for r in rows if r["task"] == name and r["method"] == method]


def reached(record: dict[str, Any], name: str, method: str) -> tuple[float, float, float] | None:
    """Runs, test loss and accuracy, means over seeds."""
    points = found(record, name, method, "point")
    if not points:
        return None
    runs, _, test, accuracy = np.mean([[math.inf if x is None else x for x in p] for p in points], axis=0)
    return float(runs), float(test), float(accuracy)


def searched(record: dict[str, Any], name: str, method: str, runs: float) -> float | None:
    """Test loss of a searching method after so many runs, mean over seeds; None where so many were not made."""
    curves = found(record, name, method, "curve")
    if not curves or curves[0][-1][0] < math.floor(runs):
        return None
    return float(np.mean([[test for n, test in c if n <= max(1.0, runs)][-1] for c in curves]))


def longest(record: dict[str, Any], name: str, method: str) -> tuple[int, float] | None:
    """All runs made, and the test loss then."""
    curves = found(record, name, method, "curve")
    return (curves[0][-1][0], float(np.mean([c[-1][1] for c in curves]))) if curves else None


def say(x: float | None) -> str | None:
    return None if x is None else f"{x:.3f}"


def most(record: dict[str, Any], name: str, method: str, runs: float) -> str | None:
    """Test loss after so many runs, or after as many as were made, which are named then."""
    test, end = searched(record, name, method, runs), longest(record, name, method)
    return say(test) if test is not None else f"{end[1]:.3f} ({end[0]} runs)" if end else None


HEADS = (
    "cost, runs",
    "test loss",
    "accuracy",
    *(f"{m}, {k}" for k in ("equal cost", "ten times") for m in ("random", "TPE")),
)


def line(record: dict[str, Any], name: str, method: str) -> list[Any]:
    here = reached(record, name, method)
    assert here is not None
    runs, test, accuracy = here
    shown = [NAMES[method], runs, say(test), percent(accuracy)]
    if method in ("untuned", "oracle"):
        return [*shown, None, None, None, None]
    return [*shown, *(most(record, name, m, k * runs) for k in (1, 10) for m in ("random", "tpe"))]


def of(record: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The rows of some tasks alone."""
    return {"results": {"rows": [r for r in record["results"]["rows"] if r["task"] in names]}}


def sources_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    rows = [[f"{q:,}", *line(record, f"sources-{q}", m)] for q in SOURCES for m in ours(f"sources-{q}")]
    return f"{seeds(of(record, [f'sources-{q}' for q in SOURCES]))}\n\n{table(['q', 'method', *HEADS], rows)}"


def tasks_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    made = [n for n in LABELS if n in record["results"]["costs"]]
    tables = [table([LABELS[n], *HEADS], [line(record, n, m) for m in ours(n)]) for n in made]
    return "\n\n".join([seeds(of(record, made)), *tables])


def verdict_block(record: dict[str, Any]) -> str:
    """From how many hyperparameters on ours is out of reach."""
    if not record["data"]:
        return "Not measured: no data was given."
    searches = [m for m in ("random", "tpe") if any(r["method"] == m for r in record["results"]["rows"])]
    better: dict[int, list[int]] = {1: [], 10: []}
    short: dict[int, list[str]] = {1: [], 10: []}
    for q in SOURCES:
        here = reached(record, f"sources-{q}", "local")
        assert here is not None
        for k in (1, 10):
            tests = {m: searched(record, f"sources-{q}", m, k * here[0]) for m in searches}
            ends = {m: longest(record, f"sources-{q}", m) for m in searches}
            if all(end is None or here[1] < (end[1] if tests[m] is None else tests[m]) for m, end in ends.items()):
                better[k].append(q)
            made = [
                f"{NAMES[m]} {end[0]} runs" if end else f"{NAMES[m]} none" for m, end in ends.items() if tests[m] is None
            ]
            short[k] += [f"at q = {q:,} ({', '.join(made)})"] if made else []
    listed = lambda qs: ", ".join(f"{q:,}" for q in qs) or "none"
    rest = {k: f", where this tier spent less {', '.join(part)}" if part else "" for k, part in short.items()}
    return (
        f"One online run with all tangents is better than {' and '.join(NAMES[m] for m in searches)} at equal cost for "
        f"q = {listed(better[1])}{rest[1]}; at ten times the cost for q = {listed(better[10])}{rest[10]}."
    )


def cost_of(record: dict[str, Any], q: int) -> float:
    here = reached(record, f"sources-{q}", "local")
    return here[0] if here else math.nan


def cost_block(record: dict[str, Any]) -> str:
    if not record["data"]:
        return "Not measured: no data was given."
    costs = record["results"]["costs"]
    label = lambda name: LABELS.get(name) or name.replace("sources-", "sources, q = ").replace("-", ", random tangents ")
    return table(["task", "a step with its tangents, in plain steps"], [[label(n), float(c[0])] for n, c in costs.items()])


# -- picture -------------------------------------------------------------------------------------------------------

LOOK = {
    ("random", 1): ("#999999", ":", "o"),
    ("random", 10): ("#999999", "-", "o"),
    ("tpe", 1): ("#3465a4", ":", "s"),
    ("tpe", 10): ("#3465a4", "-", "s"),
}


def crossing(record: dict[str, Any]) -> Any:
    """Test loss against q, each at the cost of ours at this q, and at ten times that; hollow where less was spent."""
    figure, axes = canvas(8.4, 4.2)
    if not record["data"]:
        return figure
    ax = axes[0][0]
    for (method, k), (color, style, mark) in LOOK.items():
        made = [q for q in SOURCES if longest(record, f"sources-{q}", method)]
        tests = [searched(record, f"sources-{q}", method, k * cost_of(record, q)) for q in made]
        ends = [longest(record, f"sources-{q}", method)[1] for q in made]
        shown = [end if test is None else test for test, end in zip(tests, ends, strict=True)]
        name = f"{NAMES[method]}, {'ten times the' if k == 10 else 'equal'} cost"
        ax.plot(made, shown, color=color, ls=style, label=name)
        for q, y, test in zip(made, shown, tests, strict=True):
            ax.plot(q, y, color=color, marker=mark, ms=4, mfc="white" if test is None else color)
    marks = {"directions-16": ("#f57900", "v"), "directions-64": ("#f57900", "^"), "local": ("#cc0000", "D")}
    for method, (color, mark) in marks.items():
        made = [q for q in SOURCES if reached(record, f"sources-{q}", method)]
        tests = [reached(record, f"sources-{q}", method)[1] for q in made]
        ax.plot(made, tests, color=color, ls="-" if method == "local" else "", marker=mark, ms=6, label=NAMES[method])
    for method, style in (("untuned", "--"), ("oracle", "-.")):
        tests = [reached(record, f"sources-{q}", method)[1] for q in SOURCES]
        ax.plot(SOURCES, tests, color="black", lw=0.8, ls=style, label=NAMES[method])
    untuned = max(reached(record, f"sources-{q}", "untuned")[1] for q in SOURCES)
    ax.set(xscale="log", xlabel="hyperparameters q, weights of sources", ylabel="test loss", ylim=(None, 1.15 * untuned))
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


BLOCKS = {
    "crossing.sources": sources_block,
    "crossing.verdict": verdict_block,
    "crossing.tasks": tasks_block,
    "crossing.cost": cost_block,
}
FIGURES = {"evidence_crossing.png": crossing}
