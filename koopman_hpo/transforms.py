"""Smooth maps between natural values and the unconstrained coordinates phi."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.special import logit as _logit

from .errors import HyperparameterError, nearest, short

EDGES = {"log": (-690.0, 690.0), "identity": (-math.inf, math.inf)}  # exp stays finite
LOGISTIC_EDGES = (-30.0, 30.0)  # of logit and box: 1 - x stays above 1e-13
LIMITS = {"log": (-700.0, 700.0)}  # of what is refused: a little beyond, for differences at an edge
LOGISTIC_LIMITS = (-33.0, 33.0)


@dataclass(frozen=True)
class Transform:
    """A smooth increasing map from phi (the real line) to natural values (an open interval)."""

    name: str
    low: float
    high: float
    to_phi: Callable[[Any], Any] = field(repr=False)
    to_natural: Callable[[Any], Any] = field(repr=False)
    slope: Callable[[Any], Any] = field(repr=False)  # d natural / d phi as a function of the natural value

    def nearest(self, value: Any) -> Any:
        """phi of a value in low..high; at an open edge, where a value has come near enough and is still inside."""
        with np.errstate(divide="ignore"):
            return np.clip(self.to_phi(value), *EDGES.get(self.name, LOGISTIC_EDGES))


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
    if isinstance(name, str) and name in simple:
        return simple[name]
    try:
        ends = str(name).removeprefix("box(").removesuffix(")")
        low, high = (float(x) for x in ends.split(","))
    except ValueError:
        low = high = math.nan
    if name != f"box({ends})" or not -math.inf < low < high < math.inf:
        raise HyperparameterError(f"transform: no transform {short(name)}." + nearest(name, simple))
    return box_transform(low, high)
