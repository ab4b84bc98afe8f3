"""The run's model at fixed batches, in float64, with a count of what it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import checks
from ..engine import Dynamics
from ..problem import Array
from ..space import Point, Space
from . import frozen
from .frozen import Coefficients, Piece


class Model:
    """Gradient, Hessian products and mixed derivative of the inner loss, and the outer loss, anywhere.

    Attributes:
      eps: of the model's arithmetic.
      outer_loss: at the last place where `outer` was taken.
      gradients, hvps, mixeds, outers: products so far: gradients, Hessian-vector products, mixed derivatives (q rows
        each), outer gradients and outer Hessian-vector products.
    """

    def __init__(self, dynamics: Dynamics, space: Space, train_batch: Any, hvp_batch: Any, val_batch: Any):
        self.space = space
        self._points: dict[int, Point] = {}
        self._coefficients: dict[int, Coefficients] = {}
        self._phi = dynamics.phi
        self.dynamics = frozen.alike(dynamics, self.point(dynamics.t))
        self._train, self._hvp, self._val = train_batch, hvp_batch, val_batch
        self._dtype = dynamics.state.theta.dtype
        self.eps = float(np.finfo(self._dtype).eps)
        self._loss = set(dynamics.loss_names)
        self.outer_loss = float("nan")
        self.gradients = self.hvps = self.mixeds = self.outers = 0

    def point(self, t: int) -> Point:
        """Hyperparameters at step t; without a schedule, at any."""
        t = t if self.space.scheduled else 0
        if t not in self._points:
            self._points[t] = self.space.at(self._phi, t)
        return self._points[t]

    def coefficients(self, t: int) -> Coefficients:
        """Of the frozen step t, counting from 0."""
        settled = 0 if not self.dynamics.rule.timed else self.dynamics.rule.settled
        key = t if self.space.scheduled or settled is None else min(t, settled)
        if key not in self._coefficients:
            self._coefficients[key] = frozen.coefficients(self.dynamics, self.point(t), t)
        return self._coefficients[key]

    def pieces(self, t: int, steps: int) -> list[Piece]:
        return frozen.pieces(self.coefficients, self.space, self.dynamics.rule, t, steps)

    def _at(self, theta: Array, t: int) -> tuple[Array, Point]:
        return theta.astype(self._dtype), self.point(t)

    def _grads(self, theta: Array, V: Array, t: int, batch: Any) -> Any:
        at, point = self._at(theta, t)
        still = {n: np.zeros((len(V), *point.seeds[n].shape[1:])) for n in self._loss}
        return self.dynamics.grads(at, point, np.ascontiguousarray(V, self._dtype), still, batch)[1]

    def gradient(self, theta: Array, t: int, batch: Any = None) -> Array:
        """(p,) of the inner loss, on a batch of its own if given."""
        self.gradients += 1
        return self._grads(theta, np.empty((0, theta.size)), t, self._train if batch is None else batch).g.astype(
            np.float64
        )

    def hvp(self, theta: Array, v: Array, t: int, batch: Any) -> Array:
        """(p,) Hessian of the inner loss on a batch times v (p,)."""
        self.hvps += 1
        return self._grads(theta, v[None], t, batch).dG[0].astype(np.float64)

    def curvature(self, theta: Array, t: int, rough: bool) -> Callable[[Array], Array]:
        """V (n, p) -> (n, p), the Hessian of the inner loss times each row; training is linearised once, in single
        precision where that will do and the model can."""
        at, point = self._at(theta, t)
        push = self.dynamics.linearise(checks.locked(at), point, self._hvp, rough)

        def hvp(V: Array) -> Array:
            self.hvps += len(V)
            still = {n: np.zeros((len(V), *point.seeds[n].shape[1:])) for n in self._loss}
            return push(np.ascontiguousarray(V, self._dtype), still).astype(np.float64, copy=False)

        return hvp

    def mixed(self, theta: Array, t: int) -> Array:
        """(q, p) derivative of the inner gradient along the coordinates of phi, through the loss's hyperparameters."""
        self.mixeds += 1
        at, point = self._at(theta, t)
        seeds = {n: point.seeds[n] for n in self._loss}
        still = np.zeros((self.space.q, theta.size), self._dtype)
        return self.dynamics.grads(at, point, still, seeds, self._train)[1].dG.astype(np.float64)

    def outer(self, theta: Array, t: int) -> tuple[Array, Array]:
        """Outer gradient (p,), and the outer loss's direct derivative (q,) along phi."""
        self.outers += 1
        at, point = self._at(theta, t)
        self.outer_loss, dE, direct = self.dynamics.outer(at, point, self._val)
        h = np.zeros(self.space.q)
        for name, d in direct.items():
            seed = point.seeds[name]
            h += seed @ d if seed.ndim == 2 else seed * d
        return dE.astype(np.float64), h

    def outer_hvp(self, theta: Array, V: Array, t: int) -> Array:
        """(n, p) Hessian of the outer loss times each row of V."""
        self.outers += len(V)
        at, point = self._at(theta, t)
        V = np.ascontiguousarray(V, self._dtype)
        return self.dynamics.outer_hvp(at, point, V, self._val).astype(np.float64)
