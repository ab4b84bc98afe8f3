"""Tuning, end to end, at equal cost: q = 3, learning rates to start from over five decades."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import blackbox, peers
from .lineup import (
    AGAIN,
    BLACK_BOX,
    FALLING,
    FIRST_SEED,
    NAMES,
    ONE_RUN,
    ONLINE,
    STARTS,
    TASKS,
    black_box,
    one_run,
    starts_of,
)
from .methods import CHANCE, Cost, Point, Trace, cost, expected, rounded, standing
from .page import canvas, number, percent, table
from .settings import Settings

DIVERGED = 100.0  # a test loss
LOSS = 0.05  # that the worst start may have against the best


def row(job: tuple[str, int, str, float | None], data: Any, costs: dict[str, Cost], full: bool) -> dict[str, Any]:
    """One method on one task: its trace."""
    setting, seed, method, start = job
    task, c, n = TASKS[setting].make(data, seed), costs[setting], TASKS[setting].trials[full]
    trace = black_box(method, task, c, n, seed) if start is None else one_run(method, task.starting(lr=start), c)
    return {"setting": setting, "seed": seed, "method": method, "start": start, "trace": rounded(trace)}


def measure(settings: Settings) -> dict[str, Any]:
    todo = {name: setting for name, setting in TASKS.items() if setting.available(settings.data)}
    tasks = {name: setting.make(settings.data, FIRST_SEED) for name, setting in todo.items()}
    costs = {name: cost(task) for name, task in tasks.items()}
    searched = [m for m in BLACK_BOX if blackbox.HAS_OPTUNA or not m.startswith("tpe")]
    searched += ["prodigy", "prodigy, cosine"] if peers.HAS_PRODIGY else []
    jobs: list[tuple[str, int, str, float | None]] = [
        (setting, seed, method, start)
        for setting, s in todo.items()
        for seed in range(FIRST_SEED, FIRST_SEED + s.seeds[settings.full])
        for method, starts in [*((m, starts_of(m)) for m in (*ONE_RUN, AGAIN)), *((m, (None,)) for m in searched)]
        for start in starts
    ]
    rows = settings.map(partial(row, data=settings.data, costs=costs, full=settings.full), jobs)
    known = {"costs": {name: rounded(c) for name, c in costs.items()}, "rows": rows}
    return known | {"chance": {name: round(task.chance, 4) for name, task in tasks.items()}}


# -- reading -------------------------------------------------------------------------------------------------------


def measured(record: dict[str, Any]) -> list[str]:
    """The tasks of a record."""
    return [name for name in TASKS if name in record["results"].get("costs", {})]


def chance(record: dict[str, Any], setting: str) -> float:
    """What a model that has diverged counts as."""
    return record["results"].get("chance", {}).get(setting, CHANCE)


def traces(record: dict[str, Any], setting: str, method: str) -> list[Trace]:
    """Of every seed (and start)."""
    whole = lambda p: Point(*(math.inf if x is None else x for x in p))
    rows = record["results"]["rows"]
    return [[whole(p) for p in r["trace"]] for r in rows if r["setting"] == setting and r["method"] == method]


def by_start(record: dict[str, Any], setting: str, method: str, what: str = "test") -> np.ndarray:
    """(seeds, starts): how the one model of each start has turned out."""
    return np.array([getattr(t[-1], what) for t in traces(record, setting, method)]).reshape(-1, len(starts_of(method)))


def curve(record: dict[str, Any], setting: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Runs spent, and the test loss of what stands then, mean over seeds; for random trials, over their orders too."""
    found = traces(record, setting, method)
    runs, worst = np.array([p.runs for p in found[0]]), chance(record, setting)
    if method.startswith("random"):
        return runs, np.mean([[expected(t, n + 1, worst) for n in range(len(t))] for t in found], axis=0)
    return runs, np.mean([[min(p.test, worst) for p in standing(t)] for t in found], axis=0)


def twenty(record: dict[str, Any], setting: str, search: str = "random") -> float:
    """Test loss that 20 random runs reach."""
    return float(np.mean([expected(t, 20, chance(record, setting)) for t in traces(record, setting, search)]))


def needed(record: dict[str, Any], setting: str, method: str, test: float) -> float:
    """Runs from which on a searching method stays at this test loss or below, on the mean; infinite if it never does."""
    runs, mean = curve(record, setting, method)
    above = np.flatnonzero(mean > test)
    first = above[-1] + 1 if above.size else 0
    return float(runs[first]) if first < len(runs) else math.inf


