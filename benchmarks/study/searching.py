"""Search first, then train: a short online run finds where to begin and is thrown away; training begins anew from there.

In the second run lr falls linearly to zero, and what is tuned is the decay's height: the recipe of docs/tuning.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from koopman_hpo import Guard, History, Space, log, logit, outer

from .methods import Cost, Point, Trace, tuned
from .tasks import Task

Array = np.ndarray
# the recipe's; THEN, and what is handed on, were chosen on seeds 20 to 22
SHARE, WINDOWS, RATE = 1 / 3, 20, 0.5  # of the run that the search takes, moves in it, and their size
THEN = 0.25  # the size of moves in the run proper: twice the default
ORDERS = 5
START, MOMENTUM = 0.5, (0.1, 0.9)  # of momentum: a long memory undoes what lr does about noise
CAREFUL = Guard(again=0.3, excess=0.5, chaos_growth=math.inf)  # late flips of a hypergradient's sign are noise here


def search_first(task: Task, c: Cost, strategy: Any) -> Point:
    """The model of the second run, at the cost of both.  Of the task's start the lr alone is kept, and its penalty."""
    before, hyper = search(task, c, strategy)
    at, _ = tuned(falling(task, hyper), c, strategy, guard=CAREFUL, outer=outer.adam(THEN))
    return at._replace(runs=before * length(task) / task.steps + at.runs)


def again(task: Task, c: Cost, strategy: Any) -> Trace:
    """The same five times, with other orders of the batches: what of a spread over starts is chance."""
    return [search_first(reordered(task, k), c, strategy) for k in range(ORDERS)]


def reordered(task: Task, k: int) -> Task:
    """The task with the batches of k runs later."""
    return replace(task, batch=lambda t: task.batch(t + k * task.steps))


def length(task: Task) -> int:
    """Steps of the search."""
    return round(SHARE * task.steps)


def search(task: Task, c: Cost, strategy: Any) -> tuple[float, dict[str, Any]]:
    """What the search costs, in runs of its length, and the hyperparameters that it finds."""
    space = Space(**{**task.space, "momentum": logit(START, bounds=MOMENTUM)})
    short = replace(task, space=space, steps=length(task), window=max(1, length(task) // WINDOWS))
    at, result = tuned(short, c, strategy, guard=replace(CAREFUL, again=1.0), outer=outer.adam(RATE))
    before = float(task.model.outer(task.model.params, {}, task.val)[0])
    return at.runs, space.natural(space.clip(where_it_learned(result.history, before)))


def where_it_learned(history: History, start: float) -> Array:
    """(q,) the mean of phi over the windows, weighed by how far each has taken the logarithm of the validation loss below
    all before it; `start` is the loss before training.  The last phi where it never fell.

    Once a constant lr has learned what it can, the hypergradient asks to average out the noise: the last lr may be too low.
    """
    values = np.where(np.isfinite(history.value), history.value, np.inf)
    lowest = np.minimum.accumulate(np.concatenate([[start], values]))
    gained = -np.diff(np.log(lowest))
    return gained @ history.phi / gained.sum() if gained.sum() > 0 else history.phi[-1]


def falling(task: Task, hyper: dict[str, Any]) -> Task:
    """The task from these hyperparameters, its lr falling linearly to zero."""
    lr = log(hyper["lr"], bounds=task.space["lr"].bounds, knots=(0, task.steps), factors=(1, 0))
    momentum = logit(hyper["momentum"], bounds=MOMENTUM)
    return replace(task, space=Space(**{**task.space.replace(**hyper), "lr": lr, "momentum": momentum}))
