"""The contract that a model fills, and what the engine gives back.

A model is three things: its initial parameters, the gradient of its inner (training) loss together with the
directional derivatives of that gradient, and the outer (validation) loss with its gradient.  Nothing else of the
model is ever seen by the engine: no framework, no layers, no containers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import AdapterError, ShapeError, names, reals, short

Array = NDArray[Any]
Hyper = Mapping[str, Any]
Push = Callable[[Array, Hyper], Array]  # (Z (n, p), dhyper) -> dG (n, p)


class Hypergradient(NamedTuple):
    """The derivative of the outer loss with respect to the hyperparameters, after `t` inner steps."""

    value: float  # outer loss
    grad: Array  # (q,) with respect to phi, the transformed coordinates (log, logit, ...)
    natural: dict[str, Any]  # {name: float or array} with respect to the natural values
    t: int  # inner steps taken when it was measured


class Linearisation(NamedTuple):
    """Training frozen at the current parameters: what a model-based operator needs."""

    gradient: Array  # (p,) of the inner loss
    hvp: Callable[[Array], Array]  # V (n, p) -> (n, p), Hessian of the inner loss
    outer_gradient: Array  # (p,)
    outer_hvp: Callable[[Array], Array]  # V (n, p) -> (n, p), Hessian of the outer loss


@dataclass(frozen=True)
class Problem:
    """A model as the engine sees it.

    Letters: p parameters, q tangent directions.  `hyper` maps the names of the loss hyperparameters (those of the
    space that the inner optimizer does not own) to their natural values, a float or an array `(n,)`; `dhyper` maps
    the same names to tangents, `(q,)` or `(q, n)`.  None of the functions may keep or change its arguments.

    Attributes:
      params: (p,) float32 or float64, the initial parameters, flat.
      grad_jvp: `(theta (p,), hyper, Z (q, p), dhyper, batch) -> (loss, g (p,), dG (q, p))`: the inner loss, its
        gradient, and row j of dG the derivative of the gradient along `(Z[j], dhyper[j])`:
        `dG[j] = (d2 loss / dtheta2) Z[j] + (d2 loss / dtheta dhyper) dhyper[j]`.  With q = 0 it is a plain gradient.
      outer: `(theta (p,), hyper, batch) -> (value, dE_dtheta (p,), {name: dE_dhyper})`: the outer loss, its gradient,
        and its direct derivative with respect to the loss hyperparameters (names left out count as zero).
      hyper: the names that `grad_jvp` understands, or None if it takes whatever the space names.
      segments: lengths of the model's layers, in order, summing to p: what a per-group hyperparameter is spread over.
      outer_hvp: `(theta (p,), hyper, V (n, p), batch) -> (n, p)`, Hessian of the outer loss times each row of V;
        None: central differences of `outer` are used where it is needed.
      linearise: `(theta (p,), hyper, batch, rough) -> push`, with `push(Z (n, p), dhyper) -> dG (n, p)` as `grad_jvp`'s
        dG, any number of times at the one point; None: `grad_jvp` is called each time. rough: single precision will do.
        With another `grad_jvp` it must be another, or None.
      note: how the derivatives were made, where that is worth knowing (`"exact"`, `"central differences, ..."`).
      name: what tells this model from others of its size, for checkpoints: architecture and fixed terms of the loss.
      domains: `{name: (low, high)}` of loss hyperparameters that may not lie anywhere: natural values, both ends allowed.

    Raises:
      ShapeError: params or segments make no sense.
      AdapterError: a function is none, or hyper is no collection of names.
    """

    params: Array
    grad_jvp: Callable[[Array, Hyper, Array, Hyper, Any], tuple[float, Array, Array]]
    outer: Callable[[Array, Hyper, Any], tuple[float, Array, Hyper]]
    hyper: frozenset[str] | None = None
    segments: tuple[int, ...] | None = None
    outer_hvp: Callable[[Array, Hyper, Array, Any], Array] | None = None
    linearise: Callable[[Array, Hyper, Any, bool], Push] | None = None
    note: str = "exact"
    domains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        params = _params(self.params)
        segments = _segments(self.segments, params.size)
        for name in ("grad_jvp", "outer", "outer_hvp", "linearise"):
            function = getattr(self, name)
            if not callable(function) and (name in ("grad_jvp", "outer") or function is not None):
                raise AdapterError(f"Problem: {name} must be a function, got {short(function)}.")
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "segments", segments)
        if self.hyper is not None:
            object.__setattr__(self, "hyper", frozenset(names("Problem", "hyper", self.hyper, AdapterError)))


def _params(given: Any) -> Array:
    """A copy, read-only: what becomes of the caller's array later is no matter."""
    reals("Problem", "params", given, want="one flat array (p,) of float32 or float64")
    params = np.asarray(given)
    if params.ndim != 1 or params.size == 0 or params.dtype not in (np.float32, np.float64):
        raise ShapeError(
            f"Problem: params must be one flat array (p,) of float32 or float64 with p >= 1, got shape "
            f"{params.shape} of {params.dtype}. Concatenate the layers with np.concatenate([w.ravel() for w in ...])."
        )
    if not np.isfinite(params).all():
        bad = int(np.flatnonzero(~np.isfinite(params))[0])
        raise ShapeError(
            f"Problem: params must be finite, got {params[bad]} at index {bad}. Check the model's initialisation."
        )
    params = np.array(params)
    params.flags.writeable = False
    return params


def _segments(given: Any, p: int) -> tuple[int, ...]:
    if given is None:
        return (p,)
    try:
        segments = tuple(operator.index(n) for n in given)
    except TypeError:
        raise ShapeError(f"Problem: segments must be whole lengths of layers, got {short(given)}.") from None
    if sum(segments) != p or min(segments) < 1:
        raise ShapeError(
            f"Problem: segments must be positive lengths that sum to p = {p}, got {segments} with sum {sum(segments)}."
        )
    return segments