def methods(record: dict[str, Any]) -> set[str]:
    return {r["method"] for r in record["results"]["rows"]}


def cost_block(record: dict[str, Any]) -> str:
    rows = [[TASKS[name].label, *(float(x) for x in record["results"]["costs"][name])] for name in measured(record)]
    heads = ["task", "a step with its 3 tangents", "a hypergradient or an evaluation"]
    return table([*heads, "tuner, a step", "tuner, a window", "Glocal's estimate"], rows)


def table_block(record: dict[str, Any]) -> str:
    parts = []
    for setting in measured(record):
        rows: list[list[Any]] = []
        for method in (m for m in ONE_RUN if m in methods(record)):
            runs, accuracy = (float(np.mean(by_start(record, setting, method, what))) for what in ("runs", "accuracy"))
            rows.append([NAMES.get(method, method), runs, *spread(by_start(record, setting, method)), share(accuracy)])
        for method in (m for m in [*BLACK_BOX, "prodigy", "prodigy, cosine"] if m in methods(record)):
            ends = [standing(t)[-1] for t in traces(record, setting, method)]
            test, accuracy = np.array([[p.test] for p in ends]), float(np.mean([p.accuracy for p in ends]))
            rows.append([NAMES[method], ends[0].runs, *spread(test), share(accuracy)])
        n, score = len(traces(record, setting, "random")), "variance explained" if setting == "tabular" else "accuracy"
        label = f"{TASKS[setting].label} ({n} {'seed' if n == 1 else 'seeds'})"
        heads = [label, "cost, runs", "test loss", "over seeds", "best start", "worst start", score]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def spread(test: np.ndarray) -> list[str | None]:
    """Of test losses (seeds, starts): mean, standard deviation over seeds of the mean over starts, best and worst start."""
    seeds, start = test.mean(axis=1), test.mean(axis=0)
    ends = [loss(start.min()), loss(start.max())] if len(start) > 1 else [None, None]
    known = len(seeds) > 1 and seeds.max() < DIVERGED
    return [loss(test.mean()), f"± {seeds.std(ddof=1):.3f}" if known else None, *ends]


def share(accuracy: float) -> str | None:
    """A regression far worse than the mean explains nothing that could be given in per cent."""
    return percent(accuracy) if accuracy > -1 else None


def loss(x: float) -> str:
    return f"{x:.3f}" if x < DIVERGED else "diverged"


def verdict_block(record: dict[str, Any]) -> str:
    """The goal, and how far it is reached."""
    lines = []
    for setting in measured(record):
        goal = twenty(record, setting)
        for method in (m for m in ONLINE if m in methods(record)):
            test = by_start(record, setting, method)
            lost = distance(record, setting, method).lost
            reached = int(np.sum(test.mean(axis=0) <= goal))
            line = (
                f"- {TASKS[setting].label}, {method}: {test.mean():.3f} at the cost of "
                f"{number(float(np.mean(by_start(record, setting, method, 'runs'))))} runs; 20 random runs reach "
                f"{goal:.3f}, as good from {reached} of {len(STARTS)} starts; the worst start loses {percent(lost)} to "
                f"the best. {same_quality(record, setting, test.mean())}"
            )
            lines.append(line)
    return "\n".join(lines)


def goal_block(record: dict[str, Any]) -> str:
    """Of each way to run online and each task, how far it is from the three parts of the goal."""
    heads = [
        "",
        "task",
        "worst start, on 20 random runs",
        "on 20 with a cosine schedule",
        "behind the best start",
        "a seed's",
    ]
    rows: list[list[Any]] = []
    for method in (m for m in ONLINE if m in methods(record)):
        for setting in measured(record):
            goal = distance(record, setting, method)
            to = [f"{100 * x:+.1f} %" for x in (goal.constant, goal.cosine)]
            reached = ", ".join(name for name, there in goal.reached(method).items() if there)
            costs = goal.cost, goal.rival if math.isfinite(goal.rival) else "not within its runs"
            behind = percent(goal.lost), percent(goal.own)
            rows.append([method, TASKS[setting].label, *to, *behind, *costs, reached or "-"])
    return table([*heads, "cost, runs", "TPE's for that", "reached"], rows)


