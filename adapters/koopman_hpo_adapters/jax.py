"""JAX: any pure training step becomes an `Inner`, any pair of losses a `Problem`.

    run = inner(train_step, val_loss, state, space)        # your step and your optimizer, differentiated whole
    model = problem(train_loss, val_loss, params)          # your losses under the core's fused optimizers

The tangents of the whole state (parameters, optimizer slots, running statistics) come from `vmap(jvp(train_step))` inside
one jit; a window of steps is one `lax.scan`.  `init`, `point`, `step` and `hypergradient` are the pure functions of which
`inner` is made, for those who scan or shard themselves.  Letters: p parameters, q tangent directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import jax
    import jax.numpy as jnp
    from jax.extend.core import Literal
    from jax.flatten_util import ravel_pytree
except ImportError as error:
    raise ImportError("koopman_hpo_adapters.jax needs JAX: pip install 'koopman-hpo[jax]'.") from error

from koopman_hpo import checks
from koopman_hpo.errors import AdapterError, HyperparameterError, ShapeError, nearest
from koopman_hpo.hyperparameters import Space
from koopman_hpo.problem import Array, Hypergradient, Linearisation, Problem

__all__ = [
    "Carry",
    "JaxInner",
    "JaxProblem",
    "Point",
    "TrainState",
    "TrainStep",
    "hypergradient",
    "init",
    "inner",
    "point",
    "problem",
    "step",
    "train_step",
]

_LONGEST = 256  # steps whose batches are put together for one scan: memory does not grow with the run
_FIXED = object()  # stands where a state's leaf is an array


class Carry(NamedTuple):
    """Training and its derivative; a pytree of arrays."""

    state: Any  # the user's pytree
    tangents: Any  # the same tree with leaves (q, *shape); None where a leaf is not real: counters, keys


class Point(NamedTuple):
    """The hyperparameters at one inner step, and what moves them; a pytree of arrays."""

    hyper: dict[str, Any]  # {name: () or (n,)} natural values
    seeds: dict[str, Any]  # {name: (q,) or (q, n)} d value / d phi


@jax.tree_util.register_pytree_node_class
class _Hyper(dict):
    """A dict that knows what to say about a name it lacks."""

    def __missing__(self, name: str) -> Any:
        raise AdapterError(
            f"jax: train_step or a loss reads hyper[{name!r}], but the space has {tuple(self)}.{nearest(str(name), self)} "
            f"Put it into the space, or write its value into your function."
        )

    def tree_flatten(self) -> tuple[list[Any], tuple[str, ...]]:
        return [self[name] for name in self], tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Iterable[Any]) -> _Hyper:
        return cls(zip(names, values, strict=True))


# -- pure functions ----------------------------------------------------------------------------------------------------


def init(state: Any, q: int) -> Carry:
    """The start: the state, a pytree of arrays, and zero tangents along q directions."""
    return Carry(state, jax.tree.map(lambda x: jnp.zeros((q, *x.shape), x.dtype) if _real(x) else None, state))


def point(space: Space, phi: ArrayLike, t: int = 0, dtype: Any = None) -> Point:
    """Natural values and their derivatives by phi (q,) at inner step t, for `step`; dtype: JAX's own by default."""
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
    floats, rest, tree = _split(carry.state)
    Z, structure = jax.tree.flatten(carry.tangents)

    def advance(floats: Any, hyper: Any) -> Any:
        after, loss = _checked(train_step, _join(floats, rest, tree), _Hyper(hyper), batch)
        moved, other, _ = _split(after)
        return moved, (other, loss)

    def along(z: Any, dhyper: Any) -> Any:
        return jax.jvp(_rooted(advance), (floats, at.hyper), (z, dhyper), has_aux=True)

    moved, Z, (other, loss) = jax.vmap(along, out_axes=(None, 0, None))(Z, at.seeds)
    return Carry(_join(moved, other, tree), jax.tree.unflatten(structure, Z)), loss


