"""The core's own run: a `Problem` under a fused inner optimizer, on flat buffers that the engine owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks, devices, snapshots, tangent
from .batches import expect
from .directions import Directions
from .errors import HyperparameterError
from .kernels.arrays import Coefficients, Grads, TangentState
from .optimizers import Dual, Rule
from .oracle import Oracle
from .problem import Array, Hypergradient, Linearisation, Problem
from .space import Point, Space

_ARRAYS = ("theta", "slots", "Z", "dslots")
_CONNECTED = frozenset({"_kernel", "_layout", "_still", "_seen", "_cache", "_room"})


class Seen(NamedTuple):
    """Read-only views of the engine's buffers: what a model is shown."""

    theta: Array  # (p,)
    Z: Array  # (q, p)
    none: Array  # (0, p): no directions, for plain training


class Dynamics(NamedTuple):
    """What a model of the run's future needs: where it stands, and its derivatives anywhere else."""

    rule: Rule
    state: TangentState  # copies
    t: int  # inner steps taken
    phi: Array  # (q,) hyperparameters of the last step
    directions: Directions  # that the tangents follow
    groups: tuple[int, ...]  # (n,) lengths of the segments
    fixed: Mapping[str, Array]  # {optimizer hyperparameter that is not tuned: (n,)}
    loss_names: tuple[str, ...]  # hyperparameters that live in the loss
    grads: Callable[..., tuple[float, Grads]]  # (theta, point, Z, {loss name: seeds}, batch): views of the model's arrays
    linearise: Callable[..., Callable[..., Array]]  # (theta, point, batch, rough) -> push(V (n, p), seeds) -> (n, p)
    outer: Callable[..., tuple[float, Array, dict[str, Array]]]  # (theta, point, batch)
    outer_hvp: Callable[..., Array]  # (theta, point, V (n, p), batch) -> (n, p)


class _Cache(NamedTuple):
    """What `CoreInner` works out once for a phi (and, in a schedule, a step)."""

    key: tuple[bytes, int]
    phi: Array
    point: Point
    along: dict[str, Array]  # loss hyperparameters' seeds along the tangents' directions
    duals: dict[str, Dual]
    coefficients: Coefficients
    plain: Coefficients  # a view without directions
    step: list[int]  # the one for which the timed rows stand


