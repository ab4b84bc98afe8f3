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
        left -= len(V)
        if enough(basis):
            break
        V = fresh(image, basis.Q, left)
    return basis


def outside(basis: Basis, v: Array) -> Array:
    """(p,) what of v (p,) lies beyond the basis."""
    return v - (basis.Q @ v) @ basis.Q


def projected(basis: Basis) -> Array:
    """(m, m) the operator in the basis, symmetric."""
    T = basis.Q @ basis.image.T
    return (T + T.T) / 2


def clipped(T: Array, low: float, high: float) -> tuple[Array, Array]:
    """T (m, m) with its eigenvalues between low and high, and those eigenvalues as they were, ascending."""
    spectrum, U = np.linalg.eigh(T)
    return (U * np.clip(spectrum, low, high)) @ U.T, spectrum
