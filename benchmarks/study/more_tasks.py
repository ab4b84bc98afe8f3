"""Further runs to be tuned: a small LeNet and a recurrent network, both in JAX, and a regression on a table.

All under SGD with momentum; lr, momentum and an L2 penalty are tuned, from boxes as on KMNIST.  Then two MLPs in JAX whose
training loss has ten hyperparameters, which alone are tuned; with 300 images they overfit, and training stops early.
"""

from __future__ import annotations

import pathlib
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import Space, log

from . import problems
from .tasks import Feed, Task, first, images, noised, searched


@cache
def _compiled(module: str, name: str, seed: int) -> Any:
    """A model of `networks` or `auxiliary`, which need JAX, made once a process: compiling takes longer than a run."""
    return getattr(import_module(f".{module}", __package__), name)(seed)


def lenet(data: pathlib.Path, seed: int, steps: int = 600, of: str = "mnist") -> Task:
    """A LeNet of 3,012 parameters on MNIST or KMNIST pooled to 14x14: 1,000 images to train, 200 to validate, 2,000 to
    test."""
    raw, y = problems.pictures(of, data)
    order = np.random.default_rng(seed).permutation(len(y))
    X = problems.standardised(problems.pooled(raw, 2)).reshape(-1, 14, 14, 1).astype(np.float32)
    train, val, test = ((X[rows], y[rows].astype(np.int32)) for rows in np.split(order[:3200], (1000, 1200)))
    return Task(_compiled("networks", "lenet", seed), *searched("weight_decay"), steps, Feed(train, 32, seed), val, test)


def characters(data: Any, seed: int, steps: int = 800) -> Task:
    """An Elman network that predicts the next of 40 characters; needs no data but Python's help texts."""
    from .networks import CHARACTERS, unseen

    model, (train, val) = _compiled("networks", "characters", seed)
    batch, test = Feed(train, 32, seed), unseen(seed, 500)
    return Task(model, *searched("weight_decay"), steps, batch, val, test, classes=CHARACTERS)


def tabular(data: Any, seed: int, steps: int = 2000) -> Task:
    """Diabetes: ten columns, an MLP 10-20-1 and half the squared error; 221 patients to train, 110 and 111 held out."""
    (X, y), (more, z) = problems.diabetes(problems.Case("tabular", 1.0, seed))
    X, y = np.concatenate([X, more]), np.concatenate([y, z])
    train, val, test = ((X[a:b], y[a:b]) for a, b in ((0, 221), (221, 331), (331, 442)))
    model = mlp((10, 20, 1), loss="squared_error", seed=seed)
    return Task(model, *searched(), steps, Feed(train, 32, seed), val, test, classes=None)


def few(data: pathlib.Path, seed: int, n: int, share: float) -> list[tuple[Any, Any]]:
    """n images of KMNIST pooled to 14x14, a share of their labels random, and those to validate and to test."""
    d = images(data, seed, first(n), pool=2)
    train = d.X[d.train], noised(d.y[d.train], share, seed)
    return [(X.reshape(-1, 14, 14).astype(np.float32), y.astype(np.int32)) for X, y in (train, d.val, d.test)]


def augmentation(data: pathlib.Path, seed: int, steps: int = 1000, n: int = 300) -> Task:
    """Strengths of ten augmentations of 300 images."""
    train, val, test = few(data, seed, n, 0.0)
    plain = Feed(train, 32, seed)

    def batch(t: int) -> tuple[Any, ...]:
        rng, (X, y) = np.random.default_rng((seed, 1, t)), plain(t)
        draws, noise = rng.normal(size=(len(y), 10)), rng.normal(size=X.shape)
        return X, y, draws.astype(np.float32), noise.astype(np.float32)

    space = Space(strengths=log(np.full(10, 0.1), bounds=(1e-3, 3.0)))
    return _alone("augmentation", space, {"strengths": (0.01, 3.0)}, seed, steps, batch, val, test)


def weighted(data: pathlib.Path, seed: int, steps: int = 1000, n: int = 300) -> Task:
    """Weights of ten further terms of the loss, some of use and some not; 300 images, 30 % of their labels random.

    They begin high: a window sees which of them to take back, and not which would pay later.
    """
    train, val, test = few(data, seed, n, 0.3)
    rng = np.random.default_rng((seed, 2))
    meaningless = rng.normal(size=(n, 49)).astype(np.float32)
    batch = Feed((*train, meaningless, rng.integers(0, 10, n).astype(np.int32)), 32, seed)
    space = Space(weights=log(np.full(10, 1.0), bounds=(1e-5, 10.0)))
    return _alone("weighted", space, {"weights": (1e-4, 10.0)}, seed, steps, batch, val, test)


def _alone(name: str, space: Space, box: Any, seed: int, steps: int, batch: Any, val: Any, test: Any) -> Task:
    """A model of `auxiliary` of whose training nothing else is tuned."""
    fixed = {"lr": 0.03, "momentum": 0.9}
    return Task(_compiled("auxiliary", name, seed), space, box, steps, batch, val, test, fixed, stops=True)