def hypergradient(val_loss: Callable[..., Any], carry: Carry, at: Point, batch: Any) -> tuple[Any, Any]:
    """The outer loss () and its derivative (q,) by phi at the carry; `val_loss` is `(state, hyper, batch) -> scalar`."""
    floats, rest, tree = _split(carry.state)
    value_of = lambda floats, hyper: _scalar("val_loss", val_loss(_join(floats, rest, tree), _Hyper(hyper), batch))
    value, (dE, direct) = jax.value_and_grad(value_of, argnums=(0, 1))(floats, at.hyper)
    through = [_rows(z, d) for z, d in zip(jax.tree.leaves(carry.tangents), dE, strict=True)]
    return value, sum([*through, *(_rows(at.seeds[name], direct[name]) for name in at.seeds)])


def _rows(A: Any, a: Any) -> Any:
    """(q,) inner products of each A[j] with a."""
    return jnp.dot(A.reshape(len(A), -1), a.ravel(), precision="highest")


def _real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _split(state: Any) -> tuple[list[Any], list[Any], Any]:
    """Real leaves, the other leaves with None in the real ones' places, and the tree."""
    leaves, tree = jax.tree.flatten(state)
    return [x for x in leaves if _real(x)], [None if _real(x) else x for x in leaves], tree


def _join(floats: Iterable[Any], rest: Iterable[Any], tree: Any) -> Any:
    left = iter(floats)
    return jax.tree.unflatten(tree, [next(left) if x is None else x for x in rest])


# -- the root of nothing -----------------------------------------------------------------------------------------------


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


def _rooted(f: Callable[..., Any]) -> Callable[..., Any]:
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
    return [read(v) for v in closed.jaxpr.outvars]


# -- what a user's function may return ---------------------------------------------------------------------------------


def _checked(train_step: Callable[..., Any], state: Any, hyper: Any, batch: Any) -> tuple[Any, Any]:
    with _advised():
        out = train_step(state, hyper, batch)
    if not (isinstance(out, tuple) and len(out) == 2):
        raise AdapterError(f"jax: train_step must return (state, loss), got {type(out).__name__}.")
    return _like(state, out[0]), _scalar("train_step's loss", out[1])


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
            out.append(x)
            continue
        y = y if hasattr(y, "dtype") else jnp.asarray(y)  # noqa: PLW2901
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            where = jax.tree_util.keystr(path) or "the state"
            raise AdapterError(
                f"jax: train_step must return {where} as it came, {x.shape} of {x.dtype}, got {y.shape} of {y.dtype}. "
                f"Cast it with .astype(), or start from a state of that shape and dtype."
            )
        out.append(jax.lax.convert_element_type(y, y.dtype) if _real(y) else y)  # a weak type would compile twice
    return jax.tree.unflatten(tree, out)


def _scalar(what: str, x: Any) -> Any:
    if jnp.shape(x) != () or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise AdapterError(
            f"jax: {what} must be a real scalar, got shape {jnp.shape(x)} of {jnp.result_type(x)}. Reduce it with a mean."
        )
    return jnp.asarray(x)


@contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        error.add_note(
            "Hyperparameters are traced arrays here.  Some optax schedules want Python numbers: put the schedule into the "
            "space instead, lr=log([...], knots=[...]), and pass hyper['lr'] to the optimizer."
        )
        raise


# -- a training step from an optax optimizer ---------------------------------------------------------------------------


class TrainState(NamedTuple):
    """What `train_step` carries."""

    params: Any
    opt_state: Any
    key: Any = None  # of dropout and the like; None where there is none


