"""Methods that tune a learning rate within one run: hypergradient descent, and Prodigy where it is installed."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from .methods import Point, point
from .tasks import CLASSES, Quality, Task

HAS_PRODIGY = find_spec("prodigyopt") is not None and find_spec("torch") is not None
RATE = 0.3  # of hypergradient descent's multiplicative rule


def hypergradient_descent(task: Task, rate: float = RATE) -> Point:
    """Baydin et al. 2018, multiplicative rule, under momentum: `lr *= 1 + rate cos(g_t, u_{t-1})`, u the last direction."""
    phi = task.space.natural(task.space.phi0)
    lr, momentum, theta = phi["lr"], phi["momentum"], task.model.params.copy()
    none, u = np.zeros((0, theta.size)), np.zeros_like(theta)
    with np.errstate(all="ignore"):
        for t in range(task.steps):
            loss, g, _ = task.model.grad_jvp(theta, {"l2": phi["l2"]}, none, {"l2": np.zeros(0)}, task.batch(t))
            if not math.isfinite(loss):
                return point(task, task.steps, Quality(math.inf, math.inf, 1 / CLASSES))
            size = np.linalg.norm(g) * np.linalg.norm(u)
            lr *= 1 + rate * float(g @ u) / size if size > 0 else 1.0
            u = momentum * u + g
            theta -= lr * u
    return point(task, task.steps, task.quality(theta))


def prodigy(task: Task, cosine: bool) -> Point:
    """Prodigy with its defaults and lr 1, constant or along half a cosine (as its authors advise), in torch.

    The same network, initial weights, batches and L2; a step is counted as a plain one.
    """
    import torch
    from prodigyopt import Prodigy

    torch.set_num_threads(1)
    weights, at = [], 0
    for a, b in pairwise(task.model.sizes):
        for shape in ((a, b), (b,)):
            size = math.prod(shape)
            weights.append(torch.tensor(task.model.params[at : at + size].reshape(shape), requires_grad=True))
            at += size
    optimizer = Prodigy(weights, lr=1.0, decouple=False, weight_decay=task.space.natural(task.space.phi0)["l2"])
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps) if cosine else None
    for t in range(task.steps):
        X, y = (torch.from_numpy(np.ascontiguousarray(a)) for a in task.batch(t))
        for i in range(0, len(weights), 2):
            X = X @ weights[i] + weights[i + 1]
            X = torch.tanh(X) if i + 2 < len(weights) else X
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(X, y).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return point(task, task.steps, task.quality(np.concatenate([w.detach().numpy().ravel() for w in weights])))
