"""Hyperparameters: natural values on the outside, unconstrained coordinates phi on the inside.

A value passes its transform once on the way in and once on the way out.  Between, everything is one flat vector
phi (q,), see `space`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import HyperparameterError, ShapeError, choice, number, reals, short
from .transforms import IDENTITY, LOG, LOGIT, Transform, box_transform

Array = NDArray[Any]


@dataclass(frozen=True)
class Hyperparameter:
    """One named entry of a `Space`: made by `log`, `logit`, `identity` or `box`.

    Attributes:
      value: natural start: `()` a scalar, `(n,)` one a group, `(K,)` or `(K, n)` with K knots of a schedule.
      transform: between natural values and phi.
      bounds: natural (low, high), kept by every update.
      knots: None, or K increasing inner steps, the first one 0.
      schedule: "linear" between knots (in natural values), or "constant" from each knot to the next.
      factors: None, or K fixed multiples of one value at the knots: the schedule's form is given, its height is tuned.
      shares: None, or n fixed multiples of one value, one a group: their proportions are given, their height is tuned.
    """

    value: Array
    transform: Transform
    bounds: tuple[float, float]
    knots: tuple[int, ...] | None = None
    schedule: Literal["linear", "constant"] = "linear"
    factors: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.transform, Transform):
            raise HyperparameterError(
                f"Hyperparameter: transform must be a Transform, got {short(self.transform)}. "
                f"Use log, logit, identity or box."
            )
        value = np.array(reals(self.transform.name, "value", self.value))
        _check_value(value, self.transform)
        ends = reals(self.transform.name, "bounds", self.bounds, HyperparameterError, "a pair (low, high)")
        _check_bounds(value, ends, self.transform)
        knots = _check_knots(value, self.knots, self.schedule, self.factors is not None)
        factors = _check_factors(self.factors, knots, self.transform)
        value.flags.writeable = False
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "bounds", (float(ends[0]), float(ends[1])))
        object.__setattr__(self, "knots", knots)
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "shares", _check_shares(self.shares, self.tuned, self.transform))

    @property
    def tuned(self) -> tuple[int, ...]:
        """Shape of what is tuned of the value at one step: `()` or `(n,)`."""
        return self.value.shape if self.rows is None else self.value.shape[1:]

    @property
    def groups(self) -> tuple[int, ...]:
        """Shape of the value at one step: `()` or `(n,)`."""
        return self.tuned if self.shares is None else (len(self.shares),)

    @property
    def rows(self) -> tuple[int, ...] | None:
        """The knots that have a row of `value` each; None where one value serves all steps."""
        return self.knots if self.factors is None else None

    def weights(self, t: int) -> Array:
        """(K,) share of each row of the value at inner step t, or (1,) its multiple where one value serves all steps."""
        shares = self._shares(t)
        return shares if self.factors is None else np.array([shares @ self.factors])

    def _shares(self, t: int) -> Array:
        """(K,) share of each knot at inner step t; they sum to one."""
        knots = self.knots or (0,)
        w = np.zeros(len(knots))
        k = int(np.searchsorted(knots, t, side="right")) - 1
        if self.schedule == "linear" and k + 1 < len(knots):
            w[k + 1] = (t - knots[k]) / (knots[k + 1] - knots[k])
        w[k] = 1 - w[k + 1] if k + 1 < len(knots) else 1.0
        return w


def _check_value(value: Array, transform: Transform) -> None:
    call = transform.name
    if value.ndim > 2 or value.size == 0:
        raise ShapeError(
            f"{call}: value must be a scalar, (n,) one a group, or (K,) / (K, n) with knots, got shape {value.shape}."
        )
    if not (np.isfinite(value).all() and (value > transform.low).all() and (value < transform.high).all()):
        advice = (
            "Start from a small positive value, or hold zero fixed as a keyword of the inner optimizer."
            if call == "log"
            else "For a value on the edge use identity(x, bounds=...), or hold it fixed as a keyword."
        )
        raise HyperparameterError(
            f"{call}: needs finite {transform.low:g} < value < {transform.high:g}, got {value.tolist()}. {advice}"
        )


def _check_bounds(value: Array, ends: Array, transform: Transform) -> None:
    call, bounds = transform.name, tuple(ends.tolist()) if ends.ndim == 1 else ends.tolist()
    if ends.shape != (2,):
        raise HyperparameterError(f"{call}: bounds must be a pair (low, high), got {short(bounds)}.")
    low, high = bounds
    if not low < high:
        raise HyperparameterError(f"{call}: bounds must be (low, high) with low < high, got {bounds}.")
    if low < transform.low or high > transform.high:
        raise HyperparameterError(f"{call}: bounds must lie within ({transform.low:g}, {transform.high:g}), got {bounds}.")
    if (value < low).any() or (value > high).any():
        raise HyperparameterError(
            f"{call}: bounds {bounds} exclude the start {value.tolist()}. Widen the bounds or move the start."
        )


def _check_knots(value: Array, knots: Any, schedule: Any, alike: bool) -> tuple[int, ...] | None:
    """The knots, with a row of value each unless they are alike but for given factors."""
    choice("Hyperparameter", "schedule", schedule, ("linear", "constant"))
    if alike and value.ndim == 2:
        raise ShapeError(f"Hyperparameter: with factors the value is a scalar or (n,), got shape {value.shape}.")
    if knots is None:
        if value.ndim == 2:
            raise ShapeError(
                f"Hyperparameter: a value of shape {value.shape} needs knots: {value.shape[0]} inner steps, one a row."
            )
        return None
    steps = tuple(knots) if isinstance(knots, Iterable) else ()
    whole = all(isinstance(k, int | np.integer) and not isinstance(k, bool) and k < 2**53 for k in steps)
    if not steps or not whole or steps[0] != 0 or any(b <= a for a, b in pairwise(steps)):
        raise HyperparameterError(
            f"Hyperparameter: knots must be increasing whole inner steps, the first one 0, got "
            f"{short(steps if steps else knots)}."
        )
    if not alike and (value.ndim == 0 or value.shape[0] != len(steps)):
        raise ShapeError(
            f"Hyperparameter: {len(steps)} knots need a value with {len(steps)} rows, got shape {value.shape}. Or give "
            f"one value and factors=, its fixed multiples at the knots."
        )
    return steps


def _check_factors(factors: Any, knots: tuple[int, ...] | None, transform: Transform) -> tuple[float, ...] | None:
    if factors is None:
        return None
    call = transform.name
    if knots is None:
        raise HyperparameterError(f"{call}: factors need knots, the inner steps at which they hold: knots=(0, T).")
    x = reals(call, "factors", factors)
    if x.shape != (len(knots),):
        raise ShapeError(f"{call}: factors must be {len(knots)} numbers, one a knot, got shape {x.shape}.")
    return _multiples("factors", x, transform, "the first one above 0", bool(x[0] > 0))


def _check_shares(shares: Any, tuned: tuple[int, ...], transform: Transform) -> tuple[float, ...] | None:
    if shares is None:
        return None
    call = transform.name
    if tuned:
        raise ShapeError(
            f"{call}: shares are multiples of one value, got {tuned[0]}, one a group. Give one, or leave shares out."
        )
    x = reals(call, "shares", shares)
    if x.ndim != 1 or x.size == 0:
        raise ShapeError(f"{call}: shares must be (n,) numbers, one a group, got shape {x.shape}.")
    return _multiples("shares", x, transform, "not all 0", bool(x.any()))


def _multiples(name: str, x: Array, transform: Transform, need: str, met: bool) -> tuple[float, ...]:
    """Fixed multiples x of a value, none of which may leave the transform's domain."""
    call, endless = transform.name, {transform.low, transform.high} <= {-math.inf, 0.0, math.inf}
    if not transform.low <= 0 <= transform.high:
        raise HyperparameterError(f"{call}: a multiple would leave the domain. Use log or identity, with bounds.")
    most = math.inf if endless else 1.0
    if not ((x >= 0) & (x <= most) & (x < math.inf)).all() or not met:
        raise HyperparameterError(
            f"{call}: {name} must be finite, at least 0{', at most 1' if most == 1 else ''} and {need}, got {x.tolist()}."
        )
    return tuple(x.tolist())


