"""Search first, then train, as `koopman_hpo.search_first` does it, with what each part costs; controls; and the same before
a schedule of knots.

After the search lr falls linearly to zero from a multiple of what was found, and what is tuned is the decay's height.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from koopman_hpo import Space, log, outer, recipe

from .methods import Cost, Point, Trace, point, standing, train, tuned
from .tasks import Task

ORDERS = 5
RUNS = 3  # that one may well make after a search: with it they cost 5 to 12 plain runs, by task


def search_first(task: Task, c: Cost, strategy: Any, runs: int = 1) -> Trace:
    """What stands after each of the runs that follow the search; of the task's start the lr alone is kept.

    Every further run begins with a new model where the one before has learned, and has other orders of the batches.
    """
    spent, begun = beginning(task, c, strategy)
    trace = []
    for k in range(runs):
        at, result = tuned(reordered(begun, k), c, strategy, guard=recipe.CAREFUL, outer=outer.adam(recipe.THEN))
        spent += at.runs
        trace.append(at._replace(runs=spent))
        begun = begun.starting(**result.learned)
    return standing(trace)


def again(task: Task, c: Cost, strategy: Any) -> Trace:
    """One run after the search, five times, with other orders of the batches: what of a spread over starts is chance."""
    return [search_first(reordered(task, k), c, strategy)[-1] for k in range(ORDERS)]


def fixed(task: Task, c: Cost, strategy: Any) -> Point:
    """The control: the run after the search with nothing tuned in it."""
    spent, begun = beginning(task, c, strategy)
    return point(task, spent * task.steps + task.steps, train(begun, begun.space.phi0))


def reordered(task: Task, k: int) -> Task:
    """The task with the batches of k runs later."""
    return replace(task, batch=lambda t: task.batch(t + k * task.steps))


def length(task: Task) -> int:
    """Steps of the search."""
    return round(recipe.SHARE * task.steps)


def beginning(task: Task, c: Cost, strategy: Any) -> tuple[float, Task]:
    """What the search costs, in runs of the task, and the task from where the run proper begins."""
    cost, found = search(task, c, strategy)
    return cost * length(task) / task.steps, replace(task, space=recipe.falling(task.space, found, task.steps))


def search(task: Task, c: Cost, strategy: Any) -> tuple[float, dict[str, Any]]:
    """What the search costs, in runs of its length, and the hyperparameters that it finds."""
    steps = length(task)
    short = replace(task, space=recipe.searching(task.space), steps=steps, window=recipe.window(steps))
    at, result = tuned(short, c, strategy, guard=recipe.SEARCHING, outer=outer.adam(recipe.RATE))
    return at.runs, result.learned


# -- before a schedule ---------------------------------------------------------------------------------------------


def one_rate(task: Task) -> Task:
    """The task, whose lr has knots, with one lr to search for."""
    return replace(task, space=Space(**{**task.space, "lr": log(0.01)}))


def then_knots(
    task: Task, c: Cost, c_one: Cost, strategy: Any, peak: float = recipe.PEAK, penalty: float = recipe.PENALTY
) -> Point:
    """A search for one rate, whose steps cost c_one, then a run of the task, whose lr has knots, begun as half a cosine."""
    one = one_rate(task)
    cost, found = search(one, c_one, strategy)
    height = recipe.falling(one.space, found, task.steps, peak=peak, penalty=penalty)
    at, _ = tuned(half_cosine(task, height), c, strategy, outer=outer.adam(recipe.THEN))
    return at._replace(runs=cost * length(task) / task.steps + at.runs)


def half_cosine(task: Task, height: Space) -> Task:
    """The task from these starts, the knots of its lr begun as half a cosine under height's, a hundredth at the end."""
    lr = task.space["lr"]
    share = 0.5 + 0.5 * np.cos(np.pi * np.array(lr.knots) / task.steps)
    begun = replace(lr, value=height["lr"].value * np.maximum(share, 0.01))
    return replace(task, space=Space(**{**height, "lr": begun}))
