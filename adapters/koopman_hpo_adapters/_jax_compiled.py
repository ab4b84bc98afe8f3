"""The compiled functions of a JAX `Inner`: a step, a plain step, a hypergradient, a whole window as one scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax

from ._jax_contract import Hyper, advised, checked, scalar
from ._jax_functions import Carry, Point, hypergradient, step

FIXED = object()  # stands where a state's leaf is an array


@dataclass(frozen=True, eq=False)
class Lifted:
    """A function of the user's pytree as one of its arrays; equal if it holds the same, so that compiled code is shared."""

    function: Callable[..., Any]
    tree: Any
    constants: tuple[Any, ...]  # leaves that are not arrays, `FIXED` where they are
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (id(self.function), self.tree, tuple(map(id, self.constants))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lifted) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def state(self, arrays: Iterable[Any]) -> Any:
        left = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(left) if c is FIXED else c for c in self.constants])

    def __call__(self, arrays: Any, hyper: Any, batch: Any) -> Any:
        with advised():
            return self.function(self.state(arrays), hyper, batch)

    def train(self, arrays: Any, hyper: Any, batch: Any) -> tuple[list[Any], Any]:
        after, loss = checked(self.function, self.state(arrays), hyper, batch)
        return [x for x, c in zip(jax.tree.leaves(after), self.constants, strict=True) if c is FIXED], loss


@partial(jax.jit, static_argnums=0)
def one_step(train: Lifted, carry: Carry, at: Point, batch: Any) -> Any:
    carry, loss = step(train.train, carry, at, batch)
    return carry, _wide(loss)


@partial(jax.jit, static_argnums=0)
def plain_step(train: Lifted, state: Any, at: Point, batch: Any) -> Any:
    state, loss = train.train(state, Hyper(at.hyper), batch)
    return state, _wide(loss)


def _wide(loss: Any) -> Any:
    """In JAX's widest type: losses are added up where they are."""
    return loss.astype(jax.dtypes.canonicalize_dtype(float))


look = partial(jax.jit, static_argnums=0)(hypergradient)


class Frozen(NamedTuple):
    """A loss as a function of some arrays of the state, the others and the hyperparameters standing still."""

    loss: Lifted
    what: str  # its name in an error
    where: tuple[int, ...]  # places of those arrays

    def at(self, moved: Any, arrays: Any, hyper: Any, batch: Any) -> Any:
        arrays = list(arrays)
        for i, x in zip(self.where, moved, strict=True):
            arrays[i] = x
        return scalar(self.what, self.loss(arrays, Hyper(hyper), batch))


@partial(jax.jit, static_argnums=0)
def gradient(frozen: Frozen, moved: Any, *still: Any) -> Any:
    """By each of the moved arrays; still: arrays, hyper, batch."""
    return jax.grad(frozen.at)(moved, *still)


@partial(jax.jit, static_argnums=0)
def hessian_products(frozen: Frozen, moved: Any, V: Any, *still: Any) -> Any:
    """V: a list as moved is, rows (n, ...) in front."""
    push = lambda v: jax.jvp(lambda x: jax.grad(frozen.at)(x, *still), (moved,), (v,))[1]
    return jax.vmap(push)(V)


class Track(NamedTuple):
    """What a scan reads: fixed, by step (n, ...), and by recorded hypergradient (m, ...)."""

    fixed: dict[str, Any]
    steps: dict[str, Any]
    ends: dict[str, Any]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def scanned(train: Lifted, val: Lifted, m: int, every: int, carry: Carry, track: Track, val_batch: Any) -> Any:
    """m times `every` steps and a hypergradient: carry, losses (m, every), outer losses (m,), H (m, q)."""

    def one(carry: Carry, now: dict[str, Any]) -> Any:
        now = track.fixed | now
        return step(train.train, carry, now["at"], now["batch"])

    def several(carry: Carry, part: Any) -> Any:
        steps, end = part
        carry, losses = jax.lax.scan(one, carry, steps, length=every)
        return carry, (losses, *hypergradient(val, carry, (track.fixed | end)["at"], val_batch))

    steps = jax.tree.map(lambda x: x.reshape(m, every, *x.shape[1:]), track.steps)
    carry, (losses, values, H) = jax.lax.scan(several, carry, (steps, track.ends), length=m)
    return carry, losses, values, H