def _make(
    value: ArrayLike,
    transform: Transform,
    bounds: tuple[float, float] | None,
    default: tuple[float, float],
    knots: Any,
    schedule: Any,
    factors: Any = None,
    shares: Any = None,
) -> Hyperparameter:
    array = reals(transform.name, "value", value)
    if bounds is None:
        finite = array[np.isfinite(array)]
        low, high = default  # widened to admit the start, never narrower than the user's own wish
        bounds = (min(low, finite.min()), max(high, finite.max())) if finite.size else default
    return Hyperparameter(array, transform, bounds, knots, schedule, factors, shares)


def log(
    value: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
    factors: Any = None,
    shares: Any = None,
) -> Hyperparameter:
    """A positive hyperparameter tuned on a log scale: lr, weight_decay, eps, regularisers, weights.

    Args:
      value: start > 0; scalar, `(n,)` for n groups, `(K,)` or `(K, n)` with K knots.
      bounds: natural (low, high); default (1e-10, 1e4), widened to admit the start.
      knots: None, or K increasing inner steps starting with 0.
      schedule: "linear" or "constant" between knots.
      factors: K fixed multiples, one a knot, of a scalar or `(n,)`: `log(0.1, knots=(0, T), factors=(1, 0))` tunes the
        height of a linear decay.
      shares: n fixed multiples, one a group, of a scalar or, with knots, `(K,)`: `log(1e-2, shares=(1, 0))` tunes a weight
        decay that the second group has not.

    Raises:
      HyperparameterError: a value at or below zero, or outside the bounds.
    """
    return _make(value, LOG, bounds, (1e-10, 1e4), knots, schedule, factors, shares)


def logit(
    value: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
    factors: Any = None,
    shares: Any = None,
) -> Hyperparameter:
    """A fraction strictly between 0 and 1 tuned on a logit scale: momentum, betas, label smoothing.

    Default bounds (1e-5, 0.99999), widened to admit the start; otherwise as `log`.
    """
    return _make(value, LOGIT, bounds, (1e-5, 0.99999), knots, schedule, factors, shares)


def identity(
    value: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
    factors: Any = None,
    shares: Any = None,
) -> Hyperparameter:
    """A real hyperparameter tuned as it is.  Without bounds it may go anywhere; otherwise as `log`."""
    return _make(value, IDENTITY, bounds, (-math.inf, math.inf), knots, schedule, factors, shares)


def box(
    value: ArrayLike,
    low: float,
    high: float,
    *,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
) -> Hyperparameter:
    """A hyperparameter that lives strictly between low and high, tuned through a scaled logistic; as `log`."""
    ends = number("box", "low", low), number("box", "high", high)
    if not 0 < ends[1] - ends[0] < 1e150:  # the slope squares it
        raise HyperparameterError(f"box: needs finite low < high, less than 1e150 apart, got low={low}, high={high}.")
    return _make(value, box_transform(*ends), ends, ends, knots, schedule)
