"""Inner optimizers as data: names, defaults and domains of their hyperparameters, slots, and kernel rows.

Each `rows` function turns natural hyperparameters at step t into the rows that the kernel of the same name reads, with
their tangents: everything that depends on the step count (bias correction, decay of the rate) is computed here in float64,
derivative included, so that the kernels are free of powers.

Updates as torch.optim documents them; Lion as Chen et al. 2023, "Symbolic discovery of optimization algorithms".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Dual(NamedTuple):
    """A hyperparameter of n groups and its tangents along q directions."""

    x: NDArray[np.float64]  # (n,)
    dx: NDArray[np.float64]  # (q, n)


Duals = Mapping[str, Dual]


def _complement(h: Dual) -> Dual:
    return Dual(1 - h.x, -h.dx)


def _inverse_bias(beta: Dual, t: int) -> Dual:
    """`1 / (1 - beta^t)` and its derivative `t beta^(t-1) / (1 - beta^t)^2`; t counts from 1."""
    inverse = 1 / (1 - beta.x**t)
    return Dual(inverse, t * beta.x ** (t - 1) * inverse**2 * beta.dx)


def _one(like: Dual) -> Dual:
    return Dual(np.ones_like(like.x), np.zeros_like(like.dx))


def _sgd_rows(h: Duals, t: int) -> list[Dual]:
    keep = _complement(h["dampening"])
    # torch: the buffer starts as the first gradient, undamped, and without momentum there is no buffer to damp
    plain = np.full_like(keep.x, t == 1, dtype=bool) | ((h["momentum"].x == 0) & ~h["momentum"].dx.any(axis=0))
    keep = Dual(np.where(plain, 1.0, keep.x), np.where(plain, 0.0, keep.dx))
    return [h["lr"], h["momentum"], keep, h["weight_decay"]]


def _adam_rows(h: Duals, t: int) -> list[Dual]:
    b1, b2 = h["beta1"], h["beta2"]
    biases = [_inverse_bias(b1, t), _inverse_bias(b2, t)]
    one = _one(b1)
    return [h["lr"], b1, _complement(b1), b2, _complement(b2), *biases, h["eps"], h["weight_decay"], one]


def _rmsprop_rows(h: Duals, t: int) -> list[Dual]:
    alpha = h["alpha"]
    return [h["lr"], alpha, _complement(alpha), h["momentum"], h["eps"], h["weight_decay"], _one(alpha)]


def _adagrad_rows(h: Duals, t: int) -> list[Dual]:
    lr, decay = h["lr"], h["lr_decay"]
    slow = 1 + (t - 1) * decay.x
    rate = Dual(lr.x / slow, lr.dx / slow - lr.x * (t - 1) * decay.dx / slow**2)
    return [rate, h["eps"], h["weight_decay"], _one(lr)]


def _lion_rows(h: Duals, t: int) -> list[Dual]:
    b1, b2 = h["beta1"], h["beta2"]
    return [h["lr"], b1, _complement(b1), b2, _complement(b2), h["weight_decay"], _one(b1)]


class Domain(NamedTuple):
    """Where a hyperparameter may lie: `low <= x < high`, or `low < x` where `open_low`."""

    low: float
    high: float
    open_low: bool = False

    def holds(self, x: NDArray) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return bool((above & (x < self.high) & np.isfinite(x)).all())

    def __str__(self) -> str:
        return f"{self.low:g} {'<' if self.open_low else '<='} value < {self.high:g}"


POSITIVE = Domain(0.0, math.inf, open_low=True)
NOT_NEGATIVE = Domain(0.0, math.inf)
FRACTION = Domain(0.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """An inner optimizer.

    Attributes:
      name: of the optimizer.  kernel: of its kernel.  slots: number k of state arrays.
      defaults: {hyperparameter: value where it is neither tuned nor given}; None where it must be given.
      domains: {hyperparameter: Domain}.
      rows: `(duals, t) -> rows` for the kernel, t counting from 1.
      timed: whether the rows change with t beyond the second step.
      flag: the kernel's variant (nesterov, decoupled, centered).
      fill: what the slots start with.
      scratch: number of work rows that the kernel needs.
    """

    name: str
    kernel: str
    slots: int
    defaults: Mapping[str, float | None]
    domains: Mapping[str, Domain] = field(repr=False)
    rows: Callable[[Duals, int], list[Dual]] = field(repr=False)
    timed: bool = False
    flag: bool = False
    fill: float = 0.0
    scratch: int = 7


_ADAM = {"lr": POSITIVE, "beta1": FRACTION, "beta2": FRACTION, "eps": POSITIVE, "weight_decay": NOT_NEGATIVE}


def sgd(nesterov: bool) -> Rule:
    return Rule(
        "sgd",
        "sgd",
        1,
        {"lr": None, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
        {"lr": POSITIVE, "momentum": FRACTION, "dampening": FRACTION, "weight_decay": NOT_NEGATIVE},
        _sgd_rows,
        flag=nesterov,
    )


def adam(decoupled: bool) -> Rule:
    wd = 1e-2 if decoupled else 0.0
    return Rule(
        "adamw" if decoupled else "adam",
        "adam",
        2,
        {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": wd},
        _ADAM,
        _adam_rows,
        timed=True,
        flag=decoupled,
    )


def rmsprop(centered: bool) -> Rule:
    return Rule(
        "rmsprop",
        "rmsprop",
        3,
        {"lr": 1e-2, "alpha": 0.99, "momentum": 0.0, "eps": 1e-8, "weight_decay": 0.0},
        {
            "lr": POSITIVE,
            "alpha": FRACTION,
            "momentum": FRACTION,
            "eps": POSITIVE,
            "weight_decay": NOT_NEGATIVE,
        },
        _rmsprop_rows,
        flag=centered,
    )


def adagrad(initial_accumulator: float) -> Rule:
    return Rule(
        "adagrad",
        "adagrad",
        1,
        {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0},
        {"lr": POSITIVE, "lr_decay": NOT_NEGATIVE, "eps": POSITIVE, "weight_decay": NOT_NEGATIVE},
        _adagrad_rows,
        timed=True,
        fill=initial_accumulator,
    )


def lion() -> Rule:
    return Rule(
        "lion",
        "lion",
        1,
        {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0},
        {k: _ADAM[k] for k in ("lr", "beta1", "beta2", "weight_decay")},
        _lion_rows,
    )
