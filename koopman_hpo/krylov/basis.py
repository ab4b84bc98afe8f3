"""Block Krylov spaces: orthonormal rows and what a symmetric operator makes of them.  Letters: p parameters, m columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..problem import Array

DEPENDENT = 1e-11  # a direction of unit length that leaves less than this is dropped


class Basis(NamedTuple):
    """m columns, as the rows of Q."""

    Q: Array  # (m, p) orthonormal
    image: Array  # (m, p) the operator times each
    T: Array  # (m, m) the operator in the basis, symmetric


def empty(p: int) -> Basis:
    return Basis(np.zeros((0, p)), np.zeros((0, p)), np.zeros((0, 0)))


def added(basis: Basis, V: Array, image: Array) -> Basis:
    """The basis with orthonormal rows V (n, p) more, and what the operator makes of them."""
    m, corner = len(basis.Q), V @ image.T
    T = np.empty((m + len(V), m + len(V)))
    T[:m, :m], T[m:, m:] = basis.T, (corner + corner.T) / 2
    T[:m, m:] = (basis.image @ V.T + basis.Q @ image.T) / 2
    T[m:, :m] = T[:m, m:].T
    return Basis(np.concatenate([basis.Q, V]), np.concatenate([basis.image, image]), T)


def selected(basis: Basis, rows: Array) -> Basis:
    return Basis(basis.Q[rows], basis.image[rows], basis.T[np.ix_(rows, rows)])


def fresh(V: Array, Q: Array, most: int) -> Array:
    """(<= most, p) orthonormal rows that span what V (n, p) adds to Q: projected and re-orthogonalised twice, the largest
    remainder first, dependent rows dropped."""
    from scipy.linalg import qr

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
        basis = added(basis, V, image)
        if enough(basis):
            break
        left -= len(V)
        V = fresh(image, basis.Q, left)
    return basis


def flown(basis: Basis, v: Array, time: float) -> Array:
    """(m,) where a flow `y' = -T y + v` (p,) from nothing comes in some time."""
    spectrum, U = np.linalg.eigh(basis.T)
    decay = np.maximum(spectrum, 1e-12 / time)
    return U @ (-np.expm1(-time * decay) / decay * (U.T @ (basis.Q @ v)))


def left_out(basis: Basis, v: Array, time: float) -> float:
    """The part outside the basis of `T y`, y as in `flown`, relative to v."""
    y = flown(basis, v, time)
    return float(np.linalg.norm(y @ basis.image - (basis.T @ y) @ basis.Q)) / max(float(np.linalg.norm(v)), 1e-300)


def outside(basis: Basis, v: Array) -> float:
    """Length of the part of v (p,) outside the basis."""
    return float(np.linalg.norm(v - (basis.Q @ v) @ basis.Q))


def clipped(T: Array, low: float, high: float) -> tuple[Array, Array]:
    """T (m, m) with its eigenvalues between low and high, and those eigenvalues as they were, ascending."""
    spectrum, U = np.linalg.eigh(T)
    return (U * np.clip(spectrum, low, high)) @ U.T, spectrum
