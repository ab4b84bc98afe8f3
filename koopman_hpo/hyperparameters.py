"""Hyperparameters: natural values on the outside, unconstrained coordinates phi on the inside.

A value passes its transform once on the way in and once on the way out.  Between, everything is one flat vector
phi (q,).  The chain rule through transforms, groups and schedules lives in the seeds `d value(t) / d phi` that
`Space.at` gives: nothing downstream knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import HyperparameterError, ShapeError, choice, nearest, number, reals, short
from .transforms import EDGES, IDENTITY, LIMITS, LOG, LOGISTIC_EDGES, LOGISTIC_LIMITS, LOGIT, Transform, box_transform

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
    """

    value: Array
    transform: Transform
    bounds: tuple[float, float]
    knots: tuple[int, ...] | None = None
    schedule: Literal["linear", "constant"] = "linear"

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
        knots = _check_knots(value, self.knots, self.schedule)
        value.flags.writeable = False
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "bounds", (float(ends[0]), float(ends[1])))
        object.__setattr__(self, "knots", knots)

    @property
    def groups(self) -> tuple[int, ...]:
        """Shape of the value at one step: `()` or `(n,)`."""
        return self.value.shape if self.knots is None else self.value.shape[1:]

    def weights(self, t: int) -> Array:
        """(K,) share of each knot in the value at inner step t; they sum to one."""
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


def _check_knots(value: Array, knots: Any, schedule: Any) -> tuple[int, ...] | None:
    choice("Hyperparameter", "schedule", schedule, ("linear", "constant"))
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
    if value.ndim == 0 or value.shape[0] != len(steps):
        raise ShapeError(
            f"Hyperparameter: {len(steps)} knots need a value with {len(steps)} rows, got shape {value.shape}."
        )
    return steps


def _make(
    value: ArrayLike,
    transform: Transform,
    bounds: tuple[float, float] | None,
    default: tuple[float, float],
    knots: Any,
    schedule: Any,
) -> Hyperparameter:
    array = reals(transform.name, "value", value)
    if bounds is None:
        finite = array[np.isfinite(array)]
        low, high = default  # widened to admit the start, never narrower than the user's own wish
        bounds = (min(low, finite.min()), max(high, finite.max())) if finite.size else default
    return Hyperparameter(array, transform, bounds, knots, schedule)


def log(
    value: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
) -> Hyperparameter:
    """A positive hyperparameter tuned on a log scale: lr, weight_decay, eps, regularisers, weights.

    Args:
      value: start > 0; scalar, `(n,)` for n groups, `(K,)` or `(K, n)` with K knots.
      bounds: natural (low, high); default (1e-10, 1e4), widened to admit the start.
      knots: None, or K increasing inner steps starting with 0.
      schedule: "linear" or "constant" between knots.

    Raises:
      HyperparameterError: a value at or below zero, or outside the bounds.
    """
    return _make(value, LOG, bounds, (1e-10, 1e4), knots, schedule)


def logit(
    value: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
) -> Hyperparameter:
    """A fraction strictly between 0 and 1 tuned on a logit scale: momentum, betas, label smoothing.

    Default bounds (1e-5, 0.99999), widened to admit the start; otherwise as `log`.
    """
    return _make(value, LOGIT, bounds, (1e-5, 0.99999), knots, schedule)


def identity(
    value: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    knots: Any = None,
    schedule: Literal["linear", "constant"] = "linear",
) -> Hyperparameter:
    """A real hyperparameter tuned as it is.  Without bounds it may go anywhere; otherwise as `log`."""
    return _make(value, IDENTITY, bounds, (-math.inf, math.inf), knots, schedule)


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


class Point(NamedTuple):
    """The hyperparameters at one inner step, and what moves them."""

    values: dict[str, Any]  # {name: float or (n,)} natural
    seeds: dict[str, Array]  # {name: (q,) or (q, n)} d value / d phi


