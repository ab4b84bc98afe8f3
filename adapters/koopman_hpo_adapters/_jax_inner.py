"""A whole JAX training step as an `Inner`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import ArrayLike, NDArray

from koopman_hpo import checks, snapshots
from koopman_hpo.batches import expect
from koopman_hpo.directions import Directions
from koopman_hpo.errors import AdapterError, HyperparameterError, ShapeError
from koopman_hpo.problem import Array, Hypergradient, Linearisation
from koopman_hpo.space import Space

from ._jax_compiled import FIXED, Frozen, Lifted, Track, gradient, hessian_products, look, one_step, plain_step, scanned
from ._jax_contract import expect_function, expect_real, expect_space
from ._jax_functions import Carry, Point, init, point
from ._jax_optax import TrainStep, constants
from ._jax_tree import kept, loaded, owned, real, same_form, stacked, stored

LONGEST = 256  # steps whose batches are put together for one scan: memory does not grow with the run


class Place(int):
    """Where an array stands among all of a state's; a number of the user's own is none."""


class Look(NamedTuple):
    """A hypergradient that nobody has waited for."""

    phi: Array  # (q,)
    t: int  # inner steps taken
    value: Any  # () the outer loss
    h: Any  # (q,)


def inner(
    train_step: Callable[..., Any],
    val_loss: Callable[..., Any],
    state: Any,
    space: Space,
    *,
    params: Callable[[Any], Any] | None = None,
    loss: Callable[..., Any] | None = None,
    directions: int | None = None,
    seed: int = 0,
) -> JaxInner:
    """A pure training step as an `Inner`: for `Tuner`, the exact tools and checkpoints.

    Args:
      train_step: `(state, hyper, batch) -> (state, loss)`, pure; hyper is {name: natural value} of everything in the
        space.  A name it never reads has a hypergradient of exactly zero.
      val_loss: `(state, hyper, batch) -> scalar`, the outer loss.
      state: any pytree: parameters, optimizer state, running statistics, integer counters, PRNG keys.  Leaves that are not
        arrays (functions, bools, and Python numbers among the `params` of a `TrainState`) are constants of the program.
      space: what is tuned.
      params: `state -> subtree`, which part `run.params` and the tangents' norm speak of, `lambda state: state.params`;
        default: all of it.
      loss: `(state, hyper, batch) -> scalar`, the inner loss; only `linearise` needs it; default: that of a step made by
        `train_step`.
      directions: random tangent directions in place of all q, an unbiased estimate; seed: of them.

    Raises:
      HyperparameterError: space is none, more directions than hyperparameters.
      AdapterError: a function is not callable, the state has no real leaf or a complex one, or params picks none of its
        leaves; later, from a call: train_step returns another tree, shapes or dtypes, a loss is no scalar, or the
        loss is not finite at the first step.
    """
    return JaxInner(train_step, val_loss, state, space, params=params, loss=loss, directions=directions, seed=seed)


class JaxInner:
    """An `Inner` over a JAX training step; made by `inner`.

    Attributes:
      space: what is tuned.  t: inner steps taken.  phi: (q,) the hyperparameters of the last step.
      state: the user's pytree as it stands.  carry: the same as a flat list of arrays, with its tangents.
      directions: None, or (s, q) the random directions that the s tangents follow.
    """

    def __init__(self, train_step, val_loss, state, space, *, params=None, loss=None, directions=None, seed=0):
        expect_space("inner", space)
        for name, function in (("train_step", train_step), ("val_loss", val_loss), ("params", params), ("loss", loss)):
            if function is not None or name in ("train_step", "val_loss"):
                expect_function("inner", name, function)
        leaves, tree = jax.tree.flatten(state)
        held = tuple(x if c else FIXED for x, c in zip(leaves, constants(state), strict=True))
        arrays = [owned(x) for x, c in zip(leaves, held, strict=True) if c is FIXED]
        expect_real(arrays)
        lift = lambda f: Lifted(f, tree, held)
        loss = train_step.loss_at if loss is None and isinstance(train_step, TrainStep) else loss
        self._train, self._val, self._loss = lift(train_step), lift(val_loss), None if loss is None else lift(loss)
        self.space: Space = space
        self._t, self.phi = 0, self.space.phi0.copy()
        self._random = Directions("jax.inner", directions, space.q, seed)
        self._dtype = np.float64 if any(x.dtype == np.float64 for x in arrays) else np.float32
        self.carry = init(arrays, space.q, self._along())
        self._where, self._unravel = self._select(params)
        self._cache: tuple[tuple[bytes, int], Point] | None = None

    def _select(self, params: Callable[[Any], Any] | None) -> tuple[list[int], Callable[[Any], Any]]:
        """Which arrays are the parameters, and how (p,) becomes the user's subtree of them again."""
        places = self._train.state(map(Place, range(len(self.carry.state))))
        part = places if params is None else params(places)
        chosen, tree = jax.tree.flatten(part)
        known = [isinstance(i, Place) for i in chosen]
        arrays = self.carry.state
        where = [int(i) for i, k in zip(chosen, known, strict=True) if k and real(arrays[i])]
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
    def directions(self) -> Array | None:
        return self._random.D

    @property
    def params(self) -> Array:
        """(p,) a copy of the current parameters, flat; `unravel` gives them their tree."""
        return np.concatenate([np.asarray(self.carry.state[i]).ravel() for i in self._where])

    @property
    def tangents(self) -> Array:
        """(q, p), or (s, p) along random directions: a copy of d params / d phi."""
        return np.concatenate([np.asarray(z).reshape(len(z), -1) for z in self._Z()], axis=1)

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

    def step(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> Any:
        """As `koopman_hpo.inner.CoreInner.step`; in every error the state is as before.

        The loss is an array () of JAX's, so that the host runs ahead: `float(loss)` waits for it.
        """
        phi, at = self._prepare(phi)
        if tangents and self.space.q:
            carry, loss = one_step(self._train, self.carry, at, batch)
        else:
            state, loss = plain_step(self._train, self.carry.state, at, batch)
            carry = self.carry._replace(state=state)
        self._accept(phi, carry, 1, loss)
        return loss

    def hypergradient(self, batch: Any) -> Hypergradient:
        """The derivative of the outer loss on `batch` with respect to the hyperparameters, at the current state."""
        return self.recorded([self.record(batch)])[0]

    def run(self, phi: ArrayLike, batches: Iterable[Any], val_batch: Any, every: int = 1) -> tuple[Array, Array]:
        """A whole window; see `window`.

        Returns:
          losses (n,) before each step, and the trajectory H (n // every, q).
        """
        losses, found = self.window(phi, batches, val_batch, every)
        return losses, np.array([h.grad for h in found]).reshape(-1, self.space.q)

    def window(
        self, phi: ArrayLike, batches: Iterable[Any], val_batch: Any, every: int = 1
    ) -> tuple[Array, list[Hypergradient]]:
        """Steps and hypergradients without a way back to Python between them: scans of up to 256 steps where the batches
        have equal shapes, else step by step.  In every error the state is as before the window.

        Args:
          phi: (q,) held during the window.  batches: one an inner step.  val_batch: of the outer loss.
          every: inner steps between hypergradients.

        Returns:
          losses (n,) before each step, and n // every hypergradients.
        """
        every = checks.count("jax.inner.run", "every", every) or 1
        expect("jax.inner.run", batches)
        losses: list[float] = []
        found: list[Hypergradient] = []
        before, batches = (self.carry, self._t, self.phi), iter(batches)
        try:
            while part := list(itertools.islice(batches, every * max(1, LONGEST // every))):
                n = len(part) - len(part) % every
                n = n if n and self.space.q and same_form(part) else 0
                for take, some in ((self._scan, part[:n]), (self._walk, part[n:])):
                    if some:
                        more, h = take(phi, some, val_batch, every)
                        losses, found = losses + more, found + h
        except BaseException:
            self.carry, self._t, self.phi = before
            raise
        return np.array(losses, np.float64), found

    def _walk(self, phi: ArrayLike, part: list[Any], val_batch: Any, every: int) -> tuple[list[float], list[Hypergradient]]:
        losses, found = [], []
        for n, batch in enumerate(part, 1):
            losses.append(self.step(phi, batch))
            if n % every == 0:
                found.append(self.record(val_batch))
        return [float(x) for x in jax.device_get(losses)], self.recorded(found)

    def record(self, batch: Any) -> Look:
        """`hypergradient`, for which nobody waits until it is `recorded`."""
        phi, at = self._prepare(self.phi)
        return Look(phi, self.t, *look(self._val, self.carry, at, batch))

    def recorded(self, looks: list[Look]) -> list[Hypergradient]:
        """What `record` gave, on the host, all at once."""
        found = []
        for phi, t, value, h in jax.device_get(looks):
            grad = np.array(h, np.float64)
            found.append(Hypergradient(float(value), grad, self.space.gradient(phi, grad), int(t)))
        return found

    def _scan(self, phi: ArrayLike, part: list[Any], val_batch: Any, every: int) -> tuple[list[float], list[Hypergradient]]:
        phi, at = self._prepare(phi)
        n, start = len(part), self._t
        track = Track({}, {}, {})
        if all(batch is part[0] for batch in part):
            track.fixed["batch"] = part[0]
        else:
            track.steps["batch"] = jax.tree.map(stacked, *part)
        if self.space.scheduled:  # the hypergradient after a step belongs to the next one's values
            points = [self._prepare(phi, start + i)[1] for i in range(n + 1)]
            track.steps["at"] = jax.tree.map(stacked, *points[:-1])
            track.ends["at"] = jax.tree.map(stacked, *points[every::every])
        else:
            track.fixed["at"] = at
        carry, *out = scanned(self._train, self._val, n // every, every, self.carry, track, val_batch)
        each, values, H = (np.array(x, np.float64) for x in out)
        self._accept(phi, carry, n, each[0, 0])
        ends = range(start + every, start + n + 1, every)
        found = [
            Hypergradient(float(value), h, self.space.gradient(phi, h), t)
            for value, h, t in zip(values, H, ends, strict=True)
        ]
        return each.ravel().tolist(), found

    def forget(self, rho: float) -> None:
        """Scale the tangents, of the slots too, by 0 <= rho <= 1.  At 0 random directions, if any, are drawn afresh."""
        if not (isinstance(rho, int | float | np.number) and 0 <= rho <= 1):
            raise HyperparameterError(f"jax.inner.forget: rho must lie in [0, 1], got {rho!r}.")
        scale = (
            jnp.zeros_like if rho == 0 else lambda z: z * jnp.asarray(rho, z.dtype)
        )  # zero where the past is not finite too
        if rho == 0:
            self._random.draw()
        self.carry = self.carry._replace(tangents=jax.tree.map(scale, self.carry.tangents), directions=self._along())

    def snapshot(self) -> dict[str, NDArray]:
        """Everything that a resumed run needs, as plain arrays; PRNG keys by their data."""
        return {name: stored(x) for name, x in self.mark().items()}

    def mark(self) -> dict[str, Any]:
        """A snapshot of JAX's own arrays, where they are, with nothing copied: to go back to, and not for files."""
        out = {f"state/{i}": kept(x) for i, x in enumerate(self.carry.state)}
        out |= {f"Z/{i}": kept(z) for i, z in enumerate(self.carry.tangents) if z is not None}
        return out | {"t": np.array(self.t), "phi": self.phi.copy()} | self._random.snapshot()

    def mark_params(self) -> Any:
        """`params` where they are."""
        return jnp.concatenate([self.carry.state[i].ravel() for i in self._where])

    def buffers(self) -> dict[str, Any]:
        """The state's other arrays, where they are: batch statistics among them."""
        return {f"state/{i}": kept(x) for i, x in enumerate(self.carry.state) if i not in self._where}

    def adopt(self, phi: ArrayLike, params: Any, buffers: Mapping[str, Any]) -> None:
        """Stand at these hyperparameters (q,), parameters (p,) and buffers; the rest stays as it is."""
        flat, unravel = ravel_pytree([self.carry.state[i] for i in self._where])
        if np.shape(params) != flat.shape:
            raise ShapeError(f"jax.inner.adopt: params must be {flat.shape}, as `params` gives, got {np.shape(params)}.")
        leaves = unravel(jnp.asarray(params))
        moved = {f"state/{i}": kept(x) for i, x in zip(self._where, leaves, strict=True)}
        self.restore(self.mark() | {"phi": np.array(phi)} | moved | dict(buffers))

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Go back to a snapshot of a run of the same model, space and optimizer.

        Raises:
          ShapeError: it lacks an array or holds one of another shape or dtype; the run is then as before.
        """
        snapshots.check("jax.inner.restore", snapshot, self.mark())
        state, Z, _ = self.carry
        state = [loaded(snapshot[f"state/{i}"], x) for i, x in enumerate(state)]
        Z = [None if z is None else loaded(snapshot[f"Z/{i}"], z) for i, z in enumerate(Z)]
        self._random.restore("jax.inner.restore", snapshot)
        self.carry = Carry(state, Z, self._along())
        self._t, self.phi = int(snapshot["t"]), np.array(snapshot["phi"])

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
        val_batch = batch if val_batch is None else val_batch
        inner = self._derivatives(Frozen(self._loss, "loss", tuple(self._where)), batch)
        return Linearisation(*inner, *self._derivatives(Frozen(self._val, "val_loss", tuple(self._where)), val_batch))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _derivatives(self, frozen: Frozen, batch: Any) -> tuple[Array, Callable[[Array], Array]]:
        moved = [self.carry.state[i] for i in self._where]
        still = (self.carry.state, self._prepare(self.phi)[1].hyper, batch)
        theta, unravel = ravel_pytree(moved)
        flat = lambda rows, n: np.concatenate([np.asarray(x).reshape(n, -1) for x in rows], axis=1).astype(theta.dtype)

        def hvp(V: Array) -> Array:
            rows = jnp.asarray(checks.rows("jax.inner.linearise.hvp", V, np.asarray(theta)))
            return flat(hessian_products(frozen, moved, jax.vmap(unravel)(rows), *still), len(rows))

        return flat(gradient(frozen, moved, *still), 1)[0], hvp

    def _prepare(self, phi: ArrayLike, t: int | None = None) -> tuple[Array, Point]:
        phi = self.space.check(phi, "jax.inner.step")
        t = self._t if t is None else t
        key = (phi.tobytes(), t if self.space.scheduled else 0)
        if self._cache is None or self._cache[0] != key:
            at = point(self.space, phi, t, self._dtype)
            self._cache = (key, at if self.space.scheduled else jax.device_put(at))  # what stays crosses once
        return phi, self._cache[1]

    def _along(self) -> Any:
        return None if self.directions is None else jnp.asarray(self.directions, self._dtype)

    def _accept(self, phi: Array, carry: Carry, n: int, loss: Any) -> None:
        if self._t == 0 and not math.isfinite(loss):
            raise AdapterError(
                f"jax.inner.step: the inner loss must be finite at the initial state, got {loss}. Look for NaN or inf in "
                f"the batch, or scale down the initialisation."
            )
        self.carry, self._t, self.phi = carry, self._t + n, phi.copy()
