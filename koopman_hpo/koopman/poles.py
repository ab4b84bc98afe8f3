"""Eigenvalues of the delay-embedded dynamics, and weights on snapshots: the compiled numerics of the fits.

Everything here sees a trajectory only through its Gram matrix (m, m), whatever the number q of values.  With n
delay vectors, V (n, r) holds their leading principal directions over time: row i are the r coordinates of delay
vector i, up to the scale of each, which changes no eigenvalue.  One decomposition serves all ranks and variants.

Sources: Tu et al. 2014 (doi:10.3934/jcd.2014.1.391), Hemati et al. 2017 (total least squares,
doi:10.1007/s00162-017-0432-2), Dawson et al. 2016 (forward-backward, doi:10.1007/s00348-016-2127-7).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from koopman_hpo.koopman.small import descending, dot, francis, hessenberg, solve, symmetric

LEAST_SQUARES, TOTAL_LEAST_SQUARES, FORWARD_BACKWARD = 0, 1, 2


@njit(cache=True, nogil=True)
def centre(K):
    """In place: the Gram matrix K (n, n) of vectors becomes that of the vectors minus their mean."""
    n = K.shape[0]
    mean, total = np.zeros(n), 0.0
    for i in range(n):
        for j in range(n):
            mean[j] += K[i, j] / n
    for j in range(n):
        total += mean[j] / n
    for i in range(n):
        for j in range(n):
            K[i, j] += total - mean[i] - mean[j]


@njit(cache=True, nogil=True)
def orthonormalise(B, Q, R):
    """R' Q = B by Gram-Schmidt, twice over; a row that depends on the former ones gives zeros.  B, Q: (c, m)."""
    c, m = B.shape
    for k in range(c):
        q = Q[k]
        for i in range(m):
            q[i] = B[k, i]
        size = dot(q, q)
        for _ in range(2):
            for l in range(k):
                s = dot(Q[l], q)
                R[l, k] += s
                for i in range(m):
                    q[i] -= s * Q[l, i]
        norm = dot(q, q)
        R[k, k] = np.sqrt(norm)
        scale = 1.0 / R[k, k] if norm > 1e-26 * size else 0.0
        for i in range(m):
            q[i] *= scale


