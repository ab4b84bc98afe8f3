"""Further runs to be tuned: a small LeNet and a recurrent network, both in JAX, and a regression on a table.

All under SGD with momentum; lr, momentum and an L2 penalty are tuned, from boxes as on KMNIST.
"""

from __future__ import annotations

import pathlib
from functools import cache
from typing import Any

import numpy as np
from koopman_hpo_adapters.numpy import mlp

from . import problems
from .tasks import Task, feed, searched


@cache
def _compiled(name: str, seed: int) -> Any:
    """A model of `networks`, made once a process: compiling takes longer than a run."""
    from . import networks

    return getattr(networks, name)(seed)


def lenet(data: pathlib.Path, seed: int, steps: int = 600) -> Task:
    """A LeNet of 3,012 parameters on MNIST pooled to 14x14: 1,000 images to train, 200 to validate, 2,000 to test."""
    images, y = problems.mnist(data)
    order = np.random.default_rng(seed).permutation(len(y))
    X = problems.standardised(problems.pooled(images, 2)).reshape(-1, 14, 14, 1).astype(np.float32)
    train, val, test = ((X[rows], y[rows].astype(np.int32)) for rows in np.split(order[:3200], (1000, 1200)))
    return Task(_compiled("lenet", seed), *searched("weight_decay"), steps, feed(train, 32, seed), val, test)


def characters(data: Any, seed: int, steps: int = 800) -> Task:
    """An Elman network that predicts the next of 40 characters; needs no data but Python's help texts."""
    from .networks import CHARACTERS, unseen

    model, (train, val) = _compiled("characters", seed)
    batch, test = feed(train, 32, seed), unseen(seed, 500)
    return Task(model, *searched("weight_decay"), steps, batch, val, test, classes=CHARACTERS)


def tabular(data: Any, seed: int, steps: int = 2000) -> Task:
    """Diabetes: ten columns, an MLP 10-20-1 and half the squared error; 221 patients to train, 110 and 111 held out."""
    (X, y), (more, z) = problems.diabetes(problems.Case("tabular", 1.0, seed))
    X, y = np.concatenate([X, more]), np.concatenate([y, z])
    train, val, test = ((X[a:b], y[a:b]) for a, b in ((0, 221), (221, 331), (331, 442)))
    model = mlp((10, 20, 1), loss="squared_error", seed=seed)
    return Task(model, *searched(), steps, feed(train, 32, seed), val, test, classes=None)
