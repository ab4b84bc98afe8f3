"""The toy models and optimizers of the conformance suite.  Letters: p parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from koopman_hpo import inner as core
from koopman_hpo import log, logit
from koopman_hpo.engine import CoreInner
from koopman_hpo.hyperparameters import Hyperparameter
from koopman_hpo.problem import Array, Problem
from koopman_hpo.space import Space

from .numpy import mlp

STEPS = 12
DOUBLE, SINGLE = np.dtype(np.float64), np.dtype(np.float32)


# -- optimizers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """One inner optimizer with all of its hyperparameters tuned.

    Attributes:
      name: of the case.  factory: its name in `koopman_hpo.inner`.  flags: keywords of the factory.
      tuned: {name: Hyperparameter}.
    """

    name: str
    factory: str
    flags: dict[str, bool]
    tuned: dict[str, Hyperparameter]

    def run(self, problem: Problem, space: Space, **options: Any) -> CoreInner:
        """The core's run of a problem; options: `groups`, `directions`, `chunk`, `seed`."""
        return getattr(core, self.factory)(problem, space, **self.flags, **options)


_LR, _WD = log(0.05), log(0.02)
_BETAS = {"beta1": logit(0.8), "beta2": logit(0.95), "eps": log(1e-3)}
_RMS = {"lr": _LR, "alpha": logit(0.9), "momentum": logit(0.5), "weight_decay": _WD}
OPTIMIZERS = {
    case.name: case
    for case in (
        Optimizer("sgd", "sgd", {}, {"lr": _LR, "momentum": logit(0.8), "dampening": logit(0.3), "weight_decay": _WD}),
        Optimizer("nesterov", "sgd", {"nesterov": True}, {"lr": _LR, "momentum": logit(0.8), "weight_decay": _WD}),
        Optimizer("adam", "adam", {}, {"lr": _LR, "weight_decay": _WD, **_BETAS}),
        Optimizer("adamw", "adamw", {}, {"lr": _LR, "weight_decay": _WD, **_BETAS}),
        Optimizer("rmsprop", "rmsprop", {}, {**_RMS, "eps": log(1e-2)}),
        Optimizer("centered", "rmsprop", {"centered": True}, {**_RMS, "eps": log(1e-1)}),
        Optimizer("adagrad", "adagrad", {}, {"lr": _LR, "lr_decay": log(0.1), "eps": log(1e-2), "weight_decay": _WD}),
        Optimizer("lion", "lion", {}, {"lr": log(1e-3), "beta1": logit(0.8), "beta2": logit(0.9), "weight_decay": _WD}),
    )
}


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One toy model, its losses written for any array namespace.

    Attributes:
      name: of the model.
      reference: the same model by hand in NumPy, float64.
      train_loss, val_loss: `(xp, theta (p,), hyper, batch) -> scalar`.
      tuned: {name: Hyperparameter} of the loss.
      data: batches, one an inner step, each a tuple of float64 arrays.  val_data: the outer batch.
    """

    name: str
    reference: Problem
    train_loss: Callable[..., Any]
    val_loss: Callable[..., Any]
    tuned: dict[str, Hyperparameter]
    data: Sequence[tuple[Array, ...]]
    val_data: tuple[Array, ...]

    def params(self, dtype: Any = DOUBLE) -> Array:
        """(p,) initial parameters."""
        return self.reference.params.astype(dtype)

    def batches(self, dtype: Any = DOUBLE) -> list[tuple[Array, ...]]:
        return [_cast(batch, dtype) for batch in self.data]

    def val_batch(self, dtype: Any = DOUBLE) -> tuple[Array, ...]:
        return _cast(self.val_data, dtype)

    def losses(self, xp: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two losses `(theta, hyper, batch) -> scalar` in the namespace xp."""
        train = lambda theta, hyper, batch: self.train_loss(xp, theta, hyper, batch)
        return train, lambda theta, hyper, batch: self.val_loss(xp, theta, hyper, batch)

    def space(self, optimizer: Optimizer) -> Space:
        """Every hyperparameter of the optimizer and of the loss."""
        return Space(**optimizer.tuned, **self.tuned)