@dataclass(frozen=True)
class TrainStep:
    """A training step `(state, hyper, batch) -> (state, loss)`; made by `train_step`."""

    loss: Callable[..., Any]
    optimizer: Callable[[Mapping[str, Any]], Any]

    def init(self, params: Any, space: Space, *, key: Any = None) -> TrainState:
        """The state before the first step.

        Args:
          params: pytree; leaves that are not real arrays (an Equinox model's functions) stay as they are.
          space: what is tuned.  key: a PRNG key if the loss takes one.
        """
        hyper = _Hyper(space.at(space.phi0, 0).values)
        return TrainState(params, self.optimizer(hyper).init(_trained(params)), key)

    def __call__(self, state: TrainState, hyper: Mapping[str, Any], batch: Any) -> tuple[TrainState, Any]:
        key, extra = state.key, []
        if key is not None:
            key, *extra = jax.random.split(key)
        params = _trained(state.params)
        value = lambda moved: self.loss(_put(moved, state.params), hyper, batch, *extra)
        loss, g = jax.value_and_grad(value)(params)
        updates, opt_state = self.optimizer(hyper).update(g, state.opt_state, params)
        params = jax.tree.map(lambda x, u: (x + u).astype(x.dtype), params, updates)
        return TrainState(_put(params, state.params), opt_state, key), loss


def train_step(loss: Callable[..., Any], optimizer: Callable[[Mapping[str, Any]], Any]) -> TrainStep:
    """A training step for `inner` from a loss and an optax optimizer that is built inside the step.

        step = train_step(loss, lambda hyper: optax.adamw(hyper["lr"], b2=hyper["b2"]))
        run = inner(step, val_loss, step.init(params, space), space, params=lambda state: state.params)

    Args:
      loss: `(params, hyper, batch) -> scalar`, or `(params, hyper, batch, key)` if `init` is given a key: a fresh one a
        step.
      optimizer: `hyper -> optax.GradientTransformation`.  It sees traced values: where an optax schedule refuses them,
        tune a schedule in the space (`log([...], knots=[...])`) and pass `hyper["lr"]` on.
    """
    for name, function in (("loss", loss), ("optimizer", optimizer)):
        _callable("train_step", name, function)
    return TrainStep(loss, optimizer)


def _callable(call: str, name: str, function: Any) -> None:
    if not callable(function):
        raise AdapterError(f"jax.{call}: {name} must be a function, got {type(function).__name__}.")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _trained(params: Any) -> Any:
    """params with None for every leaf that is not a real array."""
    return jax.tree.map(lambda x: x if _is_array(x) and _real(x) else None, params)


def _put(moved: Any, params: Any) -> Any:
    left = iter(jax.tree.leaves(moved))
    return jax.tree.map(lambda x: next(left) if _is_array(x) and _real(x) else x, params)


# -- inner -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Lifted:
    """A function of the user's pytree as one of its arrays; equal if it holds the same, so that compiled code is shared."""

    function: Callable[..., Any]
    tree: Any
    constants: tuple[Any, ...]  # leaves that are not arrays, `_FIXED` where they are
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (id(self.function), self.tree, tuple(map(id, self.constants))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lifted) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def state(self, arrays: Iterable[Any]) -> Any:
        left = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(left) if c is _FIXED else c for c in self.constants])

    def __call__(self, arrays: Any, hyper: Any, batch: Any) -> Any:
        with _advised():
            return self.function(self.state(arrays), hyper, batch)

    def train(self, arrays: Any, hyper: Any, batch: Any) -> tuple[list[Any], Any]:
        after, loss = _checked(self.function, self.state(arrays), hyper, batch)
        return [x for x, c in zip(jax.tree.leaves(after), self.constants, strict=True) if c is _FIXED], loss


@partial(jax.jit, static_argnums=0)
def _step(train: _Lifted, carry: Carry, at: Point, batch: Any) -> Any:
    return step(train.train, carry, at, batch)


@partial(jax.jit, static_argnums=0)
def _plain(train: _Lifted, state: Any, at: Point, batch: Any) -> Any:
    return train.train(state, _Hyper(at.hyper), batch)


_look = partial(jax.jit, static_argnums=0)(hypergradient)


