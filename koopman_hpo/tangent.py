"""Forward-mode accumulation: the state of training and its derivative along q directions, stepped together.

`s[t+1] = Theta(s[t], phi)` with s = (theta, slots); the tangents `Z[t] = ds[t] / dphi` obey the linearised step, so that
`h[t] = dE_dphi + Z dE_dtheta` is known after every step in memory that does not grow with t.

Source: Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .kernels.cpu import Coefficients, Grads, State


class TangentState(NamedTuple):
    """Training state and tangents.  k optimizer slots, p parameters, q tangent directions."""

    theta: NDArray  # (p,)
    slots: NDArray  # (k, p)
    Z: NDArray  # (q, p) dtheta / dphi along each direction
    dslots: NDArray  # (k, q, p)
    t: int  # inner steps taken


def init(params: NDArray, k: int, q: int, fill: float = 0.0) -> TangentState:
    """The state before the first step: a copy of params (p,), slots filled with `fill`, tangents zero."""
    p, dtype = params.size, params.dtype
    slots = np.full((k, p), fill, dtype)
    return TangentState(params.copy(), slots, np.zeros((q, p), dtype), np.zeros((k, q, p), dtype), 0)


def step(
    state: TangentState,
    kernel: Callable[..., None],
    grads: Grads,
    coefficients: Coefficients,
    layout: tuple[NDArray, bool, NDArray],
) -> TangentState:
    """One inner step, in place on the arrays of `state`; layout is the kernel's (blocks, flag, work)."""
    blocks, flag, work = layout
    kernel(grads, coefficients, blocks, flag, work, State(*state[:4]))
    return state._replace(t=state.t + 1)


def hypergradient(state: TangentState, dE_dtheta: NDArray) -> NDArray:
    """(q,) derivative of the outer loss through the parameters, `Z dE_dtheta`."""
    return state.Z @ dE_dtheta


def forget(state: TangentState, rho: float) -> None:
    """Scale every tangent by rho, in place: 1 keeps the whole past, 0 starts again."""
    for tangents in (state.Z, state.dslots):
        if rho == 0:
            tangents[...] = 0  # also where the past is not finite
        else:
            np.multiply(tangents, tangents.dtype.type(rho), out=tangents)


def copy(state: TangentState) -> TangentState:
    """The same state in arrays of its own."""
    theta, slots, Z, dslots, t = state
    return TangentState(theta.copy(), slots.copy(), Z.copy(), dslots.copy(), t)


def assign(state: TangentState, source: TangentState) -> TangentState:
    """Write `source` into the arrays of `state`, which stay where they are."""
    for into, out in zip(state[:4], source[:4], strict=True):
        np.copyto(into, out)
    return state._replace(t=source.t)


def blocks(segments: tuple[int, ...], size: int = 1024) -> NDArray[np.int64]:
    """(n, 3) runs `(group, start, stop)` of at most `size` parameters; each segment is one group.

    The size keeps what a kernel touches at once within the first-level cache.
    """
    rows, start = [], 0
    for group, length in enumerate(segments):
        stop = start + length
        rows += [(group, a, min(a + size, stop)) for a in range(start, stop, size)]
        start = stop
    return np.array(rows, np.int64)