def _cast(batch: tuple[Array, ...], dtype: Any) -> tuple[Array, ...]:
    return tuple(a.astype(dtype) for a in batch)


def _quadratic() -> Model:
    """Inner `1/2 t'At - b't`, outer `1/2 |t - 1|^2`; a batch is (A (p, p), b (p,)).  No loss hyperparameters."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    A = (Q * np.linspace(0.5, 2.0, 4)) @ Q.T

    def train(xp, theta, hyper, batch):
        A, b = batch
        return 0.5 * (theta @ (A @ theta)) - b @ theta

    def val(xp, theta, hyper, batch):
        return 0.5 * xp.sum((theta - 1.0) ** 2)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        A, b = batch
        return train(np, theta, hyper, batch), A @ theta - b, Z @ A

    def outer(theta, hyper, batch):
        return val(np, theta, hyper, batch), theta - 1.0, {}

    data = [(A, rng.normal(size=4)) for _ in range(STEPS)]
    reference = Problem(rng.normal(size=4), grad_jvp, outer, hyper=frozenset())
    return Model("quadratic", reference, train, val, {}, data, (A, np.zeros(4)))


def _logistic() -> Model:
    """Inner `mean softplus(-y x't) + l2/2 |t|^2`; the outer loss depends on l2 directly too, by `.1 l2 sum(t)`."""

    def train(xp, theta, hyper, batch):
        return fit(xp, theta, batch) + 0.5 * hyper["l2"] * xp.sum(theta**2)

    def val(xp, theta, hyper, batch):
        return fit(xp, theta, batch) + 0.1 * hyper["l2"] * xp.sum(theta)

    def fit(xp, theta, batch):
        X, y = batch
        return xp.mean(xp.log(1.0 + xp.exp(-y * (X @ theta))))

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        X, y = batch
        s, l2 = 1 / (1 + np.exp(y * (X @ theta))), hyper["l2"]
        dG = ((Z @ X.T) * (s * (1 - s))) @ X / len(y) + l2 * Z + np.outer(dhyper["l2"], theta)
        return train(np, theta, hyper, batch), -X.T @ (s * y) / len(y) + l2 * theta, dG

    def outer(theta, hyper, batch):
        X, y = batch
        s = 1 / (1 + np.exp(y * (X @ theta)))
        dE = -X.T @ (s * y) / len(y) + 0.1 * hyper["l2"]
        return val(np, theta, hyper, batch), dE, {"l2": 0.1 * theta.sum()}

    rng = np.random.default_rng(1)
    draw = lambda: (rng.normal(size=(12, 5)), np.where(rng.random(12) < 0.5, -1.0, 1.0))
    reference = Problem(rng.normal(size=5), grad_jvp, outer, hyper=frozenset({"l2"}))
    return Model("logistic", reference, train, val, {"l2": log(0.1)}, [draw() for _ in range(STEPS)], draw())


def _network(sizes: tuple[int, ...], rich: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Losses of a tanh network with cross-entropy, a batch being (X (n, f), one-hot Y (n, c)); rich: l2 by layer, label
    smoothing and class weights, otherwise one l2."""
    cuts = list(pairwise(sizes))

    def layers(theta: Any) -> Iterator[tuple[Any, Any, Any]]:
        at = 0
        for f, c in cuts:
            end = at + f * c
            yield theta[at : end + c], theta[at:end].reshape(f, c), theta[end : end + c]
            at = end + c

    def losses(xp, theta, X, Y):
        A = X
        for i, (_, W, b) in enumerate(layers(theta)):
            A = (A if i == 0 else xp.tanh(A)) @ W + b
        return xp.log(xp.sum(xp.exp(A), 1)) - xp.sum(Y * A, 1)

    def train(xp, theta, hyper, batch):
        X, Y = batch
        if not rich:
            return xp.mean(losses(xp, theta, X, Y)) + 0.5 * hyper["l2"] * xp.sum(theta**2)
        s, weights = hyper["label_smoothing"], Y @ hyper["class_weights"]
        penalty = sum(hyper["l2"][i] * xp.sum(part**2) for i, (part, _, _) in enumerate(layers(theta)))
        return xp.mean(weights * losses(xp, theta, X, (1.0 - s) * Y + s / sizes[-1])) + 0.5 * penalty

    return train, lambda xp, theta, hyper, batch: xp.mean(losses(xp, theta, *batch))