class _Track(NamedTuple):
    """What a scan reads: fixed, by step (n, ...), and by recorded hypergradient (m, ...)."""

    fixed: dict[str, Any]
    steps: dict[str, Any]
    ends: dict[str, Any]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _window(train: _Lifted, val: _Lifted, m: int, every: int, carry: Carry, track: _Track, val_batch: Any) -> Any:
    """m times `every` steps and a hypergradient: carry, losses (m, every), H (m, q)."""

    def one(carry: Carry, now: dict[str, Any]) -> Any:
        now = track.fixed | now
        return step(train.train, carry, now["at"], now["batch"])

    def several(carry: Carry, part: Any) -> Any:
        steps, end = part
        carry, losses = jax.lax.scan(one, carry, steps, length=every)
        return carry, (losses, hypergradient(val, carry, (track.fixed | end)["at"], val_batch)[1])

    steps = jax.tree.map(lambda x: x.reshape(m, every, *x.shape[1:]), track.steps)
    carry, (losses, H) = jax.lax.scan(several, carry, (steps, track.ends), length=m)
    return carry, losses, H


def inner(
    train_step: Callable[..., Any],
    val_loss: Callable[..., Any],
    state: Any,
    space: Space,
    *,
    params: Callable[[Any], Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> JaxInner:
    """A pure training step as an `Inner`: for `Tuner`, the exact tools and checkpoints.

    Args:
      train_step: `(state, hyper, batch) -> (state, loss)`, pure; hyper is {name: natural value} of everything in the
        space.  A name it never reads has a hypergradient of exactly zero.
      val_loss: `(state, hyper, batch) -> scalar`, the outer loss.
      state: any pytree: parameters, optimizer state, running statistics, integer counters, PRNG keys.  Leaves that are not
        arrays (an Equinox model's functions) are kept as they are.
      space: what is tuned.
      params: `state -> subtree`, which part `run.params` and the tangents' norm speak of, `lambda state: state.params`;
        default: all of it.
      loss: `(state, hyper, batch) -> scalar`, the inner loss; only `linearise` needs it.

    Raises:
      AdapterError: a function is not callable, the state has no real leaf or a complex one, or params picks none of its
        leaves; later, from a call: train_step returns another tree, shapes or dtypes, a loss is no scalar, or the
        loss is not finite at the first step.
    """
    return JaxInner(train_step, val_loss, state, space, params=params, loss=loss)


class JaxInner:
    """An `Inner` over a JAX training step; made by `inner`.

    Attributes:
      space: what is tuned.  t: inner steps taken.  phi: (q,) the hyperparameters of the last step.
      state: the user's pytree as it stands.  carry: the same as a flat list of arrays, with its tangents.
    """

    def __init__(self, train_step, val_loss, state, space, *, params=None, loss=None):
        if not isinstance(space, Space):
            raise HyperparameterError(f"jax.inner: space must be a Space, got {type(space).__name__}.")
        for name, function in (("train_step", train_step), ("val_loss", val_loss), ("params", params), ("loss", loss)):
            if function is not None or name in ("train_step", "val_loss"):
                _callable("inner", name, function)
        leaves, tree = jax.tree.flatten(state)
        constants = tuple(_FIXED if _is_array(x) or isinstance(x, int | float | complex) else x for x in leaves)
        arrays = [_owned(x) for x, c in zip(leaves, constants, strict=True) if c is _FIXED]
        _check_arrays(arrays)
        lift = lambda f: _Lifted(f, tree, constants)
        self._train, self._val, self._loss = lift(train_step), lift(val_loss), None if loss is None else lift(loss)
        self.space, self._t, self.phi = space, 0, space.phi0.copy()
        self.carry = init(arrays, space.q)
        self._dtype = np.float64 if any(x.dtype == np.float64 for x in arrays) else np.float32
        self._where, self._unravel = self._select(params)
        self._cache: tuple[tuple[bytes, int], Point] | None = None

    def _select(self, params: Callable[[Any], Any] | None) -> tuple[list[int], Callable[[Any], Any]]:
        """Which arrays are the parameters, and how (p,) becomes the user's subtree of them again."""
        places = self._train.state(range(len(self.carry.state)))
        part = places if params is None else params(places)
        chosen, tree = jax.tree.flatten(part)
        known = [isinstance(i, int) and 0 <= i < len(self.carry.state) for i in chosen]
        arrays = self.carry.state
        where = [i for i, k in zip(chosen, known, strict=True) if k and _real(arrays[i])]
        if not where:
            raise AdapterError(
                "jax.inner: params must pick a subtree of the state with real leaves, as lambda state: state.params does."
            )
        unravel = ravel_pytree([arrays[i] for i in where])[1]

        def tree_of(flat: Any) -> Any:
            found = dict(zip(where, unravel(jnp.asarray(flat)), strict=True))
            now = self.carry.state
            return jax.tree.unflatten(tree, [found.get(i, now[i]) if k else i for i, k in zip(chosen, known, strict=True)])

        return where, tree_of

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def t(self) -> int:
        return self._t

    @property
    def state(self) -> Any:
        """The user's pytree."""
        return self._train.state(self.carry.state)

    @property
    def params(self) -> Array:
        """(p,) a copy of the current parameters, flat; `unravel` gives them their tree."""
        return np.concatenate([np.asarray(self.carry.state[i]).ravel() for i in self._where])

    @property
    def tangents(self) -> Array:
        """(q, p): a copy of d params / d phi."""
        return np.concatenate([np.asarray(z).reshape(self.space.q, -1) for z in self._Z()], axis=1)

    def unravel(self, params: ArrayLike) -> Any:
        """The subtree that `params` (p,) was made of: `run.unravel(result.params)` is the trained model."""
        if np.shape(params) != self.params.shape:
            raise ShapeError(f"jax.inner.unravel: params must have shape {self.params.shape}, got {np.shape(params)}.")
        return self._unravel(params)

    def tangent_norm(self) -> float:
        """Frobenius norm of the parameters' tangents."""
        return math.sqrt(sum(float(jnp.vdot(z, z)) for z in self._Z()))

    def __repr__(self) -> str:
        return f"jax.inner(p={self.params.size}, q={self.space.q}, t={self.t}, tuned={self.space.names})"

    def _Z(self) -> list[Any]:
        return [self.carry.tangents[i] for i in self._where]

    # -- running -------------------------------------------------------------------------------------------------------

    def step(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> float:
        """As `koopman_hpo.inner.CoreInner.step`; in every error the state is as before."""
        phi, at = self._prepare(phi)
        if tangents and self.space.q:
            carry, loss = _step(self._train, self.carry, at, batch)
        else:
            state, loss = _plain(self._train, self.carry.state, at, batch)
            carry = self.carry._replace(state=state)
        self._accept(phi, carry, 1, float(loss))
        return float(loss)

    def hypergradient(self, batch: Any) -> Hypergradient:
        """The derivative of the outer loss on `batch` with respect to the hyperparameters, at the current state."""
        phi, at = self._prepare(self.phi)
        value, h = _look(self._val, self.carry, at, batch)
        h = np.array(h, np.float64)
        return Hypergradient(float(value), h, self.space.gradient(phi, h), self.t)

    def run(self, phi: ArrayLike, batches: Iterable[Any], val_batch: Any, every: int = 1) -> tuple[Array, Array]:
        """A whole window, in scans of up to 256 steps where the batches have equal shapes; else step by step.

        Returns:
          losses (n,) before each step, and the trajectory H (n // every, q).
        """
        every = checks.count("jax.inner.run", "every", every) or 1
        losses: list[Any] = []
        H: list[Any] = []
        batches = iter(batches)
        while part := list(itertools.islice(batches, every * max(1, _LONGEST // every))):
            m = len(part) // every
            alike = m > 0 and self.space.q > 0 and _alike(part)
            if alike:
                found, h = self._scan(phi, part[: m * every], val_batch, every)
                losses.extend(found)
                H.extend(h)
            for n, batch in enumerate(part[m * every if alike else 0 :], 1):
                losses.append(self.step(phi, batch))
                if n % every == 0:
                    H.append(self.hypergradient(val_batch).grad)
        return np.array(losses, np.float64), np.array(H, np.float64).reshape(-1, self.space.q)

    def _scan(self, phi: ArrayLike, part: list[Any], val_batch: Any, every: int) -> tuple[Array, Array]:
        phi, at = self._prepare(phi)
        n = len(part)
        fixed: dict[str, Any] = {}
        steps: dict[str, Any] = {}
        ends: dict[str, Any] = {}
        if all(batch is part[0] for batch in part):
            fixed["batch"] = part[0]
        else:
            steps["batch"] = jax.tree.map(_stacked, *part)
        if self.space.scheduled:  # the hypergradient after a step belongs to the next one's values
            points = [self._prepare(phi, self.t + i)[1] for i in range(n + 1)]
            steps["at"] = jax.tree.map(_stacked, *points[:-1])
            ends["at"] = jax.tree.map(_stacked, *points[every::every])
        else:
            fixed["at"] = at
        track = _Track(fixed, steps, ends)
        carry, losses, H = _window(self._train, self._val, n // every, every, self.carry, track, val_batch)
        losses = np.asarray(losses, np.float64).ravel()
        self._accept(phi, carry, n, losses[0])
        return losses, np.asarray(H, np.float64)

    def forget(self, rho: float) -> None:
        """Scale the tangents, of the slots too, by 0 <= rho <= 1."""
        if not (isinstance(rho, int | float | np.number) and 0 <= rho <= 1):
            raise HyperparameterError(f"jax.inner.forget: rho must lie in [0, 1], got {rho!r}.")
        scale = (
            jnp.zeros_like if rho == 0 else lambda z: z * jnp.asarray(rho, z.dtype)
        )  # zero where the past is not finite too
        self.carry = self.carry._replace(tangents=jax.tree.map(scale, self.carry.tangents))

    def snapshot(self) -> dict[str, NDArray]:
        """Everything that a resumed run needs, as plain arrays; PRNG keys by their data."""
        out = {f"state/{i}": _stored(x) for i, x in enumerate(self.carry.state)}
        out |= {f"Z/{i}": _stored(z) for i, z in enumerate(self.carry.tangents) if z is not None}
        return out | {"t": np.array(self.t), "phi": self.phi.copy()}

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Go back to a snapshot of a run of the same model, space and optimizer.

        Raises:
          ShapeError: it lacks an array or holds one of another shape or dtype; the run is then as before.
        """
        for name, array in self.snapshot().items():
            got = snapshot.get(name)
            if got is None or got.shape != array.shape or got.dtype != array.dtype:
                came = "nothing" if got is None else f"{got.shape} of {got.dtype}"
                raise ShapeError(
                    f"jax.inner.restore: {name} must be {array.shape} of {array.dtype}, got {came}. The snapshot belongs "
                    f"to another model, space or optimizer."
                )
        state, Z = self.carry
        state = [_loaded(snapshot[f"state/{i}"], x) for i, x in enumerate(state)]
        Z = [None if z is None else _loaded(snapshot[f"Z/{i}"], z) for i, z in enumerate(Z)]
        self.carry, self._t, self.phi = Carry(state, Z), int(snapshot["t"]), np.array(snapshot["phi"])

    def linearise(self, batch: Any, val_batch: Any = None) -> Linearisation:
        """Gradients and Hessian-vector products by the parameters, of the inner loss on `batch` and of the outer loss on
        `val_batch` (default: `batch`).

        Raises:
          AdapterError: `inner` was not given `loss`.
        """
        if self._loss is None:
            raise AdapterError(
                "jax.inner.linearise: needs the inner loss; pass inner(..., loss=...), (state, hyper, batch) -> scalar."
            )
        theta = jnp.asarray(self.params)
        val_batch = batch if val_batch is None else val_batch
        gradient, hvp = self._derivatives("loss", self._loss, theta, batch)
        return Linearisation(gradient, hvp, *self._derivatives("val_loss", self._val, theta, val_batch))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _derivatives(self, what: str, loss: _Lifted, theta: Any, batch: Any) -> tuple[Array, Callable[[Array], Array]]:
        arrays, hyper = list(self.carry.state), self._prepare(self.phi)[1].hyper
        unravel = ravel_pytree([arrays[i] for i in self._where])[1]

        def value(theta: Any) -> Any:
            moved = dict(zip(self._where, unravel(theta), strict=True))
            return _scalar(what, loss([moved.get(i, x) for i, x in enumerate(arrays)], _Hyper(hyper), batch))

        gradient = jax.jit(jax.grad(value))
        push = jax.jit(jax.vmap(lambda v: jax.jvp(gradient, (theta,), (v,))[1]))
        flat = np.asarray(theta)
        return np.array(gradient(theta)), lambda V: np.array(push(checks.rows("jax.inner.linearise.hvp", V, flat)))

    def _prepare(self, phi: ArrayLike, t: int | None = None) -> tuple[Array, Point]:
        phi = self.space.check(phi, "jax.inner.step")
        t = self._t if t is None else t
        key = (phi.tobytes(), t if self.space.scheduled else 0)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, point(self.space, phi, t, self._dtype))
        return phi, self._cache[1]

    def _accept(self, phi: Array, carry: Carry, n: int, loss: float) -> None:
        if self._t == 0 and not math.isfinite(loss):
            raise AdapterError(
                f"jax.inner.step: the inner loss must be finite at the initial state, got {loss}. Look for NaN or inf in "
                f"the batch, or scale down the initialisation."
            )
        self.carry, self._t, self.phi = carry, self._t + n, phi.copy()


def _owned(x: Any) -> Any:
    """A JAX array of its own, strongly typed: later changes of a NumPy array do not reach it."""
    return x if isinstance(x, jax.Array) and not getattr(x, "weak_type", False) else jnp.array(x, jnp.result_type(x))


def _check_arrays(arrays: list[Any]) -> None:
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in arrays):
        raise AdapterError("jax.inner: the state has a complex leaf. Keep its real and imaginary parts as two leaves.")
    if not any(map(_real, arrays)):
        raise AdapterError("jax.inner: the state has no real leaf; its parameters must be float arrays.")


def _alike(batches: list[Any]) -> bool:
    """Whether batches can be stacked: one tree, one shape and dtype a leaf."""
    form = lambda batch: (jax.tree.structure(batch), [(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(batch)])
    first = form(batches[0])
    return all(batch is batches[0] or form(batch) == first for batch in batches[1:])


def _stacked(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _stored(x: Any) -> NDArray:
    """As NumPy's own dtypes: keys by their data, bfloat16 and its like by their bits."""
    a = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    return a.view(f"u{a.dtype.itemsize}") if a.dtype.kind == "V" else a


def _loaded(a: NDArray, like: Any) -> Any:
    if _is_key(like):
        x = jax.random.wrap_key_data(jnp.array(a), impl=jax.random.key_impl(like))
    else:
        x = jnp.array(a.view(like.dtype) if a.dtype != like.dtype else a)
    return jax.device_put(x, like.sharding) if like.committed else x


# -- problem -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JaxProblem(Problem):
    """A `Problem` of JAX losses; `unravel` gives flat parameters (p,) their tree again, `segments` are its leaves."""

    unravel: Any = None


def problem(
    train_loss: Callable[..., Any],
    val_loss: Callable[..., Any],
    params: Any,
    *,
    hyper: Iterable[str] | None = None,
) -> JaxProblem:
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
        _callable("problem", name, function)
    if isinstance(hyper, str):
        raise AdapterError(f"jax.problem: hyper must be a collection of names, got the string {hyper!r}: use ({hyper!r},).")
    trained = jax.tree.leaves(_trained(params))
    if not trained:
        raise AdapterError("jax.problem: params has no real leaf; parameters must be float32 or float64 arrays.")
    flat, unravel = ravel_pytree(trained)
    tree_of = lambda theta: _put(unravel(jnp.asarray(theta, flat.dtype)), params)
    value = lambda what, loss: lambda th, hyper, batch: _scalar(what, loss(tree_of(th), _Hyper(hyper), batch))
    compiled = _Compiled(value("train_loss", train_loss), value("val_loss", val_loss), np.dtype(flat.dtype))
    return JaxProblem(
        params=np.array(flat),
        grad_jvp=compiled.grad_jvp,
        outer=compiled.outer,
        hyper=None if hyper is None else frozenset(hyper),
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
        with _advised():
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
