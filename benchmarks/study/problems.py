"""The training runs whose hypergradients are forecast: models, data, batches.  Everything random has the case's seed.

A `Case` names a run; `start(case, data)` begins it.  Letters as in the library; q = 3: a learning rate, a momentum (beta1
under Adam), an L2 penalty or weight decay.
"""

from __future__ import annotations

import gzip
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from koopman_hpo_adapters.numpy import mlp, softmax_regression

from koopman_hpo import Space, inner, log, logit

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One training run."""

    problem: str
    lr: float
    seed: int
    size: int | None = None  # of a batch; None: full batch
    noise: float = 0.0  # share of random labels in training
    optimizer: str = "sgd"

    @property
    def name(self) -> str:
        batch = "full" if self.size is None else str(self.size)
        return f"{self.problem}-{self.optimizer}-{batch}-{self.noise:g}-{self.lr:g}-{self.seed}"


class Started(NamedTuple):
    """A run at its start and what feeds it."""

    run: Any  # Inner
    train: Batch  # the whole training set
    val: Batch
    batch: Callable[[int], Batch]  # of a step
    epoch: list[Batch] | None  # the batches of one epoch; None in full batch


def standardised(X: np.ndarray) -> np.ndarray:
    return (X - X.mean()) / X.std()


def split(X: np.ndarray, y: np.ndarray, case: Case, n: int, validate: int = 500) -> tuple[Batch, Batch]:
    """n training examples, a share of their labels random, and `validate` others."""
    rng = np.random.default_rng(case.seed)
    order = rng.permutation(len(X))
    train, val, labels = order[:n], order[n : n + validate], y[order[:n]].copy()
    wrong = rng.random(n) < case.noise
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    return (X[train], labels), (X[val], y[val])


def pooled(images: np.ndarray, by: int) -> np.ndarray:
    """Images (n, 28, 28) as means over squares of `by` pixels, flat."""
    n, side = len(images), 28 // by
    return images.reshape(n, side, by, side, by).mean(axis=(2, 4)).reshape(n, -1) / 255.0


def idx(path: pathlib.Path, header: int) -> np.ndarray:
    """The bytes of a gzipped idx file."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def mnist(data: pathlib.Path) -> Batch:
    images = idx(data / "mnist-t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    return images, idx(data / "mnist-t10k-labels-idx1-ubyte.gz", 8).astype(int)


def kmnist(data: pathlib.Path) -> Batch:
    images, labels = (np.load(data / f"kmnist-test-{k}.npz")["arr_0"] for k in ("imgs", "labels"))
    return images.reshape(-1, 28, 28), labels.astype(int)


def pictures(of: str, data: pathlib.Path) -> Batch:
    """The 10,000 images (n, 28, 28) and labels of "kmnist" or "mnist"."""
    return {"kmnist": kmnist, "mnist": mnist}[of](data)


def digits(case: Case) -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return split(standardised(X), y, case, 800)


def diabetes(case: Case) -> tuple[Batch, Batch]:
    """Ten columns and their products, one target, all standardised: scikit-learn's diabetes, 300 and 142 patients."""
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    X, y = (X - X.mean(axis=0)) / X.std(axis=0), standardised(y)[:, None]
    order = np.random.default_rng(case.seed).permutation(len(X))
    return (X[order[:300]], y[order[:300]]), (X[order[300:]], y[order[300:]])


def ridge(case: Case) -> tuple[Batch, Batch]:
    """A linear model with correlated columns: 200 examples, 40 columns, condition 1,000, noise of half the signal."""
    rng = np.random.default_rng(case.seed)
    scales = np.geomspace(1.0, 1000**-0.5, 40)
    X = rng.normal(size=(400, 40)) * scales
    y = X @ (rng.normal(size=40) / np.sqrt(scales))
    y = ((y + 0.5 * y.std() * rng.normal(size=400)) / y.std())[:, None]
    return (X[:200], y[:200]), (X[200:], y[200:])


def feed(train: Batch, size: int | None, seed: int) -> Callable[[int], Batch]:
    """The batch of a step: an epoch is drawn without replacement."""
    X, y = train
    if size is None:
        return lambda t: train

    def batch(t: int) -> Batch:
        epoch, k = divmod(t, len(y) // size)
        order = np.random.default_rng((seed, epoch)).permutation(len(y))[k * size : (k + 1) * size]
        return X[order], y[order]

    return batch


def _softmax(case: Case, data: Any) -> Any:
    return softmax_regression(64, 10, seed=case.seed), digits(case)


def _mlp(case: Case, data: Any) -> Any:
    return mlp((64, 32, 10), seed=case.seed), digits(case)


def _ridge(case: Case, data: Any) -> Any:
    return mlp((40, 1), loss="squared_error", seed=case.seed), ridge(case)


def _tabular(case: Case, data: Any) -> Any:
    return mlp((10, 20, 1), loss="squared_error", seed=case.seed), diabetes(case)


def _kmnist(case: Case, data: Any) -> Any:
    images, y = kmnist(data)
    return mlp((196, 64, 10), seed=case.seed), split(standardised(pooled(images, 2)), y, case, 2000)


def _cnn(case: Case, data: Any) -> Any:
    from .networks import lenet

    images, y = mnist(data)
    X = standardised(pooled(images, 2)).reshape(-1, 14, 14, 1).astype(np.float32)
    return lenet(case.seed), split(X, y.astype(np.int32), case, 1000, 150)


def _characters(case: Case, data: Any) -> Any:
    from .networks import characters

    return characters(case.seed)


MODELS: dict[str, Callable[[Case, Any], Any]] = {
    "softmax": _softmax,
    "mlp": _mlp,
    "ridge": _ridge,
    "tabular": _tabular,
    "kmnist": _kmnist,
    "cnn": _cnn,
    "characters": _characters,
}
NEEDS_DATA = {"kmnist", "cnn"}


def start(case: Case, data: pathlib.Path | None = None) -> Started:
    """The run at its start."""
    model, (train, val) = MODELS[case.problem](case, data)
    moving = "beta1" if case.optimizer in ("adam", "adamw") else "momentum"
    space = Space(**{"lr": log(case.lr), moving: logit(0.9), "weight_decay": log(1e-3)})
    batch = feed(train, case.size, case.seed)
    epoch = None if case.size is None else [batch(t) for t in range(len(train[1]) // case.size)]
    return Started(getattr(inner, case.optimizer)(model, space), train, val, batch, epoch)
