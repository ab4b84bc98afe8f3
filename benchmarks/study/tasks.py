"""Training runs to be tuned: a model, its data, what is tuned and where, all made from one seed.

Those here: KMNIST (or MNIST) pooled to 7x7, an MLP 49-32-10 under SGD with momentum; other models are in `more_tasks`.  The
test set is seen by nobody but the report.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import Space, inner, log, logit

from .problems import Batch, pictures, pooled, standardised

Array = np.ndarray
CLASSES, SIZES, MOST_TRAIN, VALIDATE, TEST = 10, (49, 32, 10), 4000, 500, 5000


class Quality(NamedTuple):
    """Of a trained model; infinite losses where training diverged."""

    val: float
    test: float
    accuracy: float  # on test examples; of a regression, the share of the variance explained


@dataclass(frozen=True)
class Task:
    """A run to be tuned.  `box`, {name: natural (low, high)}, is where black-box methods search, uniformly in phi."""

    model: Any
    space: Space
    box: Mapping[str, tuple[float, float]]
    steps: int
    batch: Callable[[int], Any]
    val: Batch
    test: Batch
    fixed: Mapping[str, Any] = field(default_factory=dict)  # of the inner optimizer
    options: Mapping[str, Any] = field(default_factory=dict)  # of the inner run
    oracle: Mapping[str, Any] = field(default_factory=dict)  # values known to be good, where the task has them
    window: int = 25
    classes: int | None = CLASSES  # of the labels; None: a regression
    stops: bool = False  # early stopping: of a run stands the window's end with the lowest validation loss

    @property
    def chance(self) -> float:
        """The loss of even odds, or of the mean: what a model that has diverged counts as."""
        return math.log(self.classes) if self.classes else float(np.var(self.test[1])) / 2

    @property
    def failed(self) -> Quality:
        return Quality(np.inf, np.inf, 1 / self.classes if self.classes else 0.0)

    def run(self) -> Any:
        """An `Inner` at its start."""
        return inner.sgd(self.model, self.space, **self.fixed, **self.options)

    def starting(self, **natural: Any) -> Task:
        return replace(self, space=self.space.replace(**natural))

    def bounds(self) -> tuple[Array, Array]:
        """(q,) and (q,): the box in phi."""
        sides = np.empty((2, self.space.q))
        for name, ends in self.box.items():
            for side, end in zip(sides, ends, strict=True):
                side[self.space.where(name)] = self.space[name].transform.to_phi(np.float64(end))
        return sides[0], sides[1]

    def quality(self, params: Array) -> Quality:
        if not np.isfinite(params).all():
            return self.failed
        with np.errstate(all="ignore"):
            val, test = (float(self.model.outer(params, {}, d)[0]) for d in (self.val, self.test))
        val = val if np.isfinite(val) else np.inf
        if not np.isfinite(test):
            return self.failed._replace(val=val)
        return Quality(val, test, self.model.accuracy(params, *self.test) if self.classes else 1 - test / self.chance)


class Images(NamedTuple):
    """One seed's split: all images, flat, each pixel scaled by all of them, labels, positions of the training images."""

    X: Array
    y: Array
    train: Array
    val: Batch
    test: Batch


def images(data: pathlib.Path, seed: int, pick: Callable[[Array], Array], of: str = "kmnist", pool: int = 4) -> Images:
    """KMNIST or MNIST in the seed's order: `pick` takes training positions from the labels of the first 4,000."""
    raw, y = pictures(of, data)
    order = np.random.default_rng(seed).permutation(len(y))
    X, y = standardised(pooled(raw, pool)[order]), y[order]
    part = lambda a, b: (X[a:b], y[a:b])
    val, test = part(MOST_TRAIN, MOST_TRAIN + VALIDATE), part(len(y) - TEST, len(y))
    return Images(X, y, pick(y[:MOST_TRAIN]), val, test)


def first(n: int) -> Callable[[Array], Array]:
    return lambda y: np.arange(n)


class Feed:
    """The batch of a step, whoever asks: an epoch is drawn without replacement."""

    def __init__(self, arrays: tuple[Array, ...], size: int, seed: int):
        self.arrays, self.size, self.seed = arrays, size, seed
        self._orders: dict[int, Array] = {}

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self.arrays[0]) // self.size

    def __call__(self, t: int) -> tuple[Array, ...]:
        epoch, k = divmod(t, self.steps)
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.arrays[0]))
        rows = self._orders[epoch][k * self.size : (k + 1) * self.size]
        return tuple(a[rows] for a in self.arrays)


