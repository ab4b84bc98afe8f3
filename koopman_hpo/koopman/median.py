"""The robust median: by coordinate, of four forecasts by weights on snapshots and of Aitken's limit."""

from __future__ import annotations

import numpy as np
from numba import njit

from koopman_hpo.koopman.robust import affine, block_rows, blocks, reduced_rank
from koopman_hpo.koopman.sequence import aitken


@njit(cache=True, nogil=True)
def members(G, steps):
    """(4, m): weights of the last snapshot, affine, blocks, reduced rank.  G: (m, m), as in `robust`."""
    m = G.shape[0]
    W = np.zeros((4, m))
    W[0, m - 1] = 1.0
    W[1], W[2], W[3] = affine(G, steps), blocks(G, steps), reduced_rank(G)
    return W


@njit(cache=True, nogil=True)
def forecast(G, H, steps):
    """The median (q,) of the five, and half the distance (q,) between the second and the fourth.  H: (m, q)."""
    q, five = H.shape[1], np.empty((5, H.shape[1]))
    five[:4] = np.dot(members(G, steps), H)
    five[4] = aitken(np.dot(block_rows(H.shape[0], 3), H))
    for j in range(q):
        for i in range(1, 5):
            x, k = five[i, j], i
            while k > 0 and five[k - 1, j] > x:
                five[k, j] = five[k - 1, j]
                k -= 1
            five[k, j] = x
    return five[2].copy(), (five[3] - five[1]) / 2
