"""Search first, then train: a short online run finds where to begin and is thrown away; training begins anew from there.

After the search lr falls linearly to zero from a multiple of what was found, and what is tuned is the decay's height: the
recipe of docs/tuning.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from koopman_hpo import Guard, Space, log, logit, outer

from .methods import Cost, Point, Trace, point, standing, train, tuned
from .tasks import Task

# the recipe's; THEN, PEAK, PENALTY and what is handed on were chosen on seeds 20 to 22
SHARE, WINDOWS, RATE = 1 / 3, 20, 0.5  # of the run that the search takes, moves in it, and their size
PEAK = 10.0  # times the rate found: what falls to zero may begin high
PENALTIES, PENALTY = ("l2", "weight_decay"), 5e-3  # begun there: a search is too short to see what it does
THEN = 0.25  # the size of moves in the run proper: twice the default
ORDERS = 5
RUNS = 3  # that one may well make after a search: with it they cost 5 to 12 plain runs, by task
START, MOMENTUM = 0.5, (0.1, 0.9)  # of momentum: a long memory undoes what lr does about noise
CAREFUL = Guard(again=0.3, excess=0.5, chaos_growth=math.inf)  # late flips of a hypergradient's sign are noise here


def search_first(task: Task, c: Cost, strategy: Any, runs: int = 1) -> Trace:
    """What stands after each of the runs that follow the search; of the task's start the lr alone is kept.

    Every further run begins with a new model where the one before has learned, and has other orders of the batches.
    """
    spent, hyper, trace = *beginning(task, c, strategy), []
    for k in range(runs):
        now = falling(reordered(task, k), hyper)
        at, result = tuned(now, c, strategy, guard=CAREFUL, outer=outer.adam(THEN))
        spent += at.runs
        trace.append(at._replace(runs=spent))
        hyper = result.learned
    return standing(trace)


def again(task: Task, c: Cost, strategy: Any) -> Trace:
    """One run after the search, five times, with other orders of the batches: what of a spread over starts is chance."""
    return [search_first(reordered(task, k), c, strategy)[-1] for k in range(ORDERS)]


def fixed(task: Task, c: Cost, strategy: Any) -> Point:
    """The control: the run after the search with nothing tuned in it."""
    spent, hyper = beginning(task, c, strategy)
    now = falling(task, hyper)
    return point(task, spent * task.steps + task.steps, train(now, now.space.phi0))


def reordered(task: Task, k: int) -> Task:
    """The task with the batches of k runs later."""
    return replace(task, batch=lambda t: task.batch(t + k * task.steps))


def length(task: Task) -> int:
    """Steps of the search."""
    return round(SHARE * task.steps)


def beginning(
    task: Task, c: Cost, strategy: Any, peak: float = PEAK, penalty: float = PENALTY
) -> tuple[float, dict[str, Any]]:
    """What the search costs, in runs of the task, and where the run proper begins."""
    cost, found = search(task, c, strategy)
    begun = {name: penalty for name in task.space if name in PENALTIES}
    return cost * length(task) / task.steps, found | begun | {"lr": peak * found["lr"]}


def one_rate(task: Task) -> Task:
    """The task, whose lr has knots, with one lr to search for."""
    return replace(task, space=Space(**{**task.space, "lr": log(0.01)}))


def then_knots(task: Task, c: Cost, c_one: Cost, strategy: Any, peak: float = PEAK, penalty: float = PENALTY) -> Point:
    """A search for one rate, whose steps cost c_one, then a run of the task, whose lr has knots, begun as half a cosine."""
    spent, hyper = beginning(one_rate(task), c_one, strategy, peak, penalty)
    at, _ = tuned(half_cosine(task, hyper), c, strategy, outer=outer.adam(THEN))
    return at._replace(runs=spent + at.runs)


def half_cosine(task: Task, hyper: dict[str, Any]) -> Task:
    """The task from these hyperparameters, the knots of its lr begun as half a cosine under hyper's, with a hundredth at
    its end."""
    knots = task.space["lr"].knots
    share = 0.5 + 0.5 * np.cos(np.pi * np.array(knots) / task.steps)
    lr = log(hyper["lr"] * np.maximum(share, 0.01), bounds=task.space["lr"].bounds, knots=knots)
    momentum = logit(hyper["momentum"], bounds=MOMENTUM)
    rest = {name: value for name, value in hyper.items() if name != "lr"}
    return replace(task, space=Space(**{**task.space.replace(**rest), "lr": lr, "momentum": momentum}))


def search(task: Task, c: Cost, strategy: Any) -> tuple[float, dict[str, Any]]:
    """What the search costs, in runs of its length, and the hyperparameters that it finds."""
    space = Space(**{**task.space, "momentum": logit(START, bounds=MOMENTUM)})
    short = replace(task, space=space, steps=length(task), window=max(1, length(task) // WINDOWS))
    at, result = tuned(short, c, strategy, guard=replace(CAREFUL, again=1.0), outer=outer.adam(RATE))
    return at.runs, result.learned


def falling(task: Task, hyper: dict[str, Any]) -> Task:
    """The task from these hyperparameters, its lr falling linearly to zero."""
    lr = log(hyper["lr"], bounds=task.space["lr"].bounds, knots=(0, task.steps), factors=(1, 0))
    momentum = logit(hyper["momentum"], bounds=MOMENTUM)
    return replace(task, space=Space(**{**task.space.replace(**hyper), "lr": lr, "momentum": momentum}))
