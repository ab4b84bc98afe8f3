"""autograd (HIPS): losses written in NumPy, differentiated automatically, as a `Problem`.

    import autograd.numpy as np
    model = problem(train_loss, val_loss, params)           # losses: (params, hyper, batch) -> scalar

The tangents come from reverse mode over reverse mode: the Hessian of the loss by parameters and hyperparameters together is
symmetric, so that its product with a tangent is one more backward pass through the gradient.  Letters: p parameters, q
tangent directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from autograd.core import make_vjp
    from autograd.misc.flatten import flatten
    from autograd.tracer import getval, isbox
except ImportError as error:
    raise ImportError("koopman_hpo_adapters.autograd needs autograd: pip install 'koopman-hpo[autograd]'.") from error

from koopman_hpo.errors import AdapterError, names, nearest, short
from koopman_hpo.problem import Array, Hyper

from ._tree import TreeProblem

__all__ = ["TreeProblem", "problem"]


def problem(
    train_loss: Callable[..., Any],
    val_loss: Callable[..., Any],
    params: Any,
    *,
    hyper: Iterable[str] | None = None,
) -> TreeProblem:
    """Two autograd losses as a `Problem`, exact to rounding.

    Args:
      train_loss: `(params, hyper, batch) -> scalar`, the inner loss, of operations from `autograd.numpy`; hyper is
        {name: natural value} of the hyperparameters in the space that the optimizer does not own.
      val_loss: likewise, the outer loss.
      params: an array, or tuples, lists and dicts of arrays, all float32 or all float64.
      hyper: names that the losses understand; None takes whatever the space names.

    Raises:
      AdapterError: a function is not callable, params hold something else or two dtypes; later: a loss is not a real
        scalar.
      ShapeError: params are not finite, or of another dtype.
    """
    for name, function in (("train_loss", train_loss), ("val_loss", val_loss)):
        if not callable(function):
            raise AdapterError(f"autograd.problem: {name} must be a function, got {type(function).__name__}.")
    leaves = list(_leaves(params))
    _expect_one_dtype(leaves)
    flat, unravel = flatten(params)
    losses = _Losses(train_loss, val_loss, unravel)
    return TreeProblem(
        params=np.array(flat),
        grad_jvp=losses.grad_jvp,
        outer=losses.outer,
        hyper=None if hyper is None else frozenset(names("autograd.problem", "hyper", hyper, AdapterError)),
        segments=tuple(x.size for x in leaves if x.size),
        outer_hvp=losses.outer_hvp,
        note="exact: reverse over reverse mode in autograd",
        unravel=unravel,
    )


def _leaves(params: Any) -> Iterable[Any]:
    """The leaves in the order in which `flatten` takes them."""
    if isinstance(params, dict):
        for name in sorted(params):
            yield from _leaves(params[name])
    elif isinstance(params, list | tuple):
        for part in params:
            yield from _leaves(part)
    else:
        if not isinstance(params, np.ndarray | np.floating) or params.dtype not in (np.float32, np.float64):
            kind = getattr(params, "dtype", type(params).__name__)
            raise AdapterError(
                f"autograd.problem: params must be float32 or float64 arrays in tuples, lists or dicts, got {kind}."
            )
        yield params


def _expect_one_dtype(leaves: list[Any]) -> None:
    found = sorted({str(x.dtype) for x in leaves})
    if len(found) > 1:
        raise AdapterError(
            f"autograd.problem: params must be all float32 or all float64, got {' and '.join(found)}. Use .astype()."
        )


class _Names(dict):
    """The hyperparameters as a loss sees them."""

    def __missing__(self, name: str) -> Any:
        raise AdapterError(
            f"autograd: a loss reads hyper[{name!r}], but the space names {tuple(self)} for it.{nearest(str(name), self)} "
            f"Put it into the space, or write its value into your function."
        )


@dataclass(frozen=True)
class _Losses:
    """The user's losses as functions of one vector, parameters and hyperparameters together."""

    train: Callable[..., Any]
    val: Callable[..., Any]
    unravel: Callable[[Any], Any]

    def grad_jvp(self, theta: Array, hyper: Hyper, Z: Array, dhyper: Hyper, batch: Any) -> tuple[float, Array, Array]:
        w, loss = self._joint("train_loss", self.train, theta, hyper, batch)
        p = theta.size
        if len(Z) == 0:
            value, g = _value_and_gradient(loss, w)
            return float(value), g[:p], np.zeros_like(Z)
        value, g, product = _second(loss, w)
        U = np.concatenate([Z, *(np.reshape(dhyper[name], (len(Z), -1)) for name in hyper)], axis=1)
        dG = np.array([product(u)[:p] for u in U.astype(w.dtype)])
        return float(value), g[:p], dG.astype(theta.dtype)

    def outer(self, theta: Array, hyper: Hyper, batch: Any) -> tuple[float, Array, Hyper]:
        w, loss = self._joint("val_loss", self.val, theta, hyper, batch)
        value, g = _value_and_gradient(loss, w)
        return float(value), g[: theta.size], _parts(g[theta.size :], hyper)

    def outer_hvp(self, theta: Array, hyper: Hyper, V: Array, batch: Any) -> Array:
        w, loss = self._joint("val_loss", self.val, theta, hyper, batch)
        _, _, product = _second(loss, w)
        none = np.zeros(w.size - theta.size, w.dtype)
        return np.array([product(np.concatenate([v, none]))[: theta.size] for v in V])

    def _joint(self, what: str, loss: Callable[..., Any], theta: Array, hyper: Hyper, batch: Any) -> Any:
        """The vector w (p + n,), and the loss as a function of it."""
        p = theta.size
        w = np.concatenate([theta, *(np.ravel(hyper[name]) for name in hyper)]).astype(theta.dtype)

        def of(w: Any) -> Any:
            value = loss(self.unravel(w[:p]), _Names(_parts(w[p:], hyper)), batch)
            _expect_scalar(what, getval(value))
            return value

        return w, of