def wrong(y: Array, where: Array, seed: int) -> Array:
    """Labels, random ones at the positions `where` (boolean)."""
    labels, rng = y.copy(), np.random.default_rng(1000 + seed)
    labels[where] = rng.integers(0, CLASSES, where.sum())
    return labels


def noised(y: Array, share: float, seed: int) -> Array:
    """Labels, a share of them random."""
    return wrong(y, np.random.default_rng(2000 + seed).random(len(y)) < share, seed)


def searched(penalty: str = "l2") -> tuple[Space, dict[str, tuple[float, float]]]:
    """lr, momentum and a penalty: where they start, and the box."""
    space = Space(lr=log(0.01), momentum=logit(0.9), **{penalty: log(1e-4)})
    return space, {"lr": (1e-4, 10.0), "momentum": (0.01, 0.99), penalty: (1e-6, 0.1)}


def plain(data: pathlib.Path, seed: int, noise: float = 0.0, n: int = 2000, size: int = 64, of: str = "kmnist") -> Task:
    """lr, momentum and L2, over 2,000 steps; a share of the training labels random."""
    d = images(data, seed, first(n), of)
    return Task(
        mlp(SIZES, seed=seed),
        *searched(),
        2000,
        Feed((d.X[d.train], noised(d.y[d.train], noise, seed)), size, seed),
        d.val,
        d.test,
    )


def noisy(data: pathlib.Path, seed: int) -> Task:
    """The same with 1,000 training images, 30 % of their labels random."""
    return plain(data, seed, 0.3, 1000, 32)


def sources(data: pathlib.Path, seed: int, q: int, directions: int | None = None) -> Task:
    """One weight a source: 1,000 training images come from q sources; half of the sources know no label."""
    n = 1000
    d = images(data, seed, first(n))
    source = np.arange(n) * q // n
    bad = np.random.default_rng(2000 + seed).permutation(q) < q // 2
    labels = wrong(d.y[d.train], bad[source], seed)
    return Task(
        mlp(SIZES, seed=seed),
        Space(example_weights=log(np.ones(q), bounds=(1e-3, 3.0))),
        {"example_weights": (1e-3, 3.0)},
        500,
        Feed((d.X[d.train], labels, source), 50, seed),
        d.val,
        d.test,
        fixed={"lr": 0.03, "momentum": 0.9},
        options={} if directions is None else {"directions": directions},
        oracle={"example_weights": np.where(bad, 1e-3, 1.0)},
    )


def long_tailed(y: Array, most: int = 300, ratio: float = 50.0) -> Array:
    """Positions of fewer and fewer examples a class: from `most` down to most / ratio, geometrically."""
    counts = np.round(most * ratio ** -np.linspace(0, 1, CLASSES)).astype(int)
    return np.concatenate([np.flatnonzero(y == c)[:k] for c, k in enumerate(counts)])


def imbalanced(data: pathlib.Path, seed: int, layers: bool = False) -> Task:
    """Long-tailed classes, validated and tested on balanced ones: a weight a class, or these and lr and L2 a layer."""
    d = images(data, seed, long_tailed)
    space = {"class_weights": log(np.ones(CLASSES), bounds=(1e-2, 1e2))}
    box = {"class_weights": (0.1, 10.0)}
    fixed: dict[str, Any] = {"momentum": 0.9, "lr": 0.02}
    if layers:
        space |= {"lr": log([0.02, 0.02]), "l2": log([1e-4, 1e-4])}
        box |= {"lr": (1e-4, 1.0), "l2": (1e-6, 0.1)}
        del fixed["lr"]
    batch = Feed((d.X[d.train], d.y[d.train]), 32, seed)
    return Task(mlp(SIZES, seed=seed), Space(**space), box, 1000, batch, d.val, d.test, fixed)


def scheduled(data: pathlib.Path, seed: int) -> Task:
    """Noisy labels; lr with 8 knots over 1,000 steps, momentum and L2."""
    task, steps = noisy(data, seed), 1000
    knots = [round(x) for x in np.linspace(0, steps, 8)]
    space = Space(lr=log(np.full(8, 0.01), knots=knots), momentum=logit(0.9), l2=log(1e-4))
    return replace(task, space=space, steps=steps, box=task.box | {"lr": (1e-4, 1.0)})
