"""What a trajectory must be.  Shared by the public functions, so that every call complains in the same words."""

from __future__ import annotations

from typing import Any

import numpy as np

from koopman_hpo.errors import ShapeError, number, reals

MOST_STEPS = 2**53  # beyond, a step more is no more in float64


def trajectory(snapshots: Any, call: str, least: int = 1) -> np.ndarray:
    """A trajectory as float64 (m, q), m >= least; whether all is finite shows in its Gram matrix.

    Raises:
      ShapeError: not two-dimensional, not real, too few snapshots, or no values.
    """
    own = isinstance(snapshots, np.ndarray) and snapshots.dtype == np.float64
    H = snapshots if own else reals(call, "snapshots", snapshots)
    if H.ndim != 2:
        raise ShapeError(
            f"{call}: snapshots must have shape (m, q), one row a snapshot, got shape {H.shape}. "
            f"Reshape a single series of m values to (m, 1)."
        )
    if H.shape[0] < least or H.shape[1] < 1:
        raise ShapeError(
            f"{call}: needs at least {least} snapshot(s) of at least 1 value, got shape (m, q) = {H.shape}. "
            f"Record more inner steps."
        )
    return H


def not_finite(call: str, H: np.ndarray) -> ShapeError:
    """The error for NaN or inf."""
    rows = np.flatnonzero(~np.isfinite(H).all(axis=1))
    return ShapeError(
        f"{call}: snapshots must be finite, first violated in snapshot {rows[0]} of {H.shape[0]}. "
        f"Training diverged there: keep the snapshots before it, or lower the learning rate."
    )


def fraction(value: Any, name: str, call: str, low: float, high: float) -> float:
    """`value` as a float in (low, high].

    Raises:
      HyperparameterError: not a number, or out of range.
    """
    return number(call, name, value, f"a number in ({low:g}, {high:g}]", low, high, open_low=True)
