"""The one form in which every method sees a trajectory: its snapshots, and their Gram matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from koopman_hpo.kernels.cpu import trajectory
from koopman_hpo.koopman import checks
from koopman_hpo.koopman.recorder import Recorder

USUAL = (1e-60, 1e70)  # the fourth power of what lies between is no zero and no infinity
WIDE = 32  # from this many values on, BLAS makes the Gram matrix


class Window(NamedTuple):
    """A trajectory, checked, and the window's own: what happens to the caller's array later is no matter."""

    snapshots: np.ndarray  # (m, q) float64
    gram: np.ndarray  # (m, m), of the snapshots minus the first one, over unit**2
    unit: float = 1.0  # a power of two: not 1 where squares of the snapshots, or their squares, leave float64


def relative_gram(H: np.ndarray) -> np.ndarray:
    """(m, q), C-contiguous -> Gram matrix (m, m) of the snapshots minus the first one.

    A wide trajectory pays one product, and the subtraction is made in the result, unless that would cost more
    than four digits.
    """
    m, q = H.shape
    if q < WIDE:
        G = np.empty((m, m))
        trajectory.gram(H, G)
        return G
    with np.errstate(over="ignore", invalid="ignore"):
        G = H @ H.T
        before, first = G.trace(), G[0].copy()
        G -= first
        G -= first[:, None]
        G += first[0]
        if not G.trace() > 1e-4 * before:
            D = H - H[0]
            G = D @ D.T
    return G


@njit(cache=True, nogil=True)
def deviations(H):
    """(q,): standard deviations of the coordinates of H (m, q) over the window."""
    m, q = H.shape
    mean, out = np.zeros(q), np.zeros(q)
    for i in range(m):
        for j in range(q):
            mean[j] += H[i, j] / m
    for i in range(m):
        for j in range(q):
            out[j] += (H[i, j] - mean[j]) ** 2 / m
    return np.sqrt(out)


@njit(cache=True, nogil=True)
def units(H):
    """(q,): `deviations`, and 1 where a coordinate stays where it is but for rounding."""
    out = deviations(H)
    for j in range(H.shape[1]):
        if out[j] <= 1e-14 * abs(H[-1, j]):
            out[j] = 1.0
    return out


def window(snapshots: Any, call: str, least: int = 1) -> Window:
    """A `Window` of an array (m, q) or of a `Recorder`.

    Raises:
      ShapeError: see `checks.trajectory`; or values that are not finite.
    """
    if isinstance(snapshots, Recorder):
        H = snapshots.snapshots
        if len(H) < least:
            checks.trajectory(H, call, least)
        H, G = H.astype(np.float64, copy=False), snapshots.gram.copy()
    else:
        H = np.array(checks.trajectory(snapshots, call, least), order="C")
        G = relative_gram(H)
    unit = _unit(H, sum(G.diagonal().tolist()), call)
    return Window(H, G) if unit == 1.0 else Window(H, relative_gram(H / unit), unit)


def _unit(H: np.ndarray, trace: float, call: str) -> float:
    """1, or where that is far too large or small the power of two nearest below the largest value of H (m, q).

    NaN, inf, overflow and underflow all show in the trace of the Gram matrix and in the first snapshot, so that the
    rest is read once more only where there is something to be found.
    """
    low, high = USUAL
    if low**2 < trace < high**2:
        first = max(map(abs, H[0].tolist())) if H.shape[1] < WIDE else np.abs(H[0]).max()
        if first < high:
            return 1.0
    peak = float(np.abs(H).max())
    if not math.isfinite(peak):
        raise checks.not_finite(call, H)
    return 1.0 if peak == 0.0 or low < peak < high else math.ldexp(1.0, math.frexp(peak)[1] - 1)


def times(x: np.ndarray, unit: float) -> np.ndarray:
    """x unit, held within float64."""
    most = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        return np.clip(x * unit, -most, most)
