"""The hyperparameters to tune as one flat vector phi (q,), and what they are at each inner step.

The chain rule through transforms, groups and schedules lives in the seeds `d value(t) / d phi` that `Space.at` gives:
nothing downstream knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import HyperparameterError, ShapeError, nearest, reals, short
from .hyperparameters import Hyperparameter
from .transforms import LIMITS, LOGISTIC_LIMITS

Array = NDArray[Any]


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
        """(q,) one side of the box."""
        out = np.empty(self.q)
        for name, h in self._entries.items():
            out[self._slices[name]] = h.transform.nearest(np.float64(h.bounds[side]))
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
            n = math.prod(h.tuned)
            w = h.weights(t)
            K = len(w)
            x = self._value(name, phi).reshape(K, n)
            seed = np.zeros((self.q, n))
            local = slopes[name].reshape(K, n) * w[:, None]  # (K, n): knot k of group i moves group i alone
            block = seed[self._slices[name]].reshape(K, n, n)
            block[:, range(n), range(n)] = local
            value = w @ x
            if h.shares is not None:
                value, seed = value * h.shares, seed * h.shares
            values[name] = value if h.groups else float(value[0])
            seeds[name] = seed if h.groups else seed[:, 0]
        return Point(values, seeds)


def _labels(name: str, h: Hyperparameter) -> list[str]:
    groups = [f"[{i}]" for i in range(h.tuned[0])] if h.tuned else [""]
    knots = [""] if h.rows is None else [f"@{k}" for k in h.rows]
    return [name + g + k for k in knots for g in groups]


def _scalar(x: Array) -> Any:
    return float(x) if x.ndim == 0 else x
