"""Block Krylov spaces: orthonormal rows and what a symmetric operator makes of them.  Letters: p parameters, m columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg import qr

from ..problem import Array

DEPENDENT = 1e-11  # a direction of unit length that leaves less than this is dropped


class Basis(NamedTuple):
    """m columns, as the rows of Q."""

    Q: Array  # (m, p) orthonormal
    image: Array  # (m, p) the operator times each


def empty(p: int) -> Basis:
    return Basis(np.zeros((0, p)), np.zeros((0, p)))


def fresh(V: Array, Q: Array, most: int) -> Array:
    """(<= most, p) orthonormal rows that span what V (n, p) adds to Q: projected and re-orthogonalised twice, the largest
    remainder first, dependent rows dropped."""
    size = np.linalg.norm(V, axis=1)
    V = V[size > 0] / size[size > 0, None]
    for _ in range(2):
        V = V - (V @ Q.T) @ Q
    if len(V) == 0 or most < 1:
        return V[:0]
    if len(V) == 1:
        size = np.linalg.norm(V)
        if not size > DEPENDENT:
            return V[:0]
        V = V / size
        V = V - (V @ Q.T) @ Q
        return V / np.linalg.norm(V)
    q, r, _ = qr(V.T, mode="economic", pivoting=True, check_finite=False)
    W = q.T[np.abs(np.diag(r)) > DEPENDENT][:most]
    W = W - (W @ Q.T) @ Q
    return qr(W.T, mode="economic", check_finite=False)[0].T if len(W) else W


def grow(
    basis: Basis,
    starts: Array,
    operator: Callable[[Array], Array],
    columns: int,
    enough: Callable[[Basis], bool] = lambda basis: False,
) -> Basis:
    """The block Krylov space of `starts` (n, p), added to a basis: at most `columns` more columns, one operator product
    each; fewer where the space is invariant, or `enough`."""
    left = columns
    V = fresh(starts, basis.Q, left)
    while len(V):
        image = operator(V)
        basis = Basis(np.concatenate([basis.Q, V]), np.concatenate([basis.image, image]))
        if enough(basis):
            break
        left -= len(V)
        V = fresh(image, basis.Q, left)
    return basis


def left_out(basis: Basis, v: Array, time: float) -> float:
    """What a flow `y' = -T y + v` over some time leaves outside the basis, relative to v (p,): the part of `T y` there."""
    spectrum, U = np.linalg.eigh(projected(basis))
    decay = np.maximum(spectrum, 1e-12 / time)
    y = U @ (-np.expm1(-time * decay) / decay * (U.T @ (basis.Q @ v)))
    r = y @ basis.image
    return float(np.linalg.norm(r - (basis.Q @ r) @ basis.Q) / max(np.linalg.norm(v), 1e-300))


def projected(basis: Basis) -> Array:
    """(m, m) the operator in the basis, symmetric."""
    T = basis.Q @ basis.image.T
    return (T + T.T) / 2


def clipped(T: Array, low: float, high: float) -> tuple[Array, Array]:
    """T (m, m) with its eigenvalues between low and high, and those eigenvalues as they were, ascending."""
    spectrum, U = np.linalg.eigh(T)
    return (U * np.clip(spectrum, low, high)) @ U.T, spectrum
