"""Block Krylov spaces: orthonormal rows and what a symmetric operator makes of them.  Letters: p parameters, m columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from ..problem import Array

DEPENDENT = 1e-11  # a direction of unit length that leaves less than this is dropped


class Basis(NamedTuple):
    """m columns, as the rows of Q."""

    Q: Array  # (m, p) orthonormal
    T: Array  # (m, m) the operator in the basis, symmetric
    rest: Array  # (m,) length of what the operator makes of each, outside the basis


def empty(p: int) -> Basis:
    return Basis(np.zeros((0, p)), np.zeros((0, 0)), np.zeros(0))


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
    m = len(basis.Q)
    Q, T, rest, b = _room(basis, columns)
    if len(starts) == 1:
        return _chain(m, starts[0], operator, Q, T, rest, b, time, tolerance)
    full, v = m + columns, starts[0]
    V = orthonormal(rejected(starts, Q[:m])[0], lengths(starts), Q[:m], columns)
    b[: m + len(V)] = np.concatenate([Q[:m], V]) @ v
    while len(V):
        n = m + len(V)
        Q[m:n] = V
        image = operator(V)
        V, inside = rejected(image, Q[:n])
        corner = inside[:, m:]
        T[m:n, :m], T[:m, m:n], T[m:n, m:n] = inside[:, :m], inside[:, :m].T, (corner + corner.T) / 2
        rest[:m] = np.sqrt(np.maximum(rest[:m] ** 2 - np.einsum("nm,nm->m", inside[:, :m], inside[:, :m]), 0.0))
        rest[m:n] = lengths(V)
        if tolerance and left_out(T[:n, :n], rest[:n], b[:n], time) < tolerance:
            m = n
            break
        V = orthonormal(V, lengths(image), Q[:n], full - n)
        if len(V) == n - m:
            rest[m:n] = 0.0
        m = n
    return Basis(Q[:m], T[:m, :m], rest[:m])


def _room(basis: Basis, columns: int) -> tuple[Array, Array, Array, Array]:
    """Q, T and rest of a basis, with room for more columns, and zeros for all of them."""
    m, p = basis.Q.shape
    full = m + columns
    Q, T, rest = np.empty((full, p)), np.zeros((full, full)), np.zeros(full)
    Q[:m], T[:m, :m], rest[:m] = basis
    return Q, T, rest, np.zeros(full)


def _chain(
    m: int,
    start: Array,
    operator: Callable[[Array], Array],
    Q: Array,
    T: Array,
    rest: Array,
    b: Array,
    time: float,
    tolerance: float,
) -> Basis:
    """`grow` from one start (p,), in arrays with room whose first m columns are taken: compiled but for the products."""
    going = m < len(Q) and _joined(Q, m, start.copy(), np.sqrt(start @ start))
    if going:
        b[: m + 1] = Q[: m + 1] @ start
    while going:
        image = operator(Q[m : m + 1])[0]
        left, going = _absorbed(Q, T, rest, b, m, image, time, tolerance)
        m += 1
        if left < tolerance:
            break
    return Basis(Q[:m], T[:m, :m], rest[:m])


@njit(cache=True, error_model="numpy")
def _joined(Q, n, v, size):
    """Q[n] <- the direction of v (p,), overwritten, outside the first n rows; False if nothing is left beside `size`."""
    for _ in range(2):
        v -= np.dot(np.dot(Q[:n], v), Q[:n])
    length = np.sqrt(np.dot(v, v))
    if not length > DEPENDENT * size:
        return False
    Q[n] = v / length
    return True


@njit(cache=True, error_model="numpy")
def _absorbed(Q, T, rest, b, n, image, time, tolerance):
    """Column n's image (p,), overwritten, goes into T and rest, and where it leads into Q[n + 1], if there is room and it
    leads anywhere.  Returns what the columns leave out, if a tolerance asks, and whether there is another column."""
    size = np.sqrt(np.dot(image, image))
    inside = np.dot(Q[: n + 1], image)
    image -= np.dot(inside, Q[: n + 1])
    again = np.dot(Q[: n + 1], image)
    image -= np.dot(again, Q[: n + 1])
    inside += again
    T[n, : n + 1] = inside
    T[: n + 1, n] = inside
    rest[:n] = np.sqrt(np.maximum(rest[:n] ** 2 - inside[:n] ** 2, 0.0))
    rest[n] = np.sqrt(np.dot(image, image))
    left = np.inf
    if tolerance > 0:
        left = left_out(T[: n + 1, : n + 1], rest[: n + 1], b[: n + 1], time)
        if left < tolerance:
            return left, False
    if n + 1 == len(Q) or not rest[n] > DEPENDENT * size:
        return left, False
    Q[n + 1] = image / rest[n]
    rest[n] = 0.0
    return left, True


def modes(T: Array) -> tuple[Array, Array]:
    """Eigenvalues (m,), ascending, and eigenvectors (m, m), as columns, of T: `np.linalg.eigh` in a third of its time."""
    from scipy.linalg.lapack import dsyev

    if not len(T):
        return np.zeros(0), np.zeros((0, 0))
    spectrum, U, bad = dsyev(T)
    if bad:
        raise np.linalg.LinAlgError("the eigenvalues of its curvature do not converge")
    return spectrum, U


@njit(cache=True, error_model="numpy")
def flown(T, b, time):
    """(m,) where a flow `y' = -T y + b` (m,), T (m, m), from nothing comes in some time."""
    if len(T) == 0:
        return np.zeros(0)
    spectrum, U = np.linalg.eigh(T)
    decay = np.maximum(spectrum, 1e-12 / time)
    return np.dot(U, -np.expm1(-time * decay) / decay * np.dot(b, U))


@njit(cache=True, error_model="numpy")
def left_out(T, rest, b, time):
    """The part outside the basis, by `rest` (m,), of what the operator makes of y, y as in `flown`, relative to b."""
    y = flown(T, b, time) * rest
    return np.sqrt(np.dot(y, y)) / max(np.sqrt(np.dot(b, b)), 1e-300)


def outside(basis: Basis, v: Array) -> float:
    """Length of the part of v (p,) outside the basis."""
    return float(np.linalg.norm(v - (basis.Q @ v) @ basis.Q))


def clipped(T: Array, low: float, high: float) -> tuple[Array, Array, Array]:
    """Eigenvalues (m,) of T (m, m), ascending, between low and high and as they were, and its eigenvectors, as columns."""
    spectrum, U = modes(T)
    return np.clip(spectrum, low, high), spectrum, U
