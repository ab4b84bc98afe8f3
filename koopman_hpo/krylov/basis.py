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
    T: Array  # (m, m) the operator in the basis, symmetric
    rest: Array  # (m,) length of what the operator makes of each, outside the basis


def empty(p: int) -> Basis:
    return Basis(np.zeros((0, p)), np.zeros((0, 0)), np.zeros(0))


def selected(basis: Basis, rows: Array) -> Basis:
    return Basis(basis.Q[rows], basis.T[np.ix_(rows, rows)], basis.rest[rows])


def rejected(V: Array, Q: Array) -> tuple[Array, Array]:
    """V (n, p) without its part in the rows of Q, orthogonal to them to rounding, and that part's coordinates (n, m)."""
    once = V @ Q.T
    V = V - once @ Q
    twice = V @ Q.T
    return V - twice @ Q, once + twice


def orthonormal(V: Array, size: Array, Q: Array, most: int) -> Array:
    """(<= most, p) orthonormal rows that span V (n, p), itself orthogonal to Q: the largest first, and none that is nothing
    beside its `size` (n,)."""
    from scipy.linalg import qr

    if len(V) == 0 or most < 1:
        return V[:0]
    if len(V) == 1:
        length = np.sqrt(V[0] @ V[0])
        return V / length if length > DEPENDENT * size[0] else V[:0]
    V = V[size > 0] / size[size > 0, None]
    q, r, _ = qr(V.T, mode="economic", pivoting=True, check_finite=False)
    W = q.T[np.abs(np.diag(r)) > DEPENDENT][:most]
    return qr((W - (W @ Q.T) @ Q).T, mode="economic", check_finite=False)[0].T if len(W) else W


def lengths(V: Array) -> Array:
    return np.sqrt(np.einsum("np,np->n", V, V))


def grow(
    basis: Basis, starts: Array, operator: Callable[[Array], Array], columns: int, time: float = 1.0, tolerance: float = 0.0
) -> Basis:
    """The block Krylov space of `starts` (n, p), added to a basis: at most `columns` more columns, one operator product
    each; fewer where the space is invariant, or leaves out less than `tolerance` of what a flow makes of `starts[0]`."""
    m, v = len(basis.Q), starts[0]
    full = m + columns
    Q, T, rest = np.empty((full, len(v))), np.zeros((full, full)), np.zeros(full)
    Q[:m], T[:m, :m], rest[:m] = basis
    V = orthonormal(rejected(starts, Q[:m])[0], lengths(starts), Q[:m], columns)
    b = None
    while len(V):
        n = m + len(V)
        Q[m:n] = V
        image = operator(V)
        V, inside = rejected(image, Q[:n])
        corner = inside[:, m:]
        T[m:n, :m], T[:m, m:n], T[m:n, m:n] = inside[:, :m], inside[:, :m].T, (corner + corner.T) / 2
        rest[:m] = np.sqrt(np.maximum(rest[:m] ** 2 - np.einsum("nm,nm->m", inside[:, :m], inside[:, :m]), 0.0))
        rest[m:n] = lengths(V)
        b = Q[:n] @ v if b is None else np.append(b, np.zeros(n - m))
        if left_out(Basis(Q[:n], T[:n, :n], rest[:n]), b, time) < tolerance:
            m = n
            break
        V = orthonormal(V, lengths(image), Q[:n], full - n)
        if len(V) == n - m:
            rest[m:n] = 0.0
        m = n
    return Basis(Q[:m], T[:m, :m], rest[:m])


def modes(T: Array) -> tuple[Array, Array]:
    """Eigenvalues (m,), ascending, and eigenvectors (m, m), as columns, of T: `np.linalg.eigh` in a third of its time."""
    from scipy.linalg.lapack import dsyev

    if not len(T):
        return np.zeros(0), np.zeros((0, 0))
    spectrum, U, bad = dsyev(T)
    if bad:
        raise np.linalg.LinAlgError("the eigenvalues of its curvature do not converge")
    return spectrum, U


def flown(basis: Basis, b: Array, time: float) -> Array:
    """(m,) where a flow `y' = -T y + b` (m,) from nothing comes in some time."""
    spectrum, U = modes(basis.T)
    decay = np.maximum(spectrum, 1e-12 / time)
    return U @ (-np.expm1(-time * decay) / decay * (U.T @ b))


def left_out(basis: Basis, b: Array, time: float) -> float:
    """The part outside the basis of what the operator makes of y, y as in `flown`, relative to b."""
    y = flown(basis, b, time) * basis.rest
    return float(np.sqrt(y @ y)) / max(float(np.sqrt(b @ b)), 1e-300)


def outside(basis: Basis, v: Array) -> float:
    """Length of the part of v (p,) outside the basis."""
    return float(np.linalg.norm(v - (basis.Q @ v) @ basis.Q))


def clipped(T: Array, low: float, high: float) -> tuple[Array, Array, Array]:
    """Eigenvalues (m,) of T (m, m), ascending, between low and high and as they were, and its eigenvectors, as columns."""
    spectrum, U = modes(T)
    return np.clip(spectrum, low, high), spectrum, U
