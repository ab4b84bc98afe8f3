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
    """f with `_root` for every square root in it, in the bodies of branches and loops too."""

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        out = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _has_root(jaxpr: Any) -> bool:
    return any(e.primitive.name == "sqrt" or any(_has_root(b.jaxpr) for b in _bodies(e)) for e in jaxpr.eqns)


def _bodies(eqn: Any) -> tuple[Any, ...]:
    """The traced functions within an equation that `_INTO` can go into."""
    named = {"cond": "branches", "while": "cond_jaxpr body_jaxpr", "closed_call": "call_jaxpr"}
    if eqn.primitive.name not in _INTO:
        return ()
    found = [eqn.params[name] for name in named.get(eqn.primitive.name, "jaxpr").split()]
    return tuple(found[0]) if eqn.primitive.name == "cond" else tuple(found)


def _function(closed: Any) -> Callable[..., list[Any]]:
    return lambda *args: _evaluate(closed, args)


def _call(values: list[Any], params: dict[str, Any], *bodies: Any) -> list[Any]:
    return _evaluate(bodies[0], values)


def _cond(values: list[Any], params: dict[str, Any], *bodies: Any) -> list[Any]:
    index, *operands = values
    return jax.lax.switch(index, [_function(b) for b in bodies], *operands)


def _scan(values: list[Any], params: dict[str, Any], *bodies: Any) -> list[Any]:
    n, m = params["num_consts"], params["num_carry"]
    consts, start, xs = values[:n], values[n : n + m], values[n + m :]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = _evaluate(bodies[0], [*consts, *carry, *x])
        return out[:m], out[m:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    end, ys = jax.lax.scan(body, start, xs, **options)
    return [*end, *ys]


def _while(values: list[Any], params: dict[str, Any], *bodies: Any) -> list[Any]:
    n = params["cond_nconsts"]
    m = n + params["body_nconsts"]
    test, body = bodies
    return jax.lax.while_loop(
        lambda carry: _evaluate(test, [*values[:n], *carry])[0],
        lambda carry: _evaluate(body, [*values[n:m], *carry]),
        values[m:],
    )


_INTO = {"jit": _call, "pjit": _call, "closed_call": _call, "cond": _cond, "scan": _scan, "while": _while}


def _evaluate(closed: Any, args: Iterable[Any]) -> list[Any]:
    env: dict[Any, Any] = {}
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    for eqn in closed.jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        bodies = _bodies(eqn)
        if eqn.primitive.name == "sqrt":
            out = [_root(*values)]
        elif any(_has_root(b.jaxpr) for b in bodies):
            out = _INTO[eqn.primitive.name](values, eqn.params, *bodies)
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
