"""The square root of nothing: its derivative counts as zero, in every square root of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal


@jax.custom_jvp
def _root(x: Any) -> Any:
    """The square root, its derivative at zero counted as zero, as in the core's optimizers.

    Adam's second moment is exactly zero where a parameter never had a gradient: a dead pixel's weights.  The plain rule
    makes 0 / 0 of their tangents.
    """
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    y = jnp.sqrt(primals[0])
    return y, jnp.where(y == 0, 0, tangents[0] / (2 * jnp.where(y == 0, 1, y)))


def rooted(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with `_root` for every square root in it, bodies of loops and branches left alone."""

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        out = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _has_root(jaxpr: Any) -> bool:
    return any(e.primitive.name == "sqrt" or (_is_call(e) and _has_root(e.params["jaxpr"].jaxpr)) for e in jaxpr.eqns)


def _is_call(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit")


def _evaluate(closed: Any, args: Iterable[Any]) -> list[Any]:
    env: dict[Any, Any] = {}
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    for eqn in closed.jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "sqrt":
            out = [_root(*values)]
        elif _is_call(eqn) and _has_root(eqn.params["jaxpr"].jaxpr):
            out = _evaluate(eqn.params["jaxpr"], values)
        else:
            bound = eqn.primitive.get_bind_params(eqn.params)
            functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair in older JAX
            out = eqn.primitive.bind(*functions, *values, **params)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [_array(read(v), v.aval) for v in closed.jaxpr.outvars]


def _array(x: Any, aval: Any) -> Any:
    """A constant of a traced function is of a type of JAX's own."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype)
