"""A pair of JAX losses as a `Problem`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from koopman_hpo.errors import AdapterError, names
from koopman_hpo.problem import Array

from ._jax_contract import Hyper, advised, expect_function, scalar
from ._jax_tree import put, trainable
from ._tree import TreeProblem


def problem(
    train_loss: Callable[..., Any],
    val_loss: Callable[..., Any],
    params: Any,
    *,
    hyper: Iterable[str] | None = None,
) -> TreeProblem:
    """Two JAX losses as a `Problem`, for the core's fused optimizers: `koopman_hpo.inner.adam(problem(...), space)`.

    Args:
      train_loss: `(params, hyper, batch) -> scalar`, the inner loss, pure; hyper is {name: natural value} of the
        hyperparameters in the space that the optimizer does not own.
      val_loss: likewise, the outer loss.
      params: pytree of float32 or float64 arrays, initial parameters; other leaves stay as they are.
      hyper: names that the losses understand; None takes whatever the space names.

    Raises:
      AdapterError: a function is not callable, params has no real leaf; later: a loss is not a scalar.
      ShapeError: params are not finite, or of another dtype.
    """
    for name, function in (("train_loss", train_loss), ("val_loss", val_loss)):
        expect_function("problem", name, function)
    trained = jax.tree.leaves(trainable(params))
    if not trained:
        raise AdapterError("jax.problem: params has no real leaf; parameters must be float32 or float64 arrays.")
    flat, unravel = ravel_pytree(trained)
    tree_of = lambda theta: put(unravel(jnp.asarray(theta, flat.dtype)), params)
    value = lambda what, loss: lambda th, hyper, batch: scalar(what, loss(tree_of(th), Hyper(hyper), batch))
    compiled = _Compiled(value("train_loss", train_loss), value("val_loss", val_loss), np.dtype(flat.dtype))
    return TreeProblem(
        params=np.array(flat),
        grad_jvp=compiled.grad_jvp,
        outer=compiled.outer,
        hyper=None if hyper is None else frozenset(names("jax.problem", "hyper", hyper, AdapterError)),
        segments=tuple(x.size for x in trained if x.size),
        outer_hvp=compiled.outer_hvp,
        note="exact: vmap(jvp(grad)) in JAX",
        unravel=tree_of,
    )


class _Compiled:
    """The functions of `Problem`, each one jit, NumPy arrays in and out."""

    def __init__(self, train: Callable[..., Any], val: Callable[..., Any], dtype: np.dtype):
        self._dtype = dtype
        self._plain = jax.jit(jax.value_and_grad(train))
        self._val = jax.jit(jax.value_and_grad(val, argnums=(0, 1)))

        def gradient(theta: Any, hyper: Any, batch: Any) -> Any:
            loss, g = jax.value_and_grad(train)(theta, hyper, batch)
            return g, loss

        def tangents(theta: Any, hyper: Any, Z: Any, dhyper: Any, batch: Any) -> Any:
            at = lambda th, hy: gradient(th, hy, batch)
            push = lambda z, dh: jax.jvp(at, (theta, hyper), (z, dh), has_aux=True)
            return jax.vmap(push, out_axes=(None, 0, None))(Z, dhyper)

        def hvp(theta: Any, hyper: Any, V: Any, batch: Any) -> Any:
            g = lambda th: jax.grad(val)(th, hyper, batch)
            return jax.vmap(lambda v: jax.jvp(g, (theta,), (v,))[1])(V)

        self._tangents, self._hvp = jax.jit(tangents), jax.jit(hvp)

    def _cast(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        return {name: np.asarray(x, self._dtype) for name, x in hyper.items()}

    def grad_jvp(self, theta: Array, hyper: Any, Z: Array, dhyper: Any, batch: Any) -> tuple[float, Array, Array]:
        with advised():
            if len(Z) == 0:
                loss, g = self._plain(theta, self._cast(hyper), batch)
                return float(loss), np.array(g), np.zeros_like(Z)
            g, dG, loss = self._tangents(theta, self._cast(hyper), Z, self._cast(dhyper), batch)
        return float(loss), np.array(g), np.array(dG)

    def outer(self, theta: Array, hyper: Any, batch: Any) -> tuple[float, Array, dict[str, Any]]:
        value, (dE, direct) = self._val(theta, self._cast(hyper), batch)
        return float(value), np.array(dE), {name: np.array(d) for name, d in direct.items()}

    def outer_hvp(self, theta: Array, hyper: Any, V: Array, batch: Any) -> Array:
        return np.array(self._hvp(theta, self._cast(hyper), V, batch))
