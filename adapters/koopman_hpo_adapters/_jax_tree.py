"""Leaves of a pytree: which are real, which are arrays, and how they are kept, stacked and saved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray


def real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def split(state: Any) -> tuple[list[Any], list[Any], Any]:
    """Real leaves, the other leaves with None in the real ones' places, and the tree."""
    leaves, tree = jax.tree.flatten(state)
    return [x for x in leaves if real(x)], [None if real(x) else x for x in leaves], tree


def join(floats: Iterable[Any], rest: Iterable[Any], tree: Any) -> Any:
    left = iter(floats)
    return jax.tree.unflatten(tree, [next(left) if x is None else x for x in rest])


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def trainable(params: Any) -> Any:
    """params with None for every leaf that is not a real array."""
    return jax.tree.map(lambda x: x if is_array(x) and real(x) else None, params)


def put(moved: Any, params: Any) -> Any:
    left = iter(jax.tree.leaves(moved))
    return jax.tree.map(lambda x: next(left) if is_array(x) and real(x) else x, params)


def owned(x: Any) -> Any:
    """A JAX array of its own, strongly typed: later changes of a NumPy array do not reach it."""
    return x if isinstance(x, jax.Array) and not getattr(x, "weak_type", False) else jnp.array(x, jnp.result_type(x))


def same_form(batches: list[Any]) -> bool:
    """Whether batches can be stacked: one tree, one shape and dtype a leaf."""
    kind = lambda x: (np.shape(x), getattr(x, "dtype", type(x)))
    form = lambda batch: (jax.tree.structure(batch), [kind(x) for x in jax.tree.leaves(batch)])
    first = form(batches[0])
    return all(batch is batches[0] or form(batch) == first for batch in batches[1:])


def stacked(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def kept(x: Any) -> Any:
    """As a file could hold it, where it is: keys by their data, bfloat16 and its like by their bits."""
    x = jax.random.key_data(x) if _is_key(x) else x
    if np.dtype(x.dtype).kind != "V":
        return x
    return (x if real(x) else np.asarray(x)).view(f"u{x.dtype.itemsize}")  # JAX cannot widen an int4


def stored(x: Any) -> NDArray:
    """What was `kept`, as an array of NumPy's that JAX does not write to."""
    return np.array(x)


def loaded(a: Any, like: Any) -> Any:
    if _is_key(like):
        x = jax.random.wrap_key_data(jnp.array(a), impl=jax.random.key_impl(like))
    else:
        x = jnp.array(a.view(like.dtype) if a.dtype != like.dtype else a)
    return jax.device_put(x, like.sharding) if like.committed else x
