"""Methods that tune a learning rate within one run: hypergradient descent, and Prodigy where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from .methods import Point, point
from .tasks import Task

Array = np.ndarray
HAS_PRODIGY = find_spec("prodigyopt") is not None and find_spec("torch") is not None
RATE = 0.3  # of hypergradient descent's multiplicative rule


def gradient(task: Task) -> Callable[[Array, int], tuple[float, Array]]:
    """(theta, t) -> the loss on the batch of step t and its gradient, with the penalty that the task starts from."""
    natural = task.space.natural(task.space.phi0)
    hyper = {name: natural[name] for name in task.model.hyper if name in natural}
    still, decay = {name: np.zeros((0, *np.shape(x))) for name, x in hyper.items()}, natural.get("weight_decay", 0.0)

    def at(theta: Array, t: int) -> tuple[float, Array]:
        loss, g, _ = task.model.grad_jvp(theta, hyper, np.zeros((0, theta.size), theta.dtype), still, task.batch(t))
        return loss, g + decay * theta

    return at


def hypergradient_descent(task: Task, rate: float = RATE) -> Point:
    """Baydin et al. 2018, multiplicative rule, under momentum: `lr *= 1 + rate cos(g_t, u_{t-1})`, u the last direction."""
    phi, at = task.space.natural(task.space.phi0), gradient(task)
    lr, momentum, theta = phi["lr"], phi["momentum"], task.model.params.copy()
    u = np.zeros_like(theta)
    with np.errstate(all="ignore"):
        for t in range(task.steps):
            loss, g = at(theta, t)
            if not math.isfinite(loss):
                return point(task, task.steps, task.failed)
            size = np.linalg.norm(g) * np.linalg.norm(u)
            lr *= 1 + rate * float(g @ u) / size if size > 0 else 1.0
            u = momentum * u + g
            theta -= lr * u
    return point(task, task.steps, task.quality(theta))


def prodigy(task: Task, cosine: bool) -> Point:
    """Prodigy with its defaults and lr 1, constant or along half a cosine (as its authors advise).

    It works on the flat parameters with the model's own gradient; a step is counted as a plain one.
    """
    import torch
    from prodigyopt import Prodigy

    at, theta = gradient(task), torch.from_numpy(task.model.params.copy()).requires_grad_()
    optimizer = Prodigy([theta], lr=1.0)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps) if cosine else None
    for t in range(task.steps):
        loss, g = at(theta.detach().numpy(), t)
        if not math.isfinite(loss):
            return point(task, task.steps, task.failed)
        theta.grad = torch.from_numpy(g)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return point(task, task.steps, task.quality(theta.detach().numpy()))
