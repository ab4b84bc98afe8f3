"""`frozen`'s small system where it falls apart into m modes of their own, compiled: one group, no preconditioner.

The same formulas as `frozen.step`, `moved`, `swept` and `sensitivity`, on scalars: a stage is taken through a dozen of
these, and of matrices of three rows NumPy takes a hundred times as long.  The state of a mode is (x, w, 1).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..problem import Array
from .frozen import Coefficients, Small


@njit(cache=True, error_model="numpy")
def _step(c, rate, nesterov, T, b, P, Y, A, J):
    """A (m, 3, 3), J (m, 2) <- the step of each mode.  c: (6,), as in `frozen`; T, b, P, Y: (m,)."""
    mu, keep, wd, decay, out = c[0], c[1], c[3], c[4], c[2] / rate * (1 + c[5])
    forced = 1 + mu * keep if nesterov else keep
    for j in range(len(T)):
        total, force = T[j] + wd * rate, b[j] + wd * P[j]
        J[j, 0], J[j, 1] = -out * forced, keep
        A[j, 0, 0], A[j, 0, 1], A[j, 0, 2] = J[j, 0] * total + 1 - decay, -out * mu, J[j, 0] * force - decay * Y[j]
        if nesterov:
            A[j, 0, 1] *= mu
        A[j, 1, 0], A[j, 1, 1], A[j, 1, 2] = keep * total, mu, keep * force
        A[j, 2, 0], A[j, 2, 1], A[j, 2, 2] = 0, 0, 1


@njit(cache=True, error_model="numpy")
def _add_product(A, B, out):
    """out (3, 3) <- out + A B."""
    for i in range(3):
        for k in range(3):
            out[i, k] += A[i, 0] * B[0, k] + A[i, 1] * B[1, k] + A[i, 2] * B[2, k]


@njit(cache=True, error_model="numpy")
def _moved(A, y, steps, out):
    """out (m, 3) <- `A^steps y` of each mode."""
    power, square, v = np.empty((3, 3)), np.empty((3, 3)), np.empty(3)
    for j in range(len(A)):
        power[:], out[j] = A[j], y[j]
        n = steps
        while n:
            if n & 1:
                v[:] = out[j]
                for i in range(3):
                    out[j, i] = power[i, 0] * v[0] + power[i, 1] * v[1] + power[i, 2] * v[2]
            n >>= 1
            if n:
                square[:] = 0
                _add_product(power, power, square)
                power[:] = square


@njit(cache=True, error_model="numpy")
def _multiply(R, S, B, F, X):
    """[[R, S], [0, R]] <- itself times [[B, F], [0, B]], which it may be; X is scratch; all are (3, 3)."""
    X[:] = 0
    _add_product(R, F, X)
    _add_product(S, B, X)
    S[:], X[:] = X, 0
    _add_product(R, B, X)
    R[:] = X


@njit(cache=True, error_model="numpy")
def _swept(A, lam, y, steps, Gamma, before):
    """Gamma (m, 3, 3), before (m, 3) <- what `frozen.swept` gives, of each mode.

    A power of the block matrix [[B, F], [0, B]], B = A' and F = lambda y', is [[B^n, F_n], [0, B^n]].
    """
    B, F, R, S, X = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    for j in range(len(A)):
        B[:], R[:], S[:] = A[j].T, np.eye(3), 0
        for i in range(3):
            F[i] = lam[j, i] * y[j]
        n = steps
        while n:
            if n & 1:
                _multiply(R, S, B, F, X)
            n >>= 1
            if n:
                _multiply(B, F, B, F, X)
        Gamma[j] = S
        for i in range(3):
            before[j, i] = R[i, 0] * lam[j, 0] + R[i, 1] * lam[j, 1] + R[i, 2] * lam[j, 2]


@njit(cache=True, error_model="numpy")
def _sensitivity(c, rate, nesterov, T, b, P, Y, weights, out):
    """out (6,) <- `sum weights * dA / dc`.  weights: (m, 3, 3)."""
    mu, keep, reach, wd, turn = c[0], c[1], c[2] / rate, c[3], 1 + c[5]
    step = reach * turn
    forced = 1 + mu * keep if nesterov else keep
    out[:] = 0
    for j in range(len(T)):
        W = weights[j]
        total, force = T[j] + wd * rate, b[j] + wd * P[j]
        down, held = W[0, 0] * total + W[0, 2] * force, W[1, 0] * total + W[1, 2] * force
        step_ = -down * forced - W[0, 1] * (mu * mu if nesterov else mu)
        forced_, carried_ = -step * down, -step * W[0, 1]
        out[0] += W[1, 1] + (2 * mu * carried_ + forced_ * keep if nesterov else carried_)
        out[1] += held + (mu * forced_ if nesterov else forced_)
        out[2] += step_ * turn / rate
        out[3] += rate * (keep * W[1, 0] - step * forced * W[0, 0]) + P[j] * (keep * W[1, 2] - step * forced * W[0, 2])
        out[4] -= W[0, 0] + Y[j] * W[0, 2]
        out[5] += reach * step_


def _flat(small: Small, c: Array) -> tuple:
    """The arguments that kernels share."""
    rows = (a.ravel() for a in (small.T, small.b, small.P, small.Y))
    return c[:, 0].copy(), float(small.rate[0]), small.nesterov, *rows


def step(small: Small, c: Array) -> tuple[Array, Array]:
    """A (m, 3, 3) and J (m, 2, 1), `frozen.step`'s.  c: (6, 1)."""
    m = len(small.T)
    A, J = np.empty((m, 3, 3)), np.empty((m, 2))
    _step(*_flat(small, c), A, J)
    return A, J[..., None]


def moved(A: Array, y: Array, steps: int) -> Array:
    """(m, 3) where y (m, 3) comes in some steps."""
    out = np.empty_like(y)
    _moved(A, y, steps, out)
    return out


def swept(A: Array, lam: Array, y: Array, steps: int) -> tuple[Array, Array]:
    """`frozen.swept`'s (m, 3, 3) and (m, 3)."""
    Gamma, before = np.empty_like(A), np.empty_like(lam)
    _swept(A, lam, y, steps, Gamma, before)
    return Gamma, before


def sensitivity(small: Small, at: Coefficients, weights: Array) -> Array:
    """(q,), `frozen.sensitivity`'s."""
    out = np.empty(6)
    _sensitivity(*_flat(small, at.c), weights, out)
    return np.einsum("iq,i->q", at.dc[:, :, 0], out)
