"""Search first, then train: a short online run finds where to begin and is thrown away; training begins anew from there.

After the search lr falls linearly to zero, and what is tuned is the decay's height: the recipe of docs/tuning.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from koopman_hpo import Guard, History, Space, log, logit, outer

from .methods import Cost, Trace, standing, tuned
from .tasks import Task

Array = np.ndarray
# the recipe's; THEN, and what is handed on, were chosen on seeds 20 to 22
SHARE, WINDOWS, RATE = 1 / 3, 20, 0.5  # of the run that the search takes, moves in it, and their size
THEN = 0.25  # the size of moves in the run proper: twice the default
ORDERS = 5
RUNS = 3  # that one may well make after a search: together a third of what 20 random runs cost
START, MOMENTUM = 0.5, (0.1, 0.9)  # of momentum: a long memory undoes what lr does about noise
CAREFUL = Guard(again=0.3, excess=0.5, chaos_growth=math.inf)  # late flips of a hypergradient's sign are noise here


def search_first(task: Task, c: Cost, strategy: Any, runs: int = 1) -> Trace:
    """What stands after each of the runs that follow the search; of the task's start the lr alone is kept, and its penalty.

    Every run begins with a new model where the one before has learned, and has other orders of the batches.
    """
    found, hyper = search(task, c, strategy)
    spent, trace = found * length(task) / task.steps, []
    for k in range(runs):
        now = falling(reordered(task, k), hyper)
        at, result = tuned(now, c, strategy, guard=CAREFUL, outer=outer.adam(THEN))
        spent += at.runs
        trace.append(at._replace(runs=spent))
        hyper = learned(now, result.history)
    return standing(trace)


def again(task: Task, c: Cost, strategy: Any) -> Trace:
    """One run after the search, five times, with other orders of the batches: what of a spread over starts is chance."""
    return [search_first(reordered(task, k), c, strategy)[-1] for k in range(ORDERS)]


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
    return at.runs, learned(short, result.history)


def learned(task: Task, history: History) -> dict[str, Any]:
    """The hyperparameters with which a run of the task has learned most."""
    before = float(task.model.outer(task.model.params, {}, task.val)[0])
    return task.space.natural(task.space.clip(where_it_learned(history, before)))


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
