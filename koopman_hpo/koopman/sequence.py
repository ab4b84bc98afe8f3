"""Extrapolation of a vector sequence to its limit: RRE, MPE, Anderson, Aitken.  Best on noise-free data.

Each gives weights (m,) that sum to one from differences of delay vectors; the horizon plays no part.  With delays
the methods find as many modes in few values as in many: without, q values would hold at most q.
Sources: Smith, Ford and Sidi 1987, doi:10.1137/1029042; Walker and Ni 2011, doi:10.1137/10078356X.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from koopman_hpo.koopman.robust import block_rows, difference_gram

_CUT = 1e-12  # relative: below it the Gram matrix holds rounding only
_MOST = 12  # differences used: the weights stay moderate


def _last(G: np.ndarray, count: int) -> np.ndarray:
    """Gram matrix (k, k) of the last k <= count differences of delay vectors, as many delays as differences."""
    d = max(1, min(count, len(G) // 3))
    return difference_gram(G, d)[-count:, -count:]


def _normalised(c: np.ndarray, m: int, shift: int) -> np.ndarray:
    """c (k,) / sum c as weights (m,) that end `shift` snapshots before the last."""
    total = c.sum()
    if not abs(total) > 1e-10 * np.abs(c).sum():
        raise np.linalg.LinAlgError("weights that sum to zero")
    w = np.zeros(m)
    w[m - shift - len(c) : m - shift] = c / total
    return w


def rre(G: np.ndarray) -> np.ndarray:
    """Reduced rank: c with sum 1 and the least |sum_i c_i (x_{i+1} - x_i)|."""
    s, V = np.linalg.eigh(_last(G, _MOST))
    return _normalised(V @ (V.sum(axis=0) / np.maximum(s, _CUT * s[-1])), len(G), 1)


def mpe(G: np.ndarray) -> np.ndarray:
    """Minimal polynomial: c_last = 1 and the least |sum_i c_i (x_{i+1} - x_i)|, then normalised."""
    K = _last(G, _MOST)
    c = np.linalg.pinv(K[:-1, :-1], rcond=_CUT, hermitian=True) @ -K[:-1, -1]
    return _normalised(np.append(c, 1.0), len(G), 1)


def anderson(G: np.ndarray, memory: int = 5) -> np.ndarray:
    """Anderson mixing of the last `memory` snapshots as iterates of a fixed point: reduced rank, mixed forward."""
    s, V = np.linalg.eigh(_last(G, memory))
    return _normalised(V @ (V.sum(axis=0) / np.maximum(s, _CUT * s[-1])), len(G), 0)


def thirds(m: int) -> np.ndarray:
    """(3, m): averaging weights of the thirds of a window."""
    return block_rows(m, 3)


@njit(cache=True, nogil=True)
def aitken(means):
    """Limit (q,) of the means of thirds (3, q), by coordinate, the ratio of their differences held in [0, 2/3]."""
    out = means[2].copy()
    for j in range(out.shape[0]):
        first, second = means[1, j] - means[0, j], means[2, j] - means[1, j]
        ratio = min(max(second / first, 0.0), 2.0 / 3.0) if first != 0.0 else 0.0
        out[j] += second * ratio / (1.0 - ratio)
    return out
