"""What a trajectory must be.  Shared by the public functions, so that every call complains in the same words."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from koopman_hpo.errors import HyperparameterError, ShapeError, nearest


def trajectory(snapshots: Any, call: str, least: int = 1) -> np.ndarray:
    """A trajectory as float64 (m, q), m >= least; whether all is finite shows in its Gram matrix.

    Raises:
      ShapeError: not two-dimensional, not real, too few snapshots, or no values.
    """
    H = np.asarray(snapshots)
    if H.dtype != np.float64:
        if H.dtype.kind not in "fiu":
            raise ShapeError(f"{call}: snapshots must be real numbers, got dtype {H.dtype}. Pass float64.")
        H = H.astype(np.float64)
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
    """The error for NaN, inf, or values whose squares overflow."""
    rows = np.flatnonzero(~(np.abs(H) < 1e150).all(axis=1))
    return ShapeError(
        f"{call}: snapshots must be finite and below 1e150, first violated in snapshot {rows[0] if rows.size else 0} "
        f"of {H.shape[0]}. Training diverged there: keep the snapshots before it, or lower the learning rate."
    )


def integer(value: Any, name: str, call: str, low: int, high: int | None, do: str) -> int:
    """`value` as an int in low..high.

    Raises:
      HyperparameterError: not an integer, or out of range; `do` says what to do.
    """
    wanted = f">= {low}" if high is None else f"{low}..{high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise HyperparameterError(f"{call}: {name} must be an integer {wanted}, got {value!r}. {do}") from None
    if number < low or (high is not None and number > high):
        raise HyperparameterError(f"{call}: {name} must be an integer {wanted}, got {value!r}. {do}")
    return number


def choice(value: Any, name: str, call: str, known: Iterable[str]) -> str:
    """`value` if it is one of `known`.

    Raises:
      HyperparameterError: unknown; the nearest is suggested.
    """
    if value not in tuple(known):
        raise HyperparameterError(
            f"{call}: {name} must be one of {sorted(known)}, got {value!r}.{nearest(str(value), known)}"
        )
    return value


def fraction(value: Any, name: str, call: str, low: float, high: float) -> float:
    """`value` as a float in (low, high].

    Raises:
      HyperparameterError: not a number, or out of range.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not low < number <= high:
        raise HyperparameterError(f"{call}: {name} must be a number in ({low:g}, {high:g}], got {value!r}.")
    return number
