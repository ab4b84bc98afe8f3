"""Which delays, which rank: the Bayesian information criterion over both, or singular value hard thresholding.

Every candidate (d, r) is judged by the same quantity, the residual of its exponentials and constant over the
whole window, so that candidates of different delays compare.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import njit

from koopman_hpo.kernels.cpu.trajectory import hankel_gram
from koopman_hpo.koopman.poles import (
    amplitudes,
    basis,
    bounded,
    centre,
    explained,
    leading,
    orthonormalise,
    poles,
    shifted_products,
)

DENSE = 24  # from this many delay vectors on, only the leading eigenpairs


@njit(cache=True, nogil=True)
def bic(rss, m, q, r):
    """m q log(rss / (m q)) + (parameters) log(m q): r eigenvalues, and r + 1 amplitudes for each of q values."""
    return m * q * math.log(rss / (m * q)) + (r + (r + 1) * q) * math.log(m * q)


@njit(cache=True, nogil=True)
def normalised(G, intercept):
    """A copy of G (m, m), centred if there is an intercept, over its trace: no unit over- or underflows; the trace."""
    G = G.copy()
    if intercept:
        centre(G)
    trace = 0.0
    for i in range(G.shape[0]):
        trace += G[i, i]
    if trace > 0.0:
        for i in range(G.shape[0]):
            for j in range(G.shape[0]):
                G[i, j] /= trace
    return G, trace


@njit(cache=True, nogil=True)
def factored(lam, m, intercept):
    """Q (c, m) and R (c, c): the exponentials are R' Q, and Q is orthonormal."""
    B = basis(lam, 0, m, intercept)
    Q, R = np.empty_like(B), np.zeros((B.shape[0], B.shape[0]))
    orthonormalise(B, Q, R)
    return Q, R


@njit(cache=True, nogil=True)
def fitted(lam, m, intercept):
    """Weights P (c, m) of the exponentials' amplitudes by least squares."""
    Q, R = factored(lam, m, intercept)
    return amplitudes(Q, R)


@njit(cache=True, nogil=True)
def operators(G, d, rank, intercept):
    """Shifted products (r, r) for `poles`, r <= rank the numerical rank of the embedding with d delays."""
    n = G.shape[0] - d + 1
    K = np.empty((n, n))
    hankel_gram(G, d, K)
    if intercept:
        centre(K)
    V, _ = leading(K, rank, DENSE)
    return shifted_products(V, intercept)


@njit(cache=True, nogil=True)
def search(G, q, delays, ranks, bound, intercept, variant):
    """The best model among delays (k,) and ranks ranks[0]..ranks[1]: d, eigenvalues (r,), weights P (c, m).

    G: (m, m), Gram matrix of the snapshots (relative to any reference if there is an intercept).  A single
    candidate is not judged.  None admissible: no eigenvalues, and the mean explains what it can.
    """
    m = G.shape[0]
    G, trace = normalised(G, intercept)
    best_d, best, best_lam = delays[0], np.inf, np.empty(0, np.complex128)
    if not trace > 0.0:  # a constant trajectory gives itself, to the last bit
        P = np.zeros((intercept, m))
        P[:, m - 1] = 1.0
        return best_d, best_lam, P
    for d in delays:
        XX, XY, YY = operators(G, d, min(ranks[1], d * q, m - d - 1), intercept)
        most = XX.shape[0]
        own, own_r = np.inf, most
        for r in range(min(ranks[0], most), most + 1):
            if r == 0 or r > own_r + 2:  # two ranks (a pair) without gain: no more with these delays
                break
            lam = bounded(poles(XX, XY, YY, r, variant), bound)
            if delays.shape[0] == 1 and ranks[0] == ranks[1]:
                best_d, best_lam = d, lam
                break
            left = max(1.0 - explained(G, factored(lam, m, intercept)[0], intercept), 1e-15)
            score = bic(left, m, q, r)
            if score < own:
                own, own_r = score, r
            if score < best:
                best_d, best, best_lam = d, score, lam
    return best_d, best_lam, fitted(best_lam, m, intercept)


@cache
def candidate_delays(m: int) -> tuple[int, ...]:
    """Delays tried for a window of m snapshots: from m / 10 to m / 2, fewer where they coincide."""
    return tuple(sorted({max(1, min(m - 2, round(m * part))) for part in (0.1, 0.2, 0.3, 0.4, 0.5)}))


def svht(G: np.ndarray, d: int, q: int, intercept: int) -> int:
    """Rank by the optimal hard threshold for unknown noise: singular values above omega(beta) times their median.

    Source: Gavish and Donoho 2014, doi:10.1109/TIT.2014.2323359, the cubic approximation of omega.
    """
    n = len(G) - d + 1
    K = np.empty((n, n))
    hankel_gram(G, d, K)
    if intercept:
        centre(K)
    beta = min(n, d * q) / max(n, d * q)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(K)[::-1][: min(n, d * q)], 0.0))
    return max(1, min(int((values > omega * np.median(values)).sum()), d * q, len(G) - d - 1))
