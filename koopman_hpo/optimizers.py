"""Inner optimizers as data: names, defaults and domains of their hyperparameters, slots, and kernel rows.

Each optimizer's `rows` turn natural hyperparameters at step t into what the kernel of the same name reads, with
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
from numpy.typing import DTypeLike, NDArray

from .errors import flag


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


def _kept(h: Duals, t: int) -> Dual:
    """`1 - dampening`; but torch starts the buffer as the first gradient, undamped, and without momentum there is no
    buffer to damp."""
    keep = _complement(h["dampening"])
    plain = np.full_like(keep.x, t == 1, dtype=bool) | ((h["momentum"].x == 0) & ~h["momentum"].dx.any(axis=0))
    return Dual(np.where(plain, 1.0, keep.x), np.where(plain, 0.0, keep.dx))


def _decayed(h: Duals, t: int) -> Dual:
    """`lr / (1 + (t - 1) lr_decay)`."""
    lr, decay = h["lr"], h["lr_decay"]
    slow = 1 + (t - 1) * decay.x
    return Dual(lr.x / slow, lr.dx / slow - lr.x * (t - 1) * decay.dx / slow**2)


Row = str | Callable[[Duals, int], Dual]
_ONE: Row = lambda h, t: _one(next(iter(h.values())))
_B1_LEFT: Row = lambda h, t: _complement(h["beta1"])
_B2_LEFT: Row = lambda h, t: _complement(h["beta2"])
_BIAS1: Row = lambda h, t: _inverse_bias(h["beta1"], t)
_BIAS2: Row = lambda h, t: _inverse_bias(h["beta2"], t)
_ALPHA_LEFT: Row = lambda h, t: _complement(h["alpha"])

_SGD_ROWS: tuple[Row, ...] = ("lr", "momentum", _kept, "weight_decay")
_ADAM_ROWS: tuple[Row, ...] = (
    *("lr", "beta1", _B1_LEFT, "beta2", _B2_LEFT, _BIAS1, _BIAS2),
    *("eps", "weight_decay", _ONE),
)
_RMSPROP_ROWS: tuple[Row, ...] = ("lr", "alpha", _ALPHA_LEFT, "momentum", "eps", "weight_decay", _ONE)
_ADAGRAD_ROWS: tuple[Row, ...] = (_decayed, "eps", "weight_decay", _ONE)
_LION_ROWS: tuple[Row, ...] = ("lr", "beta1", _B1_LEFT, "beta2", _B2_LEFT, "weight_decay", _ONE)


class Domain(NamedTuple):
    """Where a hyperparameter may lie: `low <= x < high`; `low < x` where `open_low`, `x <= high` where `closed_high`."""

    low: float
    high: float
    open_low: bool = False
    closed_high: bool = False

    def of(self, dtype: DTypeLike) -> Domain:
        """The same in a run of float32 or float64: what must not be zero does not round to it."""
        if not self.open_low or np.dtype(dtype) == np.float64:
            return self
        return self._replace(low=float(np.finfo(dtype).smallest_normal), open_low=False)

    def holds(self, x: NDArray) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x <= self.high if self.closed_high else x < self.high
        return bool((above & below & np.isfinite(x)).all())

    def __str__(self) -> str:
        left, right = "<" if self.open_low else "<=", "<=" if self.closed_high else "<"
        return f"{self.low:g} {left} value {right} {self.high:g}"


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
      rows: of the kernel, each a hyperparameter's name or a function `(duals, t) -> Dual`, t counting from 1.
      timed: which rows change with t.  settled: the step from which on they do not, None for never.
      flag: the kernel's variant (nesterov, decoupled, centered).
      fill: what the slots start with.
      scratch: number of work rows that the kernel needs.
    """

    name: str
    kernel: str
    slots: int
    defaults: Mapping[str, float | None]
    domains: Mapping[str, Domain] = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    timed: tuple[int, ...] = ()
    settled: int | None = None
    flag: bool = False
    fill: float = 0.0
    scratch: int = 7

    def row(self, i: int, duals: Duals, t: int) -> Dual:
        """Row i of the kernel's coefficients at step t, counting from 1."""
        row = self.rows[i]
        return duals[row] if isinstance(row, str) else row(duals, t)


_ADAM = {"lr": POSITIVE, "beta1": FRACTION, "beta2": FRACTION, "eps": POSITIVE, "weight_decay": NOT_NEGATIVE}


def sgd(nesterov: bool) -> Rule:
    nesterov = flag("inner.sgd", "nesterov", nesterov)
    return Rule(
        "sgd",
        "sgd",
        1,
        {"lr": None, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
        {"lr": POSITIVE, "momentum": FRACTION, "dampening": FRACTION, "weight_decay": NOT_NEGATIVE},
        _SGD_ROWS,
        timed=(2,),
        settled=2,
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
        _ADAM_ROWS,
        timed=(5, 6),
        flag=decoupled,
    )


def rmsprop(centered: bool) -> Rule:
    centered = flag("inner.rmsprop", "centered", centered)
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
        _RMSPROP_ROWS,
        flag=centered,
    )


def adagrad(initial_accumulator: float) -> Rule:
    return Rule(
        "adagrad",
        "adagrad",
        1,
        {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0},
        {"lr": POSITIVE, "lr_decay": NOT_NEGATIVE, "eps": POSITIVE, "weight_decay": NOT_NEGATIVE},
        _ADAGRAD_ROWS,
        timed=(0,),
        fill=initial_accumulator,
    )


def lion() -> Rule:
    return Rule(
        "lion",
        "lion",
        1,
        {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0},
        {k: _ADAM[k] for k in ("lr", "beta1", "beta2", "weight_decay")},
        _LION_ROWS,
    )