class CoreInner:
    """The core's `Inner`: a `Problem` under one of the fused inner optimizers, on flat buffers it owns.

    Attributes:
      space: what is tuned.  problem: the model.  rule: the optimizer.  t: inner steps taken.
      phi: (q,) the hyperparameters of the last step.  params: (p,) a copy of the current parameters.
      directions: None, or (s, q) the random directions that the s tangents follow.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        rule: Rule,
        fixed: Mapping[str, Any],
        *,
        groups: Iterable[int] | None = None,
        directions: int | None = None,
        chunk: int | None = None,
        seed: int = 0,
        device: str | devices.Host | devices.Card = "cpu",
        tangents: str | None = None,
    ):
        call = f"inner.{rule.name}"
        self._device = devices.of(device)
        checks.problem(call, problem, space)
        self.space, self.rule = space, rule
        self._groups = checks.groups(call, problem, groups)
        self._loss_names = checks.names(call, problem, space, rule)
        self._oracle = Oracle(problem, self._device, self._loss_names)
        self._fixed = checks.fixed(call, rule, space, fixed, len(self._groups), problem.params.dtype)
        checks.domains(call, rule, space, len(self._groups), problem.params.dtype)
        self._chunk = checks.count(call, "chunk", chunk)
        self._along = Directions(call, directions, space.q, seed)
        self.phi = space.phi0.copy()
        self._t = 0
        kept = checks.kept(call, tangents, self._device.name, problem.params.dtype)
        self._state = self._device.init(problem.params, rule.slots, self._along.count, rule.fill, kept)
        self._connect()

    def _connect(self) -> None:
        """What follows from the rest: the kernel, its layout, and views of the state."""
        self._kernel = self._device.kernel(self.rule.kernel)
        self._layout = self._device.layout(tangent.blocks(self._groups), self.rule, self._state.theta.dtype)
        self._still = self._device.still(self._state)
        self._seen = Seen(*(self._device.shown(a) for a in (self._state.theta, self._state.Z, self._still.Z)))
        self._cache: _Cache | None = None
        self._room: Array | None = None  # (q, p) tangents of the gradient, where they come in chunks

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _CONNECTED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has views of its own state: those of the original would show the original's."""
        self.__dict__.update(state)
        self._connect()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def t(self) -> int:
        return self._t

    @property
    def problem(self) -> Problem:
        return self._oracle.problem

    @property
    def directions(self) -> Array | None:
        return self._along.D

    @property
    def params(self) -> Array:
        return self._device.get(self._state.theta)

    @property
    def tangents(self) -> Array:
        """(q, p), or (s, p) along random directions: a copy of dtheta / dphi."""
        return np.array(self._device.read(self._state.Z))

    @property
    def settings(self) -> str:
        """The optimizer, its variant, what it holds fixed, its groups and the model: what a checkpoint must fit."""
        fixed = ", ".join(f"{n}={v.tolist()}" for n, v in self._fixed.items())
        along = "" if self.directions is None else f", directions={self._along.count}"
        return f"{self.rule.name}(flag={self.rule.flag}, fill={self.rule.fill}, {fixed}, groups={self._groups}{along})" + (
            f" of {self.problem.name}" if self.problem.name else ""
        )

    @property
    def beside(self) -> str:
        """What keeps a step from being frozen: what it does beside its gradient and the rule, or where; "" for nothing."""
        return "" if self._device.name == "cpu" else f"device={self._device.name!r}"

    def tangent_norm(self) -> float:
        """Frobenius norm of the tangents of theta: grows exponentially where training is chaotic."""
        return self._device.norm(self._state.Z)

    def __repr__(self) -> str:
        p, q = self._state.theta.size, self.space.q
        return f"inner.{self.rule.name}(p={p}, q={q}, t={self.t}, tuned={self.space.names})"

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> float:
        """Advance state and tangents by one inner step.

        Args:
          phi: (q,) hyperparameters in the coordinates of `space`.
          batch: passed to the model as it is.
          tangents: False takes a plain training step and leaves the tangents as they are.

        Returns:
          The inner loss before the step; not finite if training diverged (nothing is raised then).  A loss that the model
          gives on a card is left there, `Unread`, until `float(loss)` asks for it.

        Raises:
          ShapeError, HyperparameterError: a wrong phi.
          AdapterError: the model broke its contract, or its loss is not finite at the very first step.
          In every case the state is as before.
        """
        cache = self._prepare(phi)
        loss, grads = self._grad_jvp(cache, batch, tangents)
        if self._t == 0:
            self._oracle.expect_finite(loss, grads.g)
        state, coefficients = (self._state, cache.coefficients) if tangents else (self._still, cache.plain)
        tangent.step(state, self._kernel, grads, coefficients, self._layout)
        self._t += 1
        self.phi = cache.phi
        return loss

    def hypergradient(self, batch: Any) -> Hypergradient:
        """The derivative of the outer loss on `batch` with respect to the hyperparameters, at the current state."""
        phi, point = self.phi, self._prepare(self.phi).point
        value, dE, direct = self._oracle.outer(self._seen.theta, point, batch)
        h = self._along.spread(self._device.project(self._state, dE))
        for name, d in direct.items():
            seed = point.seeds[name]
            h = h + (seed @ d if seed.ndim == 2 else seed * d)
        return Hypergradient(value, h, self.space.gradient(phi, h), self.t)

    def run(self, phi: ArrayLike, batches: Iterable[Any], val_batch: Any, every: int = 1) -> tuple[Array, Array]:
        """A whole window: a step a batch, and the hypergradient after each `every` of them.

        Returns:
          losses (n,) before each step, and the trajectory H (n // every, q).
        """
        every = checks.count("inner.run", "every", every) or 1
        expect("inner.run", batches)
        losses, H = [], []
        for n, batch in enumerate(batches, 1):
            losses.append(self.step(phi, batch))
            if n % every == 0:
                H.append(self.hypergradient(val_batch).grad)
        return np.array([float(x) for x in losses]), np.array(H).reshape(-1, self.space.q)  # a card is asked at the end

    def forget(self, rho: float) -> None:
        """Scale the tangents by 0 <= rho <= 1.  At 0 they start again, along fresh random directions if any."""
        if not (isinstance(rho, int | float | np.number) and 0 <= rho <= 1):
            raise HyperparameterError(f"inner.forget: rho must lie in [0, 1], got {rho!r}.")
        self._device.forget(self._state, float(rho))
        if rho == 0 and self._along.draw():
            self._cache = None

    def snapshot(self) -> dict[str, NDArray]:
        """Everything that a resumed run needs, as arrays that stay as they are while training goes on."""
        return self._snapshot(self._device.get)

    def mark(self) -> dict[str, Any]:
        """A snapshot that stays where the run lives: to go back to by `restore`, and not for files."""
        return self._snapshot(self._device.keep)

    def mark_params(self) -> Any:
        """(p,) a copy of the current parameters, where the run lives."""
        return self._device.keep(self._state.theta)

    def buffers(self) -> dict[str, Any]:
        """What the model holds beside its parameters: nothing here."""
        return {}

    def adopt(self, phi: ArrayLike, params: Any, buffers: Mapping[str, Any]) -> None:
        """Stand at these hyperparameters (q,), parameters (p,) and buffers; slots and tangents stay as they are."""
        self.restore(self.mark() | {"phi": np.array(phi), "theta": params} | dict(buffers))

    def _snapshot(self, copied: Callable[[Array], Array]) -> dict[str, NDArray]:
        out: dict[str, NDArray] = {k: copied(v) for k, v in zip(_ARRAYS, self._state, strict=True)}
        return out | {"t": np.array(self.t), "phi": self.phi.copy()} | self._along.snapshot()

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        """Go back to a snapshot of a run of the same model, space and optimizer.

        Raises:
          ShapeError: it lacks an array or holds one of another shape or dtype; the run is then as before.
        """
        snapshots.check("inner.restore", snapshot, self._like())
        t, phi = int(snapshot["t"]), np.array(snapshot["phi"])
        self._along.restore("inner.restore", snapshot)
        self._device.assign(self._state, TangentState(*(snapshot[name] for name in _ARRAYS)))
        self._t, self.phi, self._cache = t, phi, None

    def _like(self) -> dict[str, NDArray]:
        """A snapshot's entries, for their shapes and dtypes."""
        like: dict[str, Any] = dict(zip(_ARRAYS, self._state, strict=True)) | {"phi": self.phi, "t": np.array(self._t)}
        return like | self._along.snapshot()

    def dynamics(self) -> Dynamics:
        """Copies of the state, and the model's derivatives at any other one; nothing of the run moves by using them.
        Arrays are the host's: a run on a card brings them there and back."""
        state = TangentState(*(np.array(self._device.read(a)) for a in self._state))
        return Dynamics(
            self.rule,
            state,
            self._t,
            self.phi.copy(),
            copy.copy(self._along),
            self._groups,
            self._fixed,
            self._loss_names,
            self._oracle.grads_at,
            self._oracle.linearised,
            self._oracle.outer_at,
            self._oracle.outer_hvp,
        )

    def linearise(self, batch: Any, val_batch: Any = None) -> Linearisation:
        """Gradients and Hessian-vector products at the current state, of the inner loss on `batch` and of the outer
        loss on `val_batch` (default: `batch`).  The Hessian of the optimizer's own weight decay is not in it.  Arrays are
        the host's, wherever the run lives."""
        point, theta = self._prepare(self.phi).point, checks.locked(self.params)
        val_batch = batch if val_batch is None else val_batch
        empty = {n: point.seeds[n][:0] for n in self._loss_names}
        _, grads = self._oracle.grads_at(theta, point, np.empty((0, theta.size), theta.dtype), empty, batch)
        push = self._oracle.linearised(theta, point, batch, False)

        def hvp(V: Array) -> Array:
            V = checks.rows("inner.linearise.hvp", V, theta)
            still = {n: np.zeros((len(V), *point.seeds[n].shape[1:])) for n in self._loss_names}
            return push(V, still).copy()

        def outer_hvp(V: Array) -> Array:
            return self._oracle.outer_hvp(theta, point, checks.rows("inner.linearise.outer_hvp", V, theta), val_batch)

        return Linearisation(grads.g.copy(), hvp, self._oracle.outer_at(theta, point, val_batch)[1].copy(), outer_hvp)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _prepare(self, phi: ArrayLike) -> _Cache:
        """Values, seeds and kernel rows for the next step; what has not moved since the last call is kept."""
        if not (type(phi) is np.ndarray and phi.dtype == np.float64 and phi.ndim == 1):
            phi = self.space.check(phi, f"inner.{self.rule.name}.step")
        key, cache = (phi.tobytes(), self._t if self.space.scheduled else 0), self._cache
        if cache is None or cache.key != key:
            phi = self.space.check(phi, f"inner.{self.rule.name}.step")
            cache = self._cache = self._at(key, phi, self._t)
        now = self._t + 1 if self.rule.settled is None else min(self._t + 1, self.rule.settled)
        if cache.step[0] != now:
            for i in self.rule.timed:
                cache.coefficients.c[i], cache.coefficients.dc[i] = self.rule.row(i, cache.duals, now)
            cache.step[0] = now
        return cache

    def _at(self, key: tuple[bytes, int], phi: Array, t: int) -> _Cache:
        """Everything that depends on phi: its values, seeds along the tangents' directions, and the kernel's rows."""
        n, s, dtype = len(self._groups), len(self._state.Z), self._state.theta.dtype
        point = self.space.at(phi, t)
        along = {name: self._along.along(seed) for name, seed in point.seeds.items()}
        duals = {}
        for name in self.rule.defaults:
            if name in self.space:
                seed = along[name] if along[name].ndim == 2 else along[name][:, None]
                duals[name] = Dual(np.broadcast_to(point.values[name], (n,)), np.broadcast_to(seed, (s, n)))
            else:
                duals[name] = Dual(self._fixed[name], np.zeros((s, n)))
        rows = [self.rule.row(i, duals, t + 1) for i in range(len(self.rule.rows))]
        coefficients = Coefficients(np.array([r.x for r in rows], dtype), np.array([r.dx for r in rows], dtype))
        loss_seeds = {name: along[name] for name in self._loss_names}
        plain = Coefficients(coefficients.c, coefficients.dc[:, :0])
        return _Cache(key, checks.locked(phi.copy()), point, loss_seeds, duals, coefficients, plain, [0])

    def _grad_jvp(self, cache: _Cache, batch: Any, tangents: bool) -> tuple[Any, Grads]:
        """The model's gradient and tangents, in chunks of directions where asked for, checked before anything moves."""
        theta, Z, none = self._seen
        if not tangents:
            return self._oracle.grad_jvp(theta, cache.point, none, {n: s[:0] for n, s in cache.along.items()}, batch)
        chunk = self._chunk or len(Z)
        if len(Z) <= chunk:
            return self._oracle.grad_jvp(theta, cache.point, Z, cache.along, batch)
        room = self._room
        for a in range(0, len(Z), chunk):
            part = {n: s[a : a + chunk] for n, s in cache.along.items()}
            loss, grads = self._oracle.grad_jvp(theta, cache.point, Z[a : a + chunk], part, batch)
            if room is None or room.dtype != grads.dG.dtype:  # the model's choice, where tangents are kept in half
                room = self._room = self._device.empty(Z.shape, grads.dG.dtype)
            self._device.write(room[a : a + chunk], grads.dG)
        assert room is not None
        return loss, Grads(grads.g, room)
