"""Members of the robust median: weights on snapshots, each sure-footed in another way.  For noisy windows.

Each takes a Gram matrix G (m, m) of snapshots (any reference) and gives weights (m,) that sum to one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from koopman_hpo.kernels.cpu.trajectory import hankel_gram
from koopman_hpo.koopman.select import DENSE
from koopman_hpo.koopman.small import descending, multiply, symmetric


@njit(cache=True, nogil=True)
def difference_gram(G, d):
    """(m - d, m - d): Gram matrix of the differences of successive delay vectors, d snapshots each."""
    n = G.shape[0] - 1
    D = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            D[i, j] = G[i + 1, j + 1] - G[i + 1, j] - G[i, j + 1] + G[i, j]
    if d == 1:
        return D
    out = np.empty((n - d + 1, n - d + 1))
    hankel_gram(D, d, out)
    return out


@njit(cache=True, nogil=True)
def difference_weights(G, steps, d, energy, rank, bound):
    """Difference DMD: the last snapshot plus the sum of the `steps` differences to come.

    DMD of the delay-embedded differences, of the least rank that holds `energy` of their variance, |lambda| <=
    bound, amplitudes at the last delay vector.  Local to the end of the window: good under drift.
    """
    m = G.shape[0]
    K = difference_gram(G, d)
    n = K.shape[0] - 1
    w = np.zeros(m)
    w[m - 1] = 1.0
    U, r = principal(K[:n, :n].copy(), energy, rank)
    if r == 0:
        return w
    A = multiply(multiply(U.T, K[:n, 1:]), U)
    lam, E = np.linalg.eig(A.astype(np.complex128))
    c = np.linalg.solve(E, multiply(U.T, K[:n, n:]).astype(np.complex128))
    for k in range(r):
        z = lam[k] * min(1.0, bound / max(abs(lam[k]), 1e-300))
        c[k] *= z * (1.0 - z**steps) / (1.0 - z)  # the sum of z**j for j = 1..steps, |z| < 1
    ahead = multiply(U, np.dot(E, c).real)
    for i in range(n):  # delay vector i ends with the difference h[i + d] - h[i + d - 1]
        w[i + d] += ahead[i, 0]
        w[i + d - 1] -= ahead[i, 0]
    return w


@njit(cache=True, nogil=True)
def principal(K, energy, rank):
    """U (n, r): with X of Gram matrix K (n, n), overwritten, X U are the leading principal directions, and r.

    r is the least that holds `energy` of the variance, <= rank, and as the numerical rank allows; 0 if there is none.
    """
    n = K.shape[0]
    s, E = symmetric(K) if n < DENSE else rows(np.linalg.eigh(K))
    order = descending(s)
    total, held, r = s.sum(), 0.0, 0
    while r < min(rank, n) and s[order[r]] > 1e-13 * s[order[0]] and held < energy * total:
        held += s[order[r]]
        r += 1
    U = np.empty((n, r))
    for k in range(r):
        for i in range(n):
            U[i, k] = E[order[k], i] / np.sqrt(s[order[k]])
    return U, r


@njit(cache=True, nogil=True)
def rows(pairs):
    """LAPACK's eigenpairs with a vector a row, as `symmetric` has them."""
    return pairs[0], pairs[1].T.copy()


@njit(cache=True, nogil=True)
def affine(G, steps):
    """Difference DMD with the settings that were measured on real windows."""
    m = G.shape[0]
    return difference_weights(G, steps, max(1, min(10, m // 4)), 0.999, 6, 1.0 - 1.0 / m)


@njit(cache=True, nogil=True)
def block_rows(m, count):
    """(count, m): averaging weights of `count` blocks that cover the window, the remainder at its start left out."""
    size = m // count
    out = np.zeros((count, m))
    for k in range(count):
        for i in range(m - (count - k) * size, m - (count - k - 1) * size):
            out[k, i] = 1.0 / size
    return out


@njit(cache=True, nogil=True)
def blocks(G, steps):
    """Difference DMD on the means of ten blocks, anchored at the last block; steps rounded to whole blocks."""
    count = min(10, G.shape[0] // 2)
    A = block_rows(G.shape[0], count)
    size = G.shape[0] // count
    ahead = max(1, round((steps + 0.5 * (size - 1)) / size))
    means = multiply(multiply(A, G), A.T)
    return multiply(difference_weights(means, ahead, 2, 0.99, 3, 0.9).reshape((1, count)), A)[0]


@njit(cache=True, nogil=True)
def reduced_rank(G, ridge=1e-6):
    """Regularised reduced-rank extrapolation over the whole window.

    sum_i c_i x_i of the delay vectors, with the least |sum c_i (x_{i+1} - x_i)|^2 + ridge |c|^2, sum c = 1; the
    ridge in units of the mean square of the snapshots.
    """
    m = G.shape[0]
    d = max(1, min(10, m // 4))
    K = difference_gram(G, d)
    ridge *= np.trace(G) / m
    for i in range(m - d):
        K[i, i] += ridge
    c = np.linalg.solve(K, np.ones(m - d))
    w = np.zeros(m)
    w[d - 1 : m - 1] = c / c.sum()
    return w
