"""What the functions of a user may be, and may return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from koopman_hpo.errors import AdapterError, HyperparameterError, nearest, short
from koopman_hpo.space import Space

from ._jax_tree import is_array, real


@jax.tree_util.register_pytree_node_class
class Hyper(dict):
    """A dict that knows what to say about a name it lacks."""

    def __missing__(self, name: str) -> Any:
        raise AdapterError(
            f"jax: train_step or a loss reads hyper[{name!r}], but the space has {tuple(self)}.{nearest(str(name), self)} "
            f"Put it into the space, or write its value into your function."
        )

    def tree_flatten(self) -> tuple[list[Any], tuple[str, ...]]:
        return [self[name] for name in self], tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Iterable[Any]) -> Hyper:
        return cls(zip(names, values, strict=True))


def expect_function(call: str, name: str, function: Any) -> None:
    if not callable(function):
        raise AdapterError(f"jax.{call}: {name} must be a function, got {type(function).__name__}.")


def expect_space(call: str, space: Any) -> None:
    if not isinstance(space, Space):
        raise HyperparameterError(
            f"jax.{call}: space must be a Space, got {type(space).__name__}. Make one: Space(lr=log(1e-3))."
        )


def expect_kind(call: str, name: str, value: Any, kind: type, source: str) -> None:
    if not isinstance(value, kind):
        raise AdapterError(f"jax.{call}: {name} must be a {kind.__name__}, got {type(value).__name__}. Take {source}.")


def expect_key(key: Any) -> None:
    typed = is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not typed and not (is_array(key) and key.dtype == np.uint32 and key.ndim == 1):
        got = f"shape {key.shape} of {key.dtype}" if is_array(key) else f"{type(key).__name__} {short(key)}"
        raise AdapterError(f"jax.train_step.init: key must be one PRNG key, got {got}. Pass key=jax.random.key(0).")


def expect_real(arrays: list[Any]) -> None:
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in arrays):
        raise AdapterError("jax.inner: the state has a complex leaf. Keep its real and imaginary parts as two leaves.")
    if not any(map(real, arrays)):
        raise AdapterError("jax.inner: the state has no real leaf; its parameters must be float arrays.")


def checked(train_step: Callable[..., Any], state: Any, hyper: Any, batch: Any) -> tuple[Any, Any]:
    with advised():
        out = train_step(state, hyper, batch)
    if not (isinstance(out, tuple) and len(out) == 2):
        raise AdapterError(f"jax: train_step must return (state, loss), got {type(out).__name__}.")
    return _like(state, out[0]), scalar("train_step's loss", out[1])


def _like(before: Any, after: Any) -> Any:
    """The state after a step, or an error about the leaf that is not what it was."""
    was: Any
    tree: Any
    was, tree = jax.tree_util.tree_flatten_with_path(before)
    leaves, other = jax.tree.flatten(after)
    if tree != other:
        raise AdapterError(f"jax: train_step must return the state's own tree, {tree}, got {other}.")
    out = []
    for (path, x), y in zip(was, leaves, strict=True):
        if not hasattr(x, "dtype"):
            out.append(_unchanged(path, x, y))
            continue
        where = jax.tree_util.keystr(path) or "the state"
        if not (hasattr(y, "dtype") or isinstance(y, int | float | complex)):
            raise AdapterError(f"jax: train_step must return {where} as it came, an array, got {type(y).__name__}.")
        y = y if hasattr(y, "dtype") else jnp.asarray(y)  # noqa: PLW2901
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise AdapterError(
                f"jax: train_step must return {where} as it came, {x.shape} of {x.dtype}, got {y.shape} of {y.dtype}. "
                f"Cast it with .astype(), or start from a state of that shape and dtype."
            )
        out.append(jax.lax.convert_element_type(y, y.dtype) if real(y) else y)  # a weak type would compile twice
    return jax.tree.unflatten(tree, out)


def _unchanged(path: Any, x: Any, y: Any) -> Any:
    """A constant of the program, or an error if it is a bool or a number that the step has changed."""
    moved = isinstance(y, jax.core.Tracer) or (y is not x and not np.array_equal(x, y))
    if moved and isinstance(x, bool | int | float | complex):
        raise AdapterError(
            f"jax: train_step changes {jax.tree_util.keystr(path)}, a Python {type(x).__name__}, which is a constant here. "
            f"Start it as an array, jnp.asarray({x!r}); if nothing changes it, leave out a jax.jit of your own."
        )
    return x


def scalar(what: str, x: Any) -> Any:
    if not (hasattr(x, "dtype") or isinstance(x, int | float | complex)):
        raise AdapterError(
            f"jax: {what} must be a real scalar, got {type(x).__name__}. Return the loss alone; whatever else moves with "
            f"training belongs to the state of a step of your own."
        )
    if jnp.shape(x) != () or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise AdapterError(
            f"jax: {what} must be a real scalar, got shape {jnp.shape(x)} of {jnp.result_type(x)}. Reduce it with a mean."
        )
    return jnp.asarray(x)


NOTE = (
    "Hyperparameters are traced arrays here, and some optax schedules want Python numbers.  Build the schedule of "
    "constants at height 1 and multiply it: lambda n: hyper['lr'] * optax.warmup_cosine_decay_schedule(0.0, 1.0, ...)(n).  "
    "Where it refuses what shapes it, as exponential_decay its decay_rate, write its formula: lambda n: hyper['lr'] * "
    "hyper['decay'] ** (n / 100).  Or put the schedule into the space, lr=log([...], knots=[...]), and pass hyper['lr'] to "
    "the optimizer."
)


@contextmanager
def advised() -> Iterator[None]:
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        if NOTE not in getattr(error, "__notes__", ()):
            error.add_note(NOTE)
        raise
