"""How wrong a forecast may be: noise through the fit (delta method), and the same fit on parts of the window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from koopman_hpo.koopman.poles import LEAST_SQUARES, basis
from koopman_hpo.koopman.select import search
from koopman_hpo.koopman.small import dot, multiply, symmetric

if TYPE_CHECKING:
    from koopman_hpo.koopman.model import Koopman


def standard_error(model: Koopman, steps: int) -> np.ndarray:
    """(q,): delta method and half the spread over parts of the window, in quadrature.

    Half, because a fit on four fifths of a window scatters about twice as far from the whole window's fit as that
    one from the truth (for a mean the ratio is 1/2, for an extrapolated exponential 1.5 to 3).  On planted decaying
    modes with white noise of 1 % twice this error covers the truth in 84 to 98 % of cases.
    """
    H, G = model.window.snapshots, model.window.gram
    t = len(H) - 1 + steps
    return _standard_error(H, G, model.eigenvalues, model.weights, model.delays, t, model.bound)


@njit(cache=True, nogil=True)
def _standard_error(H, G, lam, P, delays, t, bound):
    return np.sqrt(noise_and_sensitivity(H, lam, P, t)[1] + spread(H, G, lam, P, delays, t, bound) / 4)


@njit(cache=True, nogil=True)
def noise_and_sensitivity(H, lam, P, t):
    """Variance of the noise (q,), and variance (q,) that it gives to the fitted value at time t (delta method).

    H: (m, q) snapshots; lam: (r,) eigenvalues; P: (r + 1, m), P H the amplitudes.  With u_k (m,) the derivative of the
    k-th basis function minus its projection, the residual's Jacobian by a parameter is an outer product of u and an
    amplitude, or two (see `terms`): all is small products.
    """
    (m, q), r = H.shape, lam.shape[0]
    B, A = basis(lam, 0, m, 1), np.dot(P, H)
    left = H - np.dot(B.T, A)
    variance, total = np.zeros(q), np.zeros(q)
    for i in range(m):
        for j in range(q):
            variance[j] += left[i, j] * left[i, j] / max(1, m - r - 1)
    w = multiply(basis(lam, t, 1, 1).T, P)[0]
    for j in range(q):
        total[j] = variance[j] * dot(w, w)
    if r:
        dB, d = derivatives(lam, m, t)
        for k in range(r):
            d[k] -= dot(w, dB[k])
        u, a = dB - multiply(multiply(dB, P.T), B), A[1:]
        inverse = inverted(products(lam, u, a, np.ones(q)))
        C = multiply(multiply(inverse, products(lam, u, a, variance)), inverse)
        D, CD = np.empty(r), np.empty(r)
        for j in range(q):
            for k in range(r):
                u0, a0, u1, a1, sign = terms(lam, k)
                D[k] = d[u0] * a[a0, j] + sign * d[u1] * a[a1, j]
            for k in range(r):
                CD[k] = dot(C[k], D)
            total[j] += max(dot(CD, D), 0.0)
    return variance, total


@njit(cache=True, nogil=True)
def derivatives(lam, m, t):
    """d/dlambda of lambda**t, t lambda**(t - 1): (r, m) in the window and (r,) at time t; a pair has Re and Im of it."""
    dB, d = np.zeros((lam.shape[0], m)), np.empty(lam.shape[0])
    for k in range(lam.shape[0]):
        if lam[k].imag < 0.0:
            continue
        safe, z = lam[k] if abs(lam[k]) >= 1e-12 else complex(1e-12, 0.0), complex(1.0, 0.0)
        end = t * np.exp((t - 1) * np.log(safe))
        d[k] = end.real
        for i in range(1, m):
            dB[k, i] = i * z.real
            if lam[k].imag > 0.0:
                dB[k + 1, i] = i * z.imag
            z *= safe
        if lam[k].imag > 0.0:
            d[k + 1] = end.imag
    return dB, d


@njit(cache=True, nogil=True)
def terms(lam, k):
    """The k-th real parameter's derivative, u_i a_j + sign u_k a_l, as i, j, k, l, sign.

    Parameters are the real eigenvalues, and x and y of each pair x + iy, whose part is Re((a_x - i a_y) lambda**t).
    """
    if lam[k].imag == 0.0:
        return k, k, k, k, 0.0
    if lam[k].imag > 0.0:
        return k, k, k + 1, k + 1, 1.0
    return k - 1, k, k, k - 1, -1.0


@njit(cache=True, nogil=True)
def products(lam, u, a, weights):
    """(r, r): products of the parameters' derivatives, summed over time and coordinates; those have weights (q,)."""
    r = lam.shape[0]
    U, A, M = multiply(u, u.T), np.empty((r, r)), np.empty((r, r))
    for k in range(r):
        for l in range(k + 1):
            s = 0.0
            for j in range(a.shape[1]):
                s += weights[j] * a[k, j] * a[l, j]
            A[k, l] = A[l, k] = s
    for k in range(r):
        u0, a0, u1, a1, s = terms(lam, k)
        for l in range(r):
            v0, b0, v1, b1, z = terms(lam, l)
            M[k, l] = U[u0, v0] * A[a0, b0] + z * U[u0, v1] * A[a0, b1]
            M[k, l] += s * (U[u1, v0] * A[a1, b0] + z * U[u1, v1] * A[a1, b1])
    return M


@njit(cache=True, nogil=True)
def inverted(M):
    """The pseudoinverse of a positive semidefinite M (r, r), without eigenvalues below 1e-13 of the largest."""
    s, E = symmetric(M)
    top = np.abs(s).max()
    out = np.zeros(M.shape)
    for k in range(s.shape[0]):
        if abs(s[k]) > 1e-13 * top:
            for i in range(s.shape[0]):
                for j in range(s.shape[0]):
                    out[i, j] += E[k, i] * E[k, j] / s[k]
    return out


@njit(cache=True, nogil=True)
def spread(H, G, lam, P, delays, t, bound):
    """(q,): mean square distance of the forecast for time t from those of the first and the last four fifths of the window.

    G: (m, m), the Gram matrix of the snapshots H (m, q), relative to the first.
    """
    (m, q), r = H.shape, lam.shape[0]
    cut, total = m // 5, np.zeros(H.shape[1])
    d = min(delays, m - cut - r - 1)
    if cut == 0 or r < 1 or d < 1:
        return total
    w = multiply(basis(lam, t, 1, 1).T, P)[0]
    for start in (0, cut):
        stop = start + m - cut
        _, own, weights = search(G[start:stop, start:stop].copy(), q, np.array([d]), (r, r), bound, 1, LEAST_SQUARES)
        difference = w.copy()
        difference[start:stop] -= multiply(basis(own, t - start, 1, 1).T, weights)[0]
        total += np.dot(difference, H) ** 2 / 2
    return total
