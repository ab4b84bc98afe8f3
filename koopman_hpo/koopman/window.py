"""The one form in which every method sees a trajectory: its snapshots, and their Gram matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo.kernels.cpu import trajectory
from koopman_hpo.koopman import checks
from koopman_hpo.koopman.recorder import Recorder

WIDE = 32  # from this many values on, BLAS makes the Gram matrix


class Window(NamedTuple):
    """A trajectory, checked, and the window's own: what happens to the caller's array later is no matter."""

    snapshots: np.ndarray  # (m, q) float64
    gram: np.ndarray  # (m, m), of the snapshots minus the first one


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


def window(snapshots: Any, call: str, least: int = 1) -> Window:
    """A `Window` of an array (m, q) or of a `Recorder`.

    Raises:
      ShapeError: see `checks.trajectory`; or values that are not finite, or whose squares overflow.
    """
    if isinstance(snapshots, Recorder):
        H = snapshots.snapshots
        if len(H) < least:
            checks.trajectory(H, call, least)
        return Window(H.astype(np.float64, copy=False), snapshots.gram.copy())
    H = np.array(checks.trajectory(snapshots, call, least), order="C")
    G = relative_gram(H)
    if not math.isfinite(G.trace()):  # NaN, inf and overflow all show here, without a read of their own
        raise checks.not_finite(call, H)
    return Window(H, G)
