"""Loops over a trajectory: rows of its Gram matrix, and the Gram matrix of its delay embedding.

Letters: `m` snapshots, `q` values in each, `d` delays, `n = m - d + 1` delay vectors.  Snapshots are taken relative
to the first: the fits have an exact constant and never need it, and subtracting it before squaring keeps the
digits that a large constant would cost.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def gram_row(H, m, block, work, out):
    """out[i] <- (H[i] - H[0]) . (H[m-1] - H[0]) for i < m.  H: (>= m, q); work: unused; out: (>= m,).

    `block` values at a time, so that the last and the first snapshot stay in the cache while the others stream
    by.  Sums may be reordered (they only run in vector registers then); NaN and inf still show.
    """
    q = H.shape[1]
    for i in range(m):
        out[i] = 0.0
    for start in range(0, q, block):
        stop = min(start + block, q)
        for i in range(m):
            s = 0.0
            for j in range(start, stop):
                s += (H[i, j] - H[0, j]) * (H[m - 1, j] - H[0, j])
            out[i] += s


@njit(cache=True, nogil=True)
def gram(H, out):
    """out <- Gram matrix of the snapshots minus the first.  H: (m, q), narrow (BLAS is faster on wide); out: (m, m)."""
    m, q = H.shape
    for i in range(m):
        for k in range(i + 1):
            s = 0.0
            for j in range(q):
                s += (H[i, j] - H[0, j]) * (H[k, j] - H[0, j])
            out[i, k] = s
            out[k, i] = s


@njit(cache=True, nogil=True)
def hankel_gram(G, d, out):
    """out <- sum of the d shifted diagonal blocks of G: the Gram matrix of d stacked snapshots.

    G: (m, m) symmetric; out: (m - d + 1, m - d + 1).
    """
    n = G.shape[0] - d + 1
    for i in range(n):
        for j in range(n):
            out[i, j] = G[i, j]
        for k in range(1, d):
            for j in range(n):
                out[i, j] += G[i + k, j + k]


def combine(c, H, out):
    """out[j] <- sum over snapshots of c[i] H[i, j]: a forecast from its weights.  c: (m,); H: (m, q); out: (q,)."""
    np.matmul(c, H, out=out)
