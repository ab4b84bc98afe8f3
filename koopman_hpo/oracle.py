"""A problem as the engine asks it: on one device, and every answer checked before anything moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import checks, devices
from .errors import AdapterError, nearest
from .kernels.arrays import Grads
from .problem import Array, Problem
from .space import Point


class Oracle:
    """What a `Problem` says of its losses, at the run's own state and at any other.

    `grad_jvp` and `outer` take and give the device's arrays, the others the host's.
    """

    def __init__(self, problem: Problem, device: devices.Host | devices.Card, loss_names: tuple[str, ...]):
        self.problem, self._device, self._loss_names = problem, device, loss_names

    def grad_jvp(self, theta: Array, point: Point, Z: Array, dhyper: Mapping[str, Array], batch: Any) -> tuple[Any, Grads]:
        """The inner loss, perhaps unread, its gradient (p,), and tangents of the gradient along the rows of Z (n, p)."""
        call = "problem.grad_jvp"
        out = self.problem.grad_jvp(theta, self._hyper(point), Z, dhyper, batch)
        if not (isinstance(out, tuple) and len(out) == 3):
            raise AdapterError(f"{call}: must return (loss, g (p,), dG (q, p)), got {type(out).__name__}.")
        loss = self._device.unread(call, "loss", out[0])
        g = self._device.array(call, "g", out[1], theta.shape, theta.dtype)
        return loss, Grads(g, self._device.array(call, "dG", out[2], Z.shape, theta.dtype, Z.dtype))

    def expect_finite(self, loss: Any, g: Array) -> None:
        """Raise AdapterError unless they are, which only the parameters one begins with are asked for."""
        if not (math.isfinite(loss) and self._device.finite(g)):
            what = f"loss {loss}" if not math.isfinite(loss) else "gradient"
            raise AdapterError(
                f"problem.grad_jvp: the inner loss and gradient must be finite at the initial parameters, got a {what} "
                f"that is not. Look for NaN or inf in the batch, or scale down the initialisation."
            )

    def outer(self, theta: Array, point: Point, batch: Any) -> tuple[float, Array, dict[str, Array]]:
        """The outer loss, its gradient (p,), and its derivatives by loss hyperparameters, float64 on the host."""
        call = "problem.outer"
        out = self.problem.outer(theta, self._hyper(point), batch)
        if not (isinstance(out, tuple) and len(out) == 3):
            raise AdapterError(f"{call}: must return (value, dE_dtheta (p,), {{name: dE_dhyper}}).")
        if not isinstance(out[2], Mapping):
            raise AdapterError(
                f"{call}: the third part must be a dict {{name: dE_dhyper}}, {{}} for none, got {type(out[2]).__name__}."
            )
        direct = {}
        for name, d in out[2].items():
            if name not in self._loss_names:
                raise AdapterError(
                    f"{call}: dE_dhyper names {name!r}, which is not a loss hyperparameter of the space "
                    f"{self._loss_names}." + nearest(name, self._loss_names)
                )
            shape = point.seeds[name].shape[1:]
            direct[name] = checks.array(call, f"dE_dhyper[{name!r}]", d, shape, np.dtype(np.float64))
        dE = self._device.array(call, "dE_dtheta", out[1], theta.shape, theta.dtype)
        return self._device.number(call, "value", out[0]), dE, direct

    # -- on arrays of the host -------------------------------------------------------------------------------------

    def grads_at(
        self, theta: Array, point: Point, Z: Array, dhyper: Mapping[str, Array], batch: Any
    ) -> tuple[float, Grads]:
        loss, grads = self.grad_jvp(self._device.put(theta), point, self._device.put(Z), dhyper, batch)
        return float(loss), Grads(*map(self._device.read, grads))

    def outer_at(self, theta: Array, point: Point, batch: Any) -> tuple[float, Array, dict[str, Array]]:
        value, dE, direct = self.outer(self._device.put(theta), point, batch)
        return value, self._device.read(dE), direct

    def linearised(
        self, theta: Array, point: Point, batch: Any, rough: bool
    ) -> Callable[[Array, Mapping[str, Array]], Array]:
        """Tangents of the inner gradient at one point, any number of times."""
        if self.problem.linearise is None:
            return lambda V, along: self.grads_at(theta, point, V, along, batch)[1].dG
        call, put = "problem.linearise", self._device.put
        push = self.problem.linearise(put(theta), self._hyper(point), batch, rough)
        if not callable(push):
            raise AdapterError(f"{call}: must return push, (Z (n, p), dhyper) -> dG (n, p), got {type(push).__name__}.")
        array, read = self._device.array, self._device.read
        return lambda V, along: read(array(call, "push's dG", push(put(V), along), V.shape, theta.dtype))

    def outer_hvp(self, theta: Array, point: Point, V: Array, batch: Any) -> Array:
        """(n, p) the outer loss's Hessian times each row of V, by differences where the problem has none."""
        exact, put = self.problem.outer_hvp, self._device.put
        if exact is None:
            return central_hvp(lambda th: self.outer_at(th, point, batch)[1], theta, V)
        out = exact(put(theta), self._hyper(point), put(V), batch)
        return np.array(self._device.read(self._device.array("problem.outer_hvp", "result", out, V.shape, theta.dtype)))

    def _hyper(self, point: Point) -> dict[str, Any]:
        return {n: point.values[n] for n in self._loss_names}


def central_hvp(gradient: Callable[[Array], Array], theta: Array, V: Array) -> Array:
    """(n, p) Hessian times each row of V by central differences of a gradient, two calls a row."""
    out = np.empty_like(V)
    step = np.finfo(theta.dtype).eps ** (1 / 3) * (1 + np.linalg.norm(theta))
    for j, v in enumerate(V):
        size = np.linalg.norm(v)
        e = v * (step / size) if size > 0 else v
        ahead = np.array(gradient(theta + e))  # a model may return the same buffer twice
        out[j] = (ahead - gradient(theta - e)) * (size / (2 * step))
    return out
