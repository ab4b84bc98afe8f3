"""Forward-mode accumulation: the state of training and its derivative along q directions, stepped together.

`s[t+1] = Theta(s[t], phi)` with s = (theta, slots); the tangents `Z[t] = ds[t] / dphi` obey the linearised step, so that
`h[t] = dE_dphi + Z dE_dtheta` is known after every step in memory that does not grow with t.

Source: Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .kernels.arrays import Coefficients, Grads, TangentState


def init(params: NDArray, k: int, q: int, fill: float = 0.0, kept: DTypeLike | None = None) -> TangentState:
    """The state before the first step: a copy of params (p,), slots filled with `fill`, tangents zero, kept in their dtype
    or in another one."""
    p, dtype = params.size, params.dtype
    slots, kept = np.full((k, p), fill, dtype), dtype if kept is None else kept
    return TangentState(params.copy(), slots, np.zeros((q, p), kept), np.zeros((k, q, p), kept))


def still(state: TangentState) -> TangentState:
    """A view of the state with no tangent directions: stepping it is plain training."""
    return TangentState(state.theta, state.slots, state.Z[:0], state.dslots[:, :0])


def step(
    state: TangentState,
    kernel: Callable[..., None],
    grads: Grads,
    coefficients: Coefficients,
    layout: tuple[NDArray, bool, NDArray],
) -> None:
    """One inner step, in place on the arrays of `state`; layout is the kernel's (blocks, flag, work)."""
    blocks, flag, work = layout
    kernel(grads, coefficients, blocks, flag, work, state)


def hypergradient(state: TangentState, dE_dtheta: NDArray) -> NDArray:
    """(q,) derivative of the outer loss through the parameters, `Z dE_dtheta`."""
    return state.Z @ dE_dtheta


def forget(state: TangentState, rho: float, scale: Callable[..., None]) -> None:
    """Scale every tangent by rho, in place, with a kernel: 1 keeps the whole past, 0 starts again."""
    for tangents in (state.Z, state.dslots):
        scale(tangents, rho)


def assign(state: TangentState, source: TangentState) -> None:
    """Write `source` into the arrays of `state`, which stay where they are."""
    for into, out in zip(state, source, strict=True):
        np.copyto(into, out)


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
