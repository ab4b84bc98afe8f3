"""Outer optimizers: what turns an estimated hypergradient into a step of phi.  Pairs of functions, as in optax.

`lr` is the size of a step in phi (a factor e^lr for a log-scaled hyperparameter); None lets the tuner choose it.  No step
is longer than `clip * lr` in any coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import number

Array = NDArray[Any]


class OuterState(NamedTuple):
    """Moments of the hypergradient; zeros where an optimizer has none."""

    mean: Array  # (q,)
    square: Array  # (q,)
    steps: int


class Outer(NamedTuple):
    """An outer optimizer.

    `init(q) -> OuterState`; `update(h (q,), state, lr) -> (step (q,), state)`, to be subtracted from phi.
    """

    name: str
    init: Callable[[int], OuterState]
    update: Callable[[Array, OuterState, float], tuple[Array, OuterState]]
    lr: float | None
    settings: str = ""  # the rest of what it was made with


def _init(q: int) -> OuterState:
    return OuterState(np.zeros(q), np.zeros(q), 0)


def _check(call: str, lr: float | None, clip: float, **fractions: float) -> None:
    if lr is not None:
        number(f"outer.{call}", "lr", lr, "positive and finite, or None", 0.0, math.inf, open_low=True, open_high=True)
    number(f"outer.{call}", "clip", clip, "positive", 0.0, open_low=True)
    for name, x in fractions.items():
        number(f"outer.{call}", name, x, f"a number with 0 <= {name} < 1", 0.0, 1.0, open_high=True)


def _tame(h: Array) -> Array:
    """h (q,) with finite squares: an explosion must not stay in the moments for good."""
    return np.clip(h, -1e150, 1e150)


def adam(lr: float | None = None, *, b1: float = 0.3, b2: float = 0.9, eps: float = 1e-12, clip: float = 2.0) -> Outer:
    """Adam with short memory: few outer steps are taken, and the hypergradient's scale changes by decades."""
    _check("adam", lr, clip, b1=b1, b2=b2)
    number("outer.adam", "eps", eps, "positive and finite", 0.0, math.inf, open_low=True, open_high=True)

    def update(h: Array, state: OuterState, lr: float) -> tuple[Array, OuterState]:
        h, count = _tame(h), state.steps + 1
        mean = b1 * state.mean + (1 - b1) * h
        square = b2 * state.square + (1 - b2) * h * h
        root = np.sqrt(square / (1 - b2**count))
        step = lr * (mean / (1 - b1**count)) / (root + eps)
        return np.clip(step, -clip * lr, clip * lr), OuterState(mean, square, count)

    return Outer("adam", _init, update, lr, f"b1={b1}, b2={b2}, eps={eps}, clip={clip}")


def sgd(lr: float | None = None, *, momentum: float = 0.0, clip: float = 2.0) -> Outer:
    """Plain gradient steps `lr * h`, with momentum if asked for."""
    _check("sgd", lr, clip, momentum=momentum)

    def update(h: Array, state: OuterState, lr: float) -> tuple[Array, OuterState]:
        mean = momentum * state.mean + _tame(h)
        return np.clip(lr * mean, -clip * lr, clip * lr), OuterState(mean, state.square, state.steps + 1)

    return Outer("sgd", _init, update, lr, f"momentum={momentum}, clip={clip}")


def sign(lr: float | None = None) -> Outer:
    """Steps of size `lr` against the sign: uses no magnitude at all."""
    _check("sign", lr, 1.0)

    def update(h: Array, state: OuterState, lr: float) -> tuple[Array, OuterState]:
        return lr * np.sign(h), state._replace(steps=state.steps + 1)

    return Outer("sign", _init, update, lr)
