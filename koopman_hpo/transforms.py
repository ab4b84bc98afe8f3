"""Smooth maps between natural values and the unconstrained coordinates phi."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.special import logit as _logit

from .errors import HyperparameterError, nearest

EDGES = {"log": (-690.0, 690.0), "identity": (-math.inf, math.inf)}  # exp stays finite
LOGISTIC_EDGES = (-30.0, 30.0)  # of logit and box: 1 - x stays above 1e-13


@dataclass(frozen=True)
class Transform:
    """A smooth increasing map from phi (the real line) to natural values (an open interval)."""

    name: str
    low: float
    high: float
    to_phi: Callable[[Any], Any] = field(repr=False)
    to_natural: Callable[[Any], Any] = field(repr=False)
    slope: Callable[[Any], Any] = field(repr=False)  # d natural / d phi as a function of the natural value


LOG = Transform("log", 0.0, math.inf, np.log, np.exp, lambda x: x)
LOGIT = Transform("logit", 0.0, 1.0, _logit, expit, lambda x: x * (1 - x))
IDENTITY = Transform("identity", -math.inf, math.inf, lambda x: x, lambda u: u, np.ones_like)


def box_transform(low: float, high: float) -> Transform:
    """Onto the open interval (low, high), by a scaled logistic."""
    width = high - low
    return Transform(
        f"box({low!r}, {high!r})",
        low,
        high,
        lambda x: _logit((x - low) / width),
        lambda u: low + width * expit(u),
        lambda x: (x - low) * (high - x) / width,
    )


def transform(name: str) -> Transform:
    """The transform of that name, as `Transform.name` gives it: "log", "logit", "identity", "box(low, high)".

    Raises:
      HyperparameterError: there is none.
    """
    simple = {t.name: t for t in (LOG, LOGIT, IDENTITY)}
    if name in simple:
        return simple[name]
    try:
        low, high = (float(x) for x in name.removeprefix("box(").removesuffix(")").split(","))
    except ValueError:
        raise HyperparameterError(f"transform: no transform {name!r}." + nearest(name, simple)) from None
    return box_transform(low, high)
