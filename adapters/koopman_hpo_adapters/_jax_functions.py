"""The pure functions of which a JAX `Inner` is made: one step with its tangents, and the hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from koopman_hpo.checks import whole
from koopman_hpo.errors import AdapterError, ShapeError
from koopman_hpo.space import Space

from ._jax_contract import Hyper, checked, expect_function, expect_kind, expect_space, scalar
from ._jax_optax import constants
from ._jax_root import rooted
from ._jax_tree import join, owned, real, split


class Carry(NamedTuple):
    """Training and its derivative; a pytree of arrays."""

    state: Any  # the user's pytree
    tangents: Any  # the same tree with leaves (q, *shape); None where a leaf is not real: counters, keys
    directions: Any = None  # (s, q) that s tangents follow in place of all q


class Point(NamedTuple):
    """The hyperparameters at one inner step, and what moves them; a pytree of arrays."""

    hyper: dict[str, Any]  # {name: () or (n,)} natural values
    seeds: dict[str, Any]  # {name: (q,) or (q, n)} d value / d phi


def init(state: Any, q: int, directions: Any = None) -> Carry:
    """The start: the state, a pytree of arrays and numbers, and zero tangents; along q directions, or the rows of
    `directions` (s, q), random ones whose `D^T D / s` has the identity as its mean.

    Raises:
      AdapterError: the state has a leaf that is no array: a function, a bool, a number among a `TrainState`'s params.
    """
    q = whole("jax.init", "q", q, 0)
    if directions is not None and (jnp.ndim(directions) != 2 or jnp.shape(directions)[1] != q):
        raise ShapeError(f"jax.init: directions must have shape (s, {q}), got {jnp.shape(directions)}.")
    for (path, x), constant in zip(jax.tree_util.tree_leaves_with_path(state), constants(state), strict=True):
        if constant and not hasattr(x, "dtype"):
            raise AdapterError(
                f"jax.init: state{jax.tree_util.keystr(path)} is a {type(x).__name__}, and a carry holds arrays only. Keep "
                f"it out of the state, in a closure of your step (equinox.partition parts a model), or use jax.inner."
            )
    state = jax.tree.map(lambda x: x if hasattr(x, "dtype") else owned(x), state)
    q = q if directions is None else len(directions)
    return Carry(state, jax.tree.map(lambda x: jnp.zeros((q, *x.shape), x.dtype) if real(x) else None, state), directions)


def point(space: Space, phi: ArrayLike, t: int = 0, dtype: Any = None) -> Point:
    """Natural values and their derivatives by phi (q,) at inner step t, for `step`; dtype: JAX's own by default."""
    expect_space("point", space)
    at = space.at(space.check(phi, "jax.point"), t)
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    cast = lambda values: {name: np.asarray(x, dtype) for name, x in values.items()}
    return Point(cast(at.values), cast(at.seeds))


def step(train_step: Callable[..., Any], carry: Carry, at: Point, batch: Any) -> tuple[Carry, Any]:
    """One inner step with its tangents, to be jitted, scanned or sharded by the caller.

    Args:
      train_step: pure, `(state, hyper, batch) -> (state, loss)`.
      carry: from `init` or the step before.  at: from `point`.  batch: passed on.

    Returns:
      The next carry, and the loss () before the step.

    Raises:
      AdapterError: train_step returns another tree, other shapes or dtypes, or a loss that is not a scalar.
    """
    expect_function("step", "train_step", train_step)
    _expect_place("step", carry, at)
    floats, rest, tree = split(carry.state)
    Z, structure = jax.tree.flatten(carry.tangents)

    def advance(floats: Any, hyper: Any) -> Any:
        after, loss = checked(train_step, join(floats, rest, tree), Hyper(hyper), batch)
        moved, other, _ = split(after)
        return moved, (other, loss)

    def along(z: Any, dhyper: Any) -> Any:
        return jax.jvp(rooted(advance), (floats, at.hyper), (z, dhyper), has_aux=True)

    D = carry.directions
    seeds = at.seeds if D is None else {name: _project(D, x) for name, x in at.seeds.items()}
    moved, Z, (other, loss) = jax.vmap(along, out_axes=(None, 0, None))(Z, seeds)
    return Carry(join(moved, other, tree), jax.tree.unflatten(structure, Z), D), loss


def hypergradient(val_loss: Callable[..., Any], carry: Carry, at: Point, batch: Any) -> tuple[Any, Any]:
    """The outer loss () and its derivative (q,) by phi at the carry; `val_loss` is `(state, hyper, batch) -> scalar`."""
    expect_function("hypergradient", "val_loss", val_loss)
    _expect_place("hypergradient", carry, at)
    floats, rest, tree = split(carry.state)
    value_of = lambda floats, hyper: scalar("val_loss", val_loss(join(floats, rest, tree), Hyper(hyper), batch))
    value, (dE, direct) = jax.value_and_grad(value_of, argnums=(0, 1))(floats, at.hyper)
    h = sum(_rows(z, d) for z, d in zip(jax.tree.leaves(carry.tangents), dE, strict=True))
    h = h if carry.directions is None else _project(h, carry.directions) / len(carry.directions)
    return value, h + sum(_rows(at.seeds[name], direct[name]) for name in at.seeds)


def _expect_place(call: str, carry: Any, at: Any) -> None:
    expect_kind(call, "carry", carry, Carry, "jax.init(state, space.q), or what the step before returned")
    expect_kind(call, "at", at, Point, "jax.point(space, phi)")


def _rows(A: Any, a: Any) -> Any:
    """(q,) inner products of each A[j] with a."""
    return _project(A.reshape(len(A), -1), a.ravel())


def _project(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, precision="highest")
