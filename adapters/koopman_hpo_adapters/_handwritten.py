"""`problem`: a hand-written NumPy model as a `Problem`, every answer of its functions checked.

Letters: p parameters, q tangent directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from koopman_hpo.errors import AdapterError, names, nearest, reals
from koopman_hpo.problem import Array, Problem

from . import _differences


def problem(
    params: Array,
    *,
    grad: Callable[..., Any],
    outer: Callable[..., Any],
    grad_jvp: Callable[..., Any] | None = None,
    hyper: Iterable[str] | None = None,
    segments: Sequence[int] | None = None,
    outer_hvp: Callable[..., Any] | None = None,
) -> Problem:
    """A hand-written model.  Its functions get read-only arrays and may reuse the memory of what they return.

    Args:
      params: (p,) float32 or float64, the initial parameters, flat.
      grad: `(theta (p,), hyper, batch) -> (loss, g (p,))`, the inner loss and its gradient; hyper is the dict
        {name: natural value} of the hyperparameters in the space that the optimizer does not own.
      outer: `(theta (p,), hyper, batch) -> (value, dE_dtheta (p,), {name: dE_dhyper})`; the dict may be left out, or
        names in it, where the outer loss does not depend on them directly.
      grad_jvp: `(theta, hyper, Z (q, p), dhyper, batch) -> (loss, g (p,), dG (q, p))` as in `Problem`.  None: central
        differences of `grad`, at four gradients a direction and hyperparameter that moves, exact to about 1e-11
        (float32: 1e-5) where the loss is smooth; `Problem.note` says so and `difference_error` measures it.
      hyper: names that the model understands; None takes whatever the space names.  A name that `grad` never reads has
        a hypergradient of exactly zero.
      segments: lengths of the layers in params; None: one.
      outer_hvp: `(theta, hyper, V (n, p), batch) -> (n, p)`, None: differences where it is needed.

    Raises:
      AdapterError: a function is not callable; later, from a call: an answer of wrong arity, shape, dtype or name.
      ShapeError: params or segments do not fit `Problem`.
    """
    for name, function in (
        ("grad", grad),
        ("outer", outer),
        ("grad_jvp", grad_jvp),
        ("outer_hvp", outer_hvp),
    ):
        optional = name in ("grad_jvp", "outer_hvp")
        if not (callable(function) or (optional and function is None)):
            raise AdapterError(f"problem: {name} must be a function, got {type(function).__name__}.")
    declared = None if hyper is None else frozenset(names("problem", "hyper", hyper, AdapterError))
    model = _Handwritten(grad, outer, grad_jvp, outer_hvp, declared)
    return Problem(
        params=params,
        grad_jvp=model.grad_jvp if grad_jvp else model.grad_differences,
        outer=model.outer,
        hyper=declared,
        segments=segments,  # type: ignore[arg-type]  # Problem makes a tuple of it
        outer_hvp=model.outer_hvp if outer_hvp else None,
        note="grad_jvp as written by hand" if grad_jvp else _differences.NOTE,
    )


@dataclass(frozen=True)
class _Handwritten:
    """The user's functions, guarded: read-only arguments in, checked and owned arrays out."""

    user_grad: Callable[..., Any]
    user_outer: Callable[..., Any]
    user_grad_jvp: Any
    user_outer_hvp: Any
    names: frozenset[str] | None

    def grad(self, theta, hyper, batch):
        answer = self.user_grad(_locked(theta), _LockedHyper("grad", hyper), batch)
        loss, g = _unpack("grad", "(loss, g)", answer, (2,))
        return _scalar("grad", "loss", loss), _array("grad", "g", g, theta.shape, theta)

    def grad_jvp(self, theta, hyper, Z, dhyper, batch):
        """`Problem.grad_jvp` from the user's own; without directions, from the user's `grad`."""
        if len(Z) == 0:
            loss, g = self.grad(theta, hyper, batch)
            return loss, _own(g, theta), np.empty_like(Z)
        locked = _LockedHyper("grad_jvp", hyper), _locked(Z), _LockedHyper("grad_jvp", dhyper)
        answer = self.user_grad_jvp(_locked(theta), *locked, batch)
        loss, g, dG = _unpack("grad_jvp", "(loss, g, dG)", answer, (3,))
        g, dG = _array("grad_jvp", "g", g, theta.shape, theta), _array("grad_jvp", "dG", dG, Z.shape, theta)
        return _scalar("grad_jvp", "loss", loss), _own(g, theta, Z), _own(dG, theta, Z)

    def grad_differences(self, theta, hyper, Z, dhyper, batch):
        """`Problem.grad_jvp` by central differences of the user's `grad`."""
        loss, g = self.grad(theta, hyper, batch)
        g, dG = np.array(g), np.empty(Z.shape, Z.dtype)  # a copy: the calls below may overwrite g
        gradient = lambda th, hy: self.grad(th, hy, batch)[1]
        for j, z in enumerate(Z):
            _differences.along(gradient, theta, hyper, z, {name: d[j] for name, d in dhyper.items()}, dG[j])
        return loss, g, dG

    def outer(self, theta, hyper, batch):
        """`Problem.outer` from the user's, direct derivatives checked by name and shape."""
        answer = self.user_outer(_locked(theta), _LockedHyper("outer", hyper), batch)
        value, g, *direct = _unpack("outer", "(value, dE_dtheta, {name: dE_dhyper})", answer, (2, 3))
        g = _own(_array("outer", "dE_dtheta", g, theta.shape, theta), theta)
        dE = self._direct(direct[0], hyper) if direct else {}
        return _scalar("outer", "value", value), g, dE

    def outer_hvp(self, theta, hyper, V, batch):
        HV = self.user_outer_hvp(_locked(theta), _LockedHyper("outer_hvp", hyper), _locked(V), batch)
        return _own(_array("outer_hvp", "the result", HV, V.shape, theta), theta, V)

    def _direct(self, direct, hyper):
        """{name: dE_dhyper} for the names in `hyper`; one that is declared but not tuned is dropped."""
        if not isinstance(direct, dict):
            raise AdapterError(f"outer: the third part must be a dict {{name: dE_dhyper}}, got {type(direct).__name__}.")
        known = set(hyper) | (self.names or set())
        for name, d in direct.items():
            if name not in known:
                raise AdapterError(
                    f"outer: dE_dhyper names {name!r}, the loss hyperparameters are {sorted(known)}."
                    f"{nearest(str(name), known)} Leave out names on which the outer loss does not depend."
                )
            got = reals("outer", f"dE_dhyper[{name!r}]", d, AdapterError).shape
            if name in hyper and got != np.shape(hyper[name]):
                raise AdapterError(
                    f"outer: dE_dhyper[{name!r}] must have the hyperparameter's shape {np.shape(hyper[name])}, got {got}."
                )
        return {name: d for name, d in direct.items() if name in hyper}