class Goal(NamedTuple):
    """How a way to run online stands to the goal; shares, and runs."""

    constant: float  # how far the worst start, on the mean over seeds, ends above 20 random runs
    cosine: float  # the same of 20 whose lr falls
    lost: float  # what the worst start loses to the best, both on the mean over seeds
    own: float  # what the worst of a seed's runs loses to its best, mean over seeds: chance is in it
    cost: float
    rival: float  # what TPE needs for the same test loss, its lr falling if this one's does

    def reached(self, method: str) -> dict[str, bool]:
        """The parts of the goal: lr that falls is judged against lr that falls."""
        above = self.cosine if method in FALLING else self.constant
        return {"quality": above <= 0, "any start": self.lost <= LOSS, "cost": self.cost <= self.rival}


def distance(record: dict[str, Any], setting: str, method: str) -> Goal:
    test, falls = by_start(record, setting, method), method in FALLING
    above = (float(test.mean(axis=0).max() / twenty(record, setting, s) - 1) for s in ("random", "random, cosine"))
    rival = "tpe, cosine" if falls else "tpe"
    needs = needed(record, setting, rival, float(test.mean())) if rival in methods(record) else math.inf
    starts = lost_to_best(test.mean(axis=0, keepdims=True))
    return Goal(*above, starts, lost_to_best(test), float(np.mean(by_start(record, setting, method, "runs"))), needs)


def lost_to_best(test: np.ndarray) -> float:
    """What the worst of each seed's runs loses to the best, mean over seeds; test losses (seeds, runs)."""
    return float(np.mean(test.max(axis=1) / test.min(axis=1) - 1))


def chance_block(record: dict[str, Any]) -> str:
    """What the same method loses from one start, when only the order of the batches is another."""
    said = []
    for setting in measured(record):
        tests = np.array([[p.test for p in t] for t in traces(record, setting, AGAIN)])
        said.append(f"{TASKS[setting].label} {100 * lost_to_best(tests):.1f} %")
    return f"Search first, five times from lr {STARTS[2]:g} with other orders of the batches: {'; '.join(said)}."


def whole_block(record: dict[str, Any]) -> str:
    """Search first against true global, from the starts that both have."""
    method, rows = "local, search first", []
    for setting in measured(record):
        both = [STARTS.index(start) for start in starts_of("global")]
        ours, whole = by_start(record, setting, method)[:, both], by_start(record, setting, "global")
        share = np.mean(by_start(record, setting, method, "runs")) / np.mean(by_start(record, setting, "global", "runs"))
        rows.append((TASKS[setting].label, ours.mean() / whole.mean() - 1, share, int(np.sum(ours < whole)), whole.size))
    said = "; ".join(f"{label} {100 * gain:+.1f} % at {percent(share)} of the cost" for label, gain, share, *_ in rows)
    lower, size = sum(r[3] for r in rows), sum(r[4] for r in rows)
    name = NAMES["global"]
    return f"`search_first`, test loss on that of {name}, from the same starts: {said}. Lower in {lower} of {size} runs."


def same_quality(record: dict[str, Any], setting: str, test: float) -> str:
    say = lambda m: (
        f"{NAMES[m]} {number(x)}"
        if math.isfinite(x := needed(record, setting, m, test))
        else f"{NAMES[m]} not within {number(float(traces(record, setting, m)[0][-1].runs))}"
    )
    searched = [m for m in BLACK_BOX if m in methods(record) and not m.startswith("grid")]
    return f"Runs for the same quality: {', '.join(say(m) for m in searched)}."


def rivals_block(record: dict[str, Any]) -> str:
    """What was best of all, and what hypergradient descent does for the price of one run."""
    lines = []
    for setting in measured(record):
        mean = {m: float(by_start(record, setting, m).mean()) for m in ONE_RUN if m in methods(record)}
        ends = {m: curve(record, setting, m) for m in BLACK_BOX if m in methods(record)}
        best = min(ends, key=lambda m: ends[m][1][-1])
        ours = min((m for m in ONLINE if m in mean), key=lambda m: mean[m])
        runs, found = ends[best]
        start = loss(by_start(record, setting, ours).mean(axis=0).min())
        lines.append(
            f"- {TASKS[setting].label}: best of the searches is {NAMES[best]}, {loss(found[-1])} after "
            f"{number(float(runs[-1]))} runs; best of the online runs is {ours}, {loss(mean[ours])} on the mean over "
            f"starts and {start} from the best; hypergradient descent, for one run, "
            f"{loss(mean['hypergradient descent'])}; true global {loss(mean['global'])}."
        )
    return "\n".join(lines)