def _expect_scalar(what: str, value: Any) -> None:
    while isbox(value):  # a gradient of a gradient: boxes in boxes
        value = getval(value)
    number = isinstance(value, np.ndarray | np.generic | int | float | complex)
    kind = np.asarray(value).dtype.kind if number else "O"
    if kind == "c":
        raise AdapterError(f"autograd: {what} must be real, got {short(value)}. Take its real part or its absolute value.")
    if kind not in "fiub":
        raise AdapterError(f"autograd: {what} must be a scalar, got {type(value).__name__}. Return the loss alone.")
    if np.shape(value) != ():
        raise AdapterError(f"autograd: {what} must be a scalar, got shape {np.shape(value)}. Reduce it with a mean.")


def _parts(flat: Any, hyper: Hyper) -> dict[str, Any]:
    """{name: value} in the shapes of `hyper` from one vector (n,)."""
    out, at = {}, 0
    for name, value in hyper.items():
        shape, size = np.shape(value), int(np.size(value))
        out[name] = flat[at : at + size].reshape(shape) if shape else flat[at]
        at += size
    return out


def _value_and_gradient(loss: Callable[..., Any], w: Any) -> tuple[Any, Any]:
    with _quiet():
        vjp, value = make_vjp(loss, w)
    return value, vjp(np.ones((), w.dtype))


def _second(loss: Callable[..., Any], w: Array) -> tuple[Any, Array, Callable[[Array], Array]]:
    """Value, gradient, and the Hessian's product with a vector, its graph built once for all of them."""
    seen = []

    def gradient(w: Any) -> Any:
        vjp, value = make_vjp(loss, w)
        seen.append(getval(value))
        return vjp(np.ones((), getval(w).dtype))

    with _quiet():
        product, g = make_vjp(gradient, w)
    return seen[0], g, product


@contextmanager
def _quiet() -> Iterator[None]:
    """A loss that is linear, or constant, in everything is no mistake here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Output seems independent of input")
        yield