def _by_label(problem: Problem) -> Problem:
    """The ready model, its labels given as one-hot rows."""
    label = lambda batch: (batch[0], batch[1].argmax(axis=1))
    return replace(
        problem,
        grad_jvp=lambda theta, hyper, Z, dhyper, b: problem.grad_jvp(theta, hyper, Z, dhyper, label(b)),
        outer=lambda theta, hyper, b: problem.outer(theta, hyper, label(b)),
        outer_hvp=None,
        linearise=None,
    )


def _mlp() -> Model:
    sizes, rng = (6, 5, 3), np.random.default_rng(2)
    draw = lambda: (rng.normal(size=(10, 6)), np.eye(3)[rng.integers(3, size=10)])
    tuned = {"l2": log([1e-2, 3e-2]), "label_smoothing": logit(0.1), "class_weights": log([0.5, 1.0, 1.5])}
    return Model("mlp", _by_label(mlp(sizes)), *_network(sizes, True), tuned, [draw() for _ in range(STEPS)], draw())


MODELS = {model.name: model for model in (_quadratic(), _logistic(), _mlp())}


@cache
def digits(steps: int = 200) -> Model:
    """A 64-128-10 network on scikit-learn's digits, p = 9,610, with one l2; batches of 128.  Some pixels are always zero:
    their weights never have a gradient."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("conformance.digits needs scikit-learn: pip install 'koopman-hpo[test]'.") from error
    X, y = load_digits(return_X_y=True)
    X, Y, rng, sizes = X / 16, np.eye(10)[y], np.random.default_rng(3), (64, 128, 10)
    chosen = [rng.choice(1200, 128, replace=False) for _ in range(steps)]
    data, val = [(X[i], Y[i]) for i in chosen], (X[1200:1500], Y[1200:1500])
    return Model("digits", _by_label(mlp(sizes)), *_network(sizes, False), {"l2": log(1e-3)}, data, val)


_RMS_DIGITS = {"lr": log(1e-3), "alpha": logit(0.95), "momentum": logit(0.5), "weight_decay": log(1e-3)}
_BETAS_DIGITS = {"lr": log(1e-3), "beta1": logit(0.9), "beta2": logit(0.99), "eps": log(1e-3), "weight_decay": log(1e-3)}
_TUNED_ON_DIGITS = {  # lion is left out: its signs flip on rounding
    "sgd": {"lr": log(0.1), "momentum": logit(0.9), "dampening": logit(0.2), "weight_decay": log(1e-3)},
    "nesterov": {"lr": log(0.1), "momentum": logit(0.9), "weight_decay": log(1e-3)},
    "adam": _BETAS_DIGITS,
    "adamw": _BETAS_DIGITS,
    "rmsprop": {**_RMS_DIGITS, "eps": log(1e-2)},
    "centered": {**_RMS_DIGITS, "eps": log(1e-1)},
    "adagrad": {"lr": log(0.05), "lr_decay": log(1e-2), "eps": log(1e-2), "weight_decay": log(1e-3)},
}
ON_DIGITS = tuple(replace(OPTIMIZERS[name], tuned=tuned) for name, tuned in _TUNED_ON_DIGITS.items())