def missing_block(record: dict[str, Any]) -> str:
    gone = [name for name, m in (("optuna (TPE)", "tpe"), ("prodigyopt (Prodigy)", "prodigy")) if m not in methods(record)]
    gone += [TASKS[name].label for name in TASKS if name not in measured(record)]
    return f"Left out, not installed or no data given: {', '.join(gone)}." if gone else "Nothing was left out."


# -- pictures ------------------------------------------------------------------------------------------------------

LOOK = {
    "random": ("#999999", "-"),
    "random, cosine": ("#999999", "--"),
    "tpe": ("#3465a4", "-"),
    "tpe, cosine": ("#3465a4", "--"),
    "halving": ("#73a946", "-"),
    "hyperband": ("#73a946", "--"),
}
OURS = {
    "local": ("#f57900", "o"),
    "glocal": ("#cc0000", "s"),
    "glocal, 5 a window": ("#a40000", "D"),
    "local, guarded": ("#c4a000", "P"),
    "glocal, guarded": ("#8f5902", "X"),
    "local, search first": ("#4e9a06", "*"),
    "local, search, three runs": ("#06989a", "h"),
    "global": ("#5c3566", "^"),
}


def panels(record: dict[str, Any], xlabel: str, draw: Callable[[Any, str], None]) -> Any:
    """A figure of `draw(ax, setting)` for each task measured, and one legend after them."""
    names = measured(record)
    figure, axes = canvas(9.6, 3.1 * (len(names) // 3 + 1), len(names) // 3 + 1, 3)
    places = axes.ravel()
    for ax, setting in zip(places, names, strict=False):
        draw(ax, setting)
        ax.set(xscale="log", xlabel=xlabel, title=TASKS[setting].label)
    for ax in places[:: axes.shape[1]]:
        ax.set_ylabel("test loss")
    for ax in places[len(names) :]:
        ax.axis("off")
    places[len(names)].legend(*places[0].get_legend_handles_labels(), loc="center")
    return figure


def anytime(record: dict[str, Any]) -> Any:
    """Test loss of what stands against cost; of one-run methods the mean over starts, and the worst to the best start."""

    def draw(ax: Any, setting: str) -> None:
        lows = []
        for method, (color, line) in LOOK.items():
            if method in methods(record):
                runs, mean = curve(record, setting, method)
                ax.plot(runs, mean, color=color, ls=line, label=NAMES[method])
                lows.append(mean.min())
        for method, (color, mark) in OURS.items():
            mean = by_start(record, setting, method).mean(axis=0)
            runs = by_start(record, setting, method, "runs").mean()
            bar = [[mean.mean() - mean.min()], [mean.max() - mean.mean()]]
            ax.errorbar(runs, mean.mean(), bar, fmt=mark, color=color, ms=5, capsize=3, label=NAMES[method].strip("*"))
            lows.append(mean.min())
        ours = max(by_start(record, setting, method).mean(axis=0).max() for method in OURS)
        ax.set(ylim=(0.96 * min(lows), max(1.5 * min(lows), 1.04 * min(ours, 3 * min(lows)))))

    return panels(record, "cost, in full runs", draw)


def starts(record: dict[str, Any]) -> Any:
    """Test loss against the learning rate that a run starts from."""
    looks = {"untuned": ("#999999", "x"), "hypergradient descent": ("#3465a4", "v"), **OURS}

    def draw(ax: Any, setting: str) -> None:
        best = math.inf
        for method, (color, mark) in looks.items():
            mean = by_start(record, setting, method).mean(axis=0)
            ax.plot(starts_of(method), mean, color=color, marker=mark, ms=5, label=NAMES.get(method, method).strip("*"))
            best = min(best, mean.min())
        ax.axhline(twenty(record, setting), color="#999999", ls=":", label="best of 20 random runs")
        ax.set(ylim=(0.96 * best, 2.2 * best))

    return panels(record, "lr at the start", draw)


BLOCKS = {
    "tuning.cost": cost_block,
    "tuning.table": table_block,
    "tuning.goal": goal_block,
    "tuning.whole": whole_block,
    "tuning.chance": chance_block,
    "tuning.verdict": verdict_block,
    "tuning.rivals": rivals_block,
    "tuning.missing": missing_block,
}
FIGURES = {"evidence_tuning.png": anytime, "evidence_starts.png": starts}