@njit(cache=True, nogil=True)
def subspace(K, r):
    """About r leading eigenpairs of K (n, n) by subspace iteration: s (r + 4,), rows E (r + 4, n), unsorted.

    What stands out of the noise converges in two or three products; what does not is any basis of the noise.
    """
    n, c = K.shape[0], r + 4
    Q, Y = np.empty((c, n)), np.empty((c, n))
    for k in range(c):
        for i in range(n):
            Y[k, i] = K[(k * n) // c, i]
    before = np.zeros(r)
    for _ in range(8):
        orthonormalise(Y, Q, np.zeros((c, c)))
        Y = np.dot(Q, K)
        s, E = symmetric(np.dot(Y, Q.T))
        order, done = descending(s), True
        for k in range(r):  # Ritz values converge with the square of the vectors
            now = s[order[k]]
            done = done and abs(now - before[k]) <= 1e-8 * now + 1e-15 * s[order[0]]
            before[k] = now
        if done:
            break
    return s, np.dot(E, Q)


@njit(cache=True, nogil=True)
def leading(K, r, dense):
    """Leading eigenpairs of the positive semidefinite K (n, n): V (n, r'), s (r',), r' <= r as rounding allows.

    K is overwritten.  From `dense` rows on by subspace iteration, unless most of the spectrum is wanted.
    """
    n = K.shape[0]
    s, E = symmetric(K) if n < dense or 3 * r + 8 > n else subspace(K, r)
    order = descending(s)
    kept = 0
    while kept < r and s[order[kept]] > 4e-16 * n * s[order[0]]:
        kept += 1
    top, V = np.empty(kept), np.empty((n, kept))
    for k in range(kept):
        top[k] = s[order[k]]
        for i in range(n):
            V[i, k] = E[order[k], i]
    return V, top


@njit(cache=True, nogil=True)
def pair(lam):
    """Eigenvalues of a real matrix with rounding in them, conjugates made exact and adjacent (+ first)."""
    r = lam.shape[0]
    out = np.empty(r, np.complex128)
    used = np.zeros(r, np.bool_)
    filled = 0
    size = np.empty(r)
    for i in range(r):
        size[i] = abs(lam[i])
    for i in descending(size):
        if used[i]:
            continue
        used[i] = True
        best, mate = 2.0 * abs(lam[i].imag), -1  # distance of the own conjugate: nearest wins
        for j in range(r):
            if not used[j] and abs(lam[j] - np.conj(lam[i])) < best:
                best, mate = abs(lam[j] - np.conj(lam[i])), j
        if mate < 0:
            out[filled] = lam[i].real
            filled += 1
        else:
            used[mate] = True
            z = 0.5 * (lam[i] + np.conj(lam[mate]))
            out[filled] = complex(z.real, abs(z.imag))
            out[filled + 1] = complex(z.real, -abs(z.imag))
            filled += 2
    return out


@njit(cache=True, nogil=True)
def shifted_products(V, intercept):
    """X'X, X'Y, Y'Y of the rows before and after one step, each minus its own mean if there is an intercept."""
    n, r = V.shape[0] - 1, V.shape[1]
    X, Y = np.empty((n, r)), np.empty((n, r))
    for k in range(r):
        total = 0.0
        for i in range(1, n):
            total += V[i, k]
        a = intercept * (total + V[0, k]) / n
        b = intercept * (total + V[n, k]) / n
        for i in range(n):
            X[i, k] = V[i, k] - a
            Y[i, k] = V[i + 1, k] - b
    XX, YY = np.dot(X.T, X), np.dot(Y.T, Y)
    for k in range(r):  # a direction that lives in the first or last delay vector only has no dynamics
        XX[k, k] += 1e-14
        YY[k, k] += 1e-14
    return XX, np.dot(X.T, Y), YY


@njit(cache=True, nogil=True)
def eigenvalues(A):
    """Eigenvalues (r,) of a real matrix, in exact conjugate pairs (+ first)."""
    lam = np.empty(A.shape[0], np.complex128)
    hessenberg(A)
    if not francis(A, lam):
        raise np.linalg.LinAlgError("eigenvalues did not converge")
    return lam


@njit(cache=True, nogil=True)
def forward_backward(XX, XY, YY):
    """Eigenvalues of (A_forward A_backward^-1)^(1/2), root by root the one nearest to the forward eigenvalues.

    Both operators act in the same coordinates, so that without noise they are exact inverses (no bias).
    """
    forward = solve(XX, XY)
    backward = solve(YY, np.ascontiguousarray(XY.T))
    near = eigenvalues(forward.copy())
    roots = np.sqrt(eigenvalues(solve(backward, forward)))
    for k in range(roots.shape[0]):
        same, opposite = np.inf, np.inf
        for z in near:
            same, opposite = min(same, abs(z - roots[k])), min(opposite, abs(z + roots[k]))
        if opposite < same:
            roots[k] = -roots[k]
    return pair(roots)


@njit(cache=True, nogil=True)
def corner(A, r):
    """The leading r rows and columns, a copy."""
    out = np.empty((r, r))
    for i in range(r):
        for j in range(r):
            out[i, j] = A[i, j]
    return out


@njit(cache=True, nogil=True)
def poles(XX, XY, YY, r, variant):
    """Eigenvalues (r,) of the one-step operator in the first r coordinates, by the chosen regression."""
    if variant == TOTAL_LEAST_SQUARES:
        Z = np.empty((2 * r, 2 * r))
        for i in range(r):
            for j in range(r):
                Z[i, j], Z[r + i, r + j] = XX[i, j], YY[i, j]
                Z[i, r + j] = Z[r + j, i] = XY[i, j]
        s, E = symmetric(Z)
        order = descending(s)
        before, after = np.empty((r, r)), np.empty((r, r))
        for k in range(r):
            for j in range(r):
                before[k, j], after[k, j] = E[order[k], j], E[order[k], r + j]
        return eigenvalues(solve(before, after))
    if variant == FORWARD_BACKWARD:
        return forward_backward(corner(XX, r), corner(XY, r), corner(YY, r))
    return eigenvalues(solve(corner(XX, r), corner(XY, r)))


@njit(cache=True, nogil=True)
def bounded(lam, bound):
    """Eigenvalues pulled radially to |lambda| <= bound: growth is forbidden.

    Before that, coincident ones are set 1e-6 apart: lambda**t and its neighbour then span t lambda**t, the second
    function of a defective pair, to a part 1e-6 t.  (Those that coincide on the bound count once.)
    """
    out = lam.copy()
    for k in range(lam.shape[0]):
        for l in range(k):
            twin = abs(lam[k] - lam[l]) < 1e-7
            if twin and (lam[k].imag == 0.0 or lam[k] != np.conj(lam[l])):
                out[k] -= 1e-6
        size = abs(out[k])
        if size > bound:
            out[k] *= bound / size
    return out


@njit(cache=True, nogil=True)
def basis(lam, first, count, intercept):
    """(r + intercept, count): rows 1, lambda**t (real), Re and Im of lambda**t (a pair), t = first, first + 1, ..."""
    B = np.ones((lam.shape[0] + intercept, count))
    for k in range(lam.shape[0]):
        row, z = B[k + intercept], complex(1.0, 0.0)
        if first > 0:
            z = lam[k] ** first if lam[k] != 0 else complex(0.0, 0.0)
        second = lam[k].imag < 0  # its conjugate came before
        for i in range(count):
            row[i] = -z.imag if second else z.real
            z *= lam[k]
    return B


@njit(cache=True, nogil=True)
def amplitudes(Q, R):
    """P (c, m) = R^-1 Q: P @ H are the least squares amplitudes of the basis R' Q; dependent rows get none."""
    c, m = Q.shape
    P = np.zeros((c, m))
    for k in range(c - 1, -1, -1):
        if dot(Q[k], Q[k]) == 0.0:
            continue
        for i in range(m):
            P[k, i] = Q[k, i] / R[k, k]
        for l in range(k + 1, c):
            s = R[k, l] / R[k, k]
            for i in range(m):
                P[k, i] -= s * P[l, i]
    return P


@njit(cache=True, nogil=True)
def explained(G, Q, first):
    """sum over rows k >= first of q_k G q_k': the part of trace(G) that a basis explains."""
    QG = np.dot(Q, G)
    total = 0.0
    for k in range(first, Q.shape[0]):
        total += dot(QG[k], Q[k])
    return total