class Space(Mapping[str, Hyperparameter]):
    """The hyperparameters to tune, by name, as one vector phi (q,) in the order given.

    `Space(lr=log(0.1, bounds=(1e-6, 10)), momentum=logit(0.9), l2=log([1e-3, 1e-4]))`

    Attributes:
      names: the names, in order.  labels: one string for each coordinate of phi, e.g. `lr`, `l2[1]`, `lr@500`.
      transforms: the name of each coordinate's transform.
      q: number of coordinates.  phi0: (q,) the start.  low, high: (q,) the box in phi.
      scheduled: whether any value changes with the inner step.

      least, most: (q,) beyond which phi is refused, for the value would leave its domain.  All these are read-only.

    Raises:
      HyperparameterError: an entry that was not made by `log`, `logit`, `identity` or `box`.
    """

    def __init__(self, **hyperparameters: Hyperparameter):
        for name, h in hyperparameters.items():
            if not isinstance(h, Hyperparameter):
                raise HyperparameterError(
                    f"Space: {name} must be made by log, logit, identity or box, got {h!r}. "
                    f"For a positive value write {name}=log({h!r}); to hold it fixed, pass it to the inner optimizer."
                )
        self._entries = dict(hyperparameters)
        self.names = tuple(self._entries)
        self._slices: dict[str, slice] = {}
        labels: list[str] = []
        for name, h in self._entries.items():
            self._slices[name] = slice(len(labels), len(labels) + h.value.size)
            labels += _labels(name, h)
        self.labels = tuple(labels)
        self.transforms = tuple(h.transform.name for h in self._entries.values() for _ in range(h.value.size))
        self.q = len(labels)
        self.scheduled = any(h.knots is not None for h in self._entries.values())
        self.low, self.high = (self._bounds(side) for side in (0, 1))
        self.least, self.most = (self._limits(side) for side in (0, 1))
        self.phi0 = self.phi({name: h.value for name, h in self._entries.items()})
        for array in (self.low, self.high, self.least, self.most, self.phi0):
            array.flags.writeable = False

    def __getitem__(self, name: str) -> Hyperparameter:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        inside = ", ".join(f"{n}={h.transform.name}({h.value.tolist()})" for n, h in self._entries.items())
        return f"Space({inside})"

    def _bounds(self, side: int) -> Array:
        """(q,) one side of the box; an open edge lies where the value has come near enough and is still inside."""
        out = np.empty(self.q)
        with np.errstate(divide="ignore"):
            for name, h in self._entries.items():
                edge = h.transform.to_phi(np.float64(h.bounds[side]))
                out[self._slices[name]] = np.clip(edge, *EDGES.get(h.transform.name, LOGISTIC_EDGES))
        return out

    def _limits(self, side: int) -> Array:
        """(q,) beyond which a value leaves its domain: rounds to the edge, overflows, or with `identity` passes a bound."""
        out = np.empty(self.q)
        most = np.finfo(np.float64).max
        for name, h in self._entries.items():
            free = h.transform.name == "identity"
            edge = h.bounds[side] if free else LIMITS.get(h.transform.name, LOGISTIC_LIMITS)[side]
            out[self._slices[name]] = np.clip(edge, -most, most)
        return out

    def where(self, name: str) -> slice:
        """The coordinates of phi that belong to a name."""
        if not isinstance(name, str) or name not in self._slices:
            raise HyperparameterError(f"Space: no hyperparameter {name!r}." + nearest(name, self.names))
        return self._slices[name]

    def phi(self, natural: Mapping[str, ArrayLike]) -> Array:
        """(q,) coordinates of natural values `{name: value}`, one for every name, within the bounds.

        Raises:
          HyperparameterError: a name is missing or unknown, or a value lies outside its bounds.
          ShapeError: a value has another shape than the start.
        """
        phi = np.empty(self.q)
        if not isinstance(natural, Mapping):
            raise HyperparameterError(f"Space.phi: natural must be a dict {{name: value}}, got {short(natural)}.")
        for name in natural:
            self.where(name)
        for name, h in self._entries.items():
            if name not in natural:
                raise HyperparameterError(f"Space.phi: no value for {name!r}; expected all of {self.names}.")
            value = self._like(name, natural[name], "Space.phi")
            if not ((value >= h.bounds[0]) & (value <= h.bounds[1])).all():
                raise HyperparameterError(f"Space.phi: {name} must lie within its bounds {h.bounds}, got {value.tolist()}.")
            with np.errstate(divide="ignore"):
                phi[self._slices[name]] = h.transform.to_phi(value).ravel()
        return self.clip(phi)

    def replace(self, **natural: ArrayLike) -> Space:
        """The same space with other starts: `space.replace(lr=1e-3)`."""
        moved = {name: self._like(name, value, "Space.replace") for name, value in natural.items()}
        return Space(**{n: replace(h, value=moved[n]) if n in moved else h for n, h in self._entries.items()})

    def _like(self, name: str, value: ArrayLike, call: str) -> Array:
        """`value` as float64 in the shape of the start of that name."""
        self.where(name)
        array, shape = reals(call, name, value), self._entries[name].value.shape
        if array.shape != shape:
            raise ShapeError(f"{call}: {name} must have shape {shape}, got {array.shape}.")
        return array

    def check(self, phi: ArrayLike, call: str) -> Array:
        """phi as (q,) float64 within `least`..`most`, or an error that names the call."""
        phi = self._flat(phi, call)
        if not ((phi >= self.least) & (phi <= self.most)).all():
            self._outside(phi, call)
        return phi

    def _flat(self, phi: ArrayLike, call: str) -> Array:
        if not (type(phi) is np.ndarray and phi.dtype == np.float64):
            phi = reals(call, "phi", phi, want="(q,) numbers")
        if phi.shape != (self.q,):
            raise ShapeError(
                f"{call}: phi must have shape (q,) = ({self.q},) for {self.names}, got {phi.shape}. Start from space.phi0."
            )
        return phi

    def _outside(self, phi: Array, call: str) -> None:
        if not np.isfinite(phi).all():
            raise HyperparameterError(f"{call}: phi must be finite, got {phi.tolist()}.")
        j = int(np.flatnonzero((phi < self.least) | (phi > self.most))[0])
        raise HyperparameterError(
            f"{call}: phi[{j}] of {self.labels[j]} must lie in {self.least[j]:g}..{self.most[j]:g}, got {phi[j]:g}. "
            f"space.clip(phi) is the nearest point within the bounds."
        )

    def clip(self, phi: Array) -> Array:
        """(q,) the nearest point within the bounds; NaN stays."""
        return np.clip(self._flat(phi, "Space.clip"), self.low, self.high)

    def natural(self, phi: ArrayLike) -> dict[str, Any]:
        """`{name: value}` of phi (q,), each in the shape of its start (a float where that is a scalar), in bounds."""
        phi = self.check(phi, "Space.natural")
        # rounding may pass an edge by one unit in the last place
        return {n: _scalar(np.clip(self._value(n, phi), *h.bounds)) for n, h in self._entries.items()}

    def _value(self, name: str, phi: Array) -> Array:
        h = self._entries[name]
        return np.asarray(h.transform.to_natural(phi[self._slices[name]])).reshape(h.value.shape)

    def slopes(self, phi: Array) -> dict[str, Array]:
        """`{name: d natural / d phi}` in the shapes of the starts."""
        return {n: np.asarray(h.transform.slope(self._value(n, phi))) for n, h in self._entries.items()}

    def gradient(self, phi: Array, grad: Array) -> dict[str, Any]:
        """`{name: dE / d natural}` from a gradient (q,) with respect to phi."""
        slopes = self.slopes(phi)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # at an edge, or where training diverged
            return {n: _scalar(grad[self._slices[n]].reshape(s.shape) / s) for n, s in slopes.items()}

    def at(self, phi: Array, t: int) -> Point:
        """Values and seeds at inner step t: the schedule's knots weighed, the transform's slope in the seeds.

        Step t is the one to be taken next, counting from 0: an outer loss measured after n steps sees the values of t = n.
        """
        values: dict[str, Any] = {}
        seeds: dict[str, Array] = {}
        slopes = self.slopes(phi)
        for name, h in self._entries.items():
            n = h.value.size if h.knots is None else h.value[0].size
            w = h.weights(t)
            K = len(w)
            x = self._value(name, phi).reshape(K, n)
            seed = np.zeros((self.q, n))
            local = slopes[name].reshape(K, n) * w[:, None]  # (K, n): knot k of group i moves group i alone
            block = seed[self._slices[name]].reshape(K, n, n)
            block[:, range(n), range(n)] = local
            value = w @ x
            values[name] = value if h.groups else float(value[0])
            seeds[name] = seed if h.groups else seed[:, 0]
        return Point(values, seeds)


def _labels(name: str, h: Hyperparameter) -> list[str]:
    groups = [f"[{i}]" for i in range(h.groups[0])] if h.groups else [""]
    knots = [""] if h.knots is None else [f"@{k}" for k in h.knots]
    return [name + g + k for k in knots for g in groups]


def _scalar(x: Array) -> Any:
    return float(x) if x.ndim == 0 else x