class _LockedHyper(dict):
    """The hyperparameters as the user's function sees them: a copy with read-only arrays, and a helpful KeyError."""

    def __init__(self, call, hyper):
        super().__init__((k, _locked(v) if isinstance(v, np.ndarray) else v) for k, v in hyper.items())
        self.call = call

    def __missing__(self, name):
        raise AdapterError(
            f"{self.call}: read hyper[{name!r}], but the space tunes {sorted(self)} of the loss.{nearest(name, self)} "
            f"Add {name} to the Space, or read hyper.get({name!r}, default)."
        )


def _locked(array):
    view = array.view()
    view.flags.writeable = False
    return view


def _own(array, *others):
    """`array` itself if the engine may write into it and it shares no memory with `others`, else a copy."""
    free = array.flags.c_contiguous and array.flags.writeable
    return array if free and not any(np.may_share_memory(array, o) for o in others) else array.copy()


def _unpack(call, want, answer, lengths):
    if not isinstance(answer, tuple | list) or len(answer) not in lengths:
        got = f"{len(answer)} values" if isinstance(answer, tuple | list) else f"one {type(answer).__name__}"
        raise AdapterError(f"{call}: must return {want}, got {got}. Check its return statement.")
    return answer


def _scalar(call, what, value) -> float:
    if isinstance(value, float):
        return float(value)
    array = reals(call, what, value, AdapterError, "one real number")
    if array.ndim:
        raise AdapterError(
            f"{call}: {what} must be one real number, got shape {array.shape}. Average over the batch, for example with "
            f".mean()."
        )
    return float(array)


def _array(call, what, array, shape, theta):
    """`array`, checked to be an array of this shape and of theta's dtype."""
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != theta.dtype:
        got = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise AdapterError(
            f"{call}: {what} must be an array of shape {shape} and dtype {theta.dtype}, as the parameters, got {got}. "
            f"Flatten with np.concatenate([w.ravel() for w in ...]), cast with .astype(theta.dtype)."
        )
    return array
