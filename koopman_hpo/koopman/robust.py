"""Members of the robust median: weights on snapshots, each sure-footed in another way.  For noisy windows.

Each takes a Gram matrix G (m, m) of snapshots (any reference) and gives weights (m,) that sum to one.
"""

from __future__ import annotations

import numpy as np

from koopman_hpo.kernels.cpu.trajectory import hankel_gram


def difference_gram(G: np.ndarray, d: int = 1) -> np.ndarray:
    """(m - d, m - d): Gram matrix of the differences of successive delay vectors, d snapshots each."""
    D = G[1:, 1:] - G[1:, :-1] - G[:-1, 1:] + G[:-1, :-1]
    if d == 1:
        return D
    out = np.empty((len(D) - d + 1, len(D) - d + 1))
    hankel_gram(D, d, out)
    return out


def geometric(lam: np.ndarray, steps: int) -> np.ndarray:
    """sum of lam**j for j = 1..steps, in closed form, |lam| < 1."""
    return lam * (1.0 - lam**steps) / (1.0 - lam)


def difference_weights(G: np.ndarray, steps: int, d: int, energy: float, rank: int, bound: float) -> np.ndarray:
    """Difference DMD: the last snapshot plus the sum of the `steps` differences to come.

    DMD of the delay-embedded differences, of the least rank that holds `energy` of their variance, |lambda| <=
    bound, amplitudes at the last delay vector.  Local to the end of the window: good under drift.
    """
    m = len(G)
    K = difference_gram(G, d)
    w = np.eye(1, m, m - 1)[0]
    s, V = np.linalg.eigh(K[:-1, :-1])
    s, V = s[::-1], V[:, ::-1]
    if not s[0] > 0.0:
        return w
    least = int(np.searchsorted(np.cumsum(s), energy * s.sum())) + 1
    r = max(1, min(rank, least, int((s > 1e-13 * s[0]).sum())))
    U = V[:, :r] / np.sqrt(s[:r])  # (n - 1, r): X U are the principal directions
    lam, E = np.linalg.eig(U.T @ K[:-1, 1:] @ U)
    c = np.linalg.solve(E, (U.T @ K[:-1, -1]).astype(complex))
    lam = lam * np.minimum(1.0, bound / np.maximum(np.abs(lam), 1e-300))
    on_differences = (U @ (E @ (geometric(lam, steps) * c))).real
    w[d:-1] += on_differences  # delay vector i ends with the difference h[i + d] - h[i + d - 1]
    w[d - 1 : -2] -= on_differences
    return w


def affine(G: np.ndarray, steps: int) -> np.ndarray:
    """Difference DMD with the settings that were measured on real windows."""
    m = len(G)
    return difference_weights(G, steps, max(1, min(10, m // 4)), 0.999, 6, 1.0 - 1.0 / m)


def block_rows(m: int, count: int) -> np.ndarray:
    """(count, m): averaging weights of `count` blocks that cover the window, the remainder at its start left out."""
    size = m // count
    return np.hstack([np.zeros((count, m - count * size)), np.kron(np.eye(count), np.full(size, 1.0 / size))])


def blocks(G: np.ndarray, steps: int, count: int = 10) -> np.ndarray:
    """Difference DMD on the means of `count` blocks, anchored at the last block; steps rounded to whole blocks."""
    count = min(count, len(G) // 2)
    A = block_rows(len(G), count)
    size = len(G) // count
    ahead = max(1, round((steps + 0.5 * (size - 1)) / size))
    return difference_weights(A @ G @ A.T, ahead, 2, 0.99, 3, 0.9) @ A


def reduced_rank(G: np.ndarray, ridge: float = 1e-6) -> np.ndarray:
    """Regularised reduced-rank extrapolation over the whole window.

    sum_i c_i x_i of the delay vectors, with the least |sum c_i (x_{i+1} - x_i)|^2 + ridge |c|^2, sum c = 1; the
    ridge in units of the mean square of the snapshots.
    """
    m = len(G)
    d = max(1, min(10, m // 4))
    K = difference_gram(G, d) + ridge * G.trace() / m * np.eye(m - d)
    c = np.linalg.solve(K, np.ones(m - d))
    w = np.zeros(m)
    w[d - 1 : -1] = c / c.sum()
    return w


def members(G: np.ndarray, steps: int) -> np.ndarray:
    """(4, m): last, affine, blocks, reduced rank: what the median takes, beside Aitken on thirds."""
    return np.stack([np.eye(1, len(G), len(G) - 1)[0], affine(G, steps), blocks(G, steps), reduced_rank(G)])
