"""Other ways to the eigenvalues: autoregression, total least squares, forward-backward, optimised DMD.

Each returns a `Koopman`: only the eigenvalues differ, constant and amplitudes are fitted over the window as in `fit`.
"""

from __future__ import annotations

import numpy as np

from koopman_hpo.koopman.model import MAX_RANK, Koopman
from koopman_hpo.koopman.poles import (
    FORWARD_BACKWARD,
    LEAST_SQUARES,
    TOTAL_LEAST_SQUARES,
    basis,
    bounded,
    centre,
    pair,
)
from koopman_hpo.koopman.select import candidate_delays, fitted, search
from koopman_hpo.koopman.window import Window

REGRESSIONS = {"dmd": LEAST_SQUARES, "tls": TOTAL_LEAST_SQUARES, "fb": FORWARD_BACKWARD}


def regression(data: Window, growth: float, variant: int) -> Koopman:
    """Delays and rank by the Bayesian information criterion, with one of `REGRESSIONS`."""
    m, q = data.snapshots.shape
    bound = 1.0 - growth / m
    d, lam, P = search(data.gram, q, np.array(candidate_delays(m)), (1, MAX_RANK), bound, 1, variant)
    return Koopman(lam, int(d), len(lam), bound, "", data, P)


def from_eigenvalues(data: Window, lam: np.ndarray, delays: int, bound: float, note: str = "") -> Koopman:
    """Constant and amplitudes by least squares over the window, for given eigenvalues (r,) in conjugate pairs."""
    lam = bounded(lam, bound)
    return Koopman(lam, delays, len(lam), bound, note, data, fitted(lam, len(data.snapshots), 1))


def autoregression(data: Window, growth: float, order: int | None = None) -> Koopman:
    """AR with intercept, one set of coefficients for all coordinates: h_t = c + sum_{j<=order} a_j h_{t-j}."""
    m = len(data.snapshots)
    p = order or max(1, min(5, m // 5))
    K = np.empty((p + 1, p + 1))  # sums over time of products of lags: the anti-diagonal blocks' Gram matrix
    n = m - p
    for i in range(p + 1):
        for j in range(p + 1):
            block = data.gram[i : i + n, j : j + n]
            K[i, j] = block.trace() - block.sum() / n
    scale = K.trace() or 1.0
    a = np.linalg.solve(K[:p, :p] + 1e-13 * scale * np.eye(p), K[:p, p])  # a[i] multiplies h_{t - p + i}
    companion = np.eye(p, k=1)
    companion[-1] = a
    lam = pair(np.linalg.eigvals(companion).astype(complex))
    return from_eigenvalues(data, lam, p, 1.0 - growth / m)


def optimised(data: Window, growth: float, iterations: int = 20) -> Koopman:
    """Optimised DMD: variable projection from the "dmd" fit, kept only if within two standard errors of it.

    Gauss-Newton on the eigenvalues (Kaufman's Jacobian), all in the Gram matrix; a step must lower the residual.
    A far better residual far away is more often a fit to noise than a better model.
    Source: Askham and Kutz 2018, doi:10.1137/M1124176.
    """
    start = regression(data, growth, LEAST_SQUARES)
    m = len(data.snapshots)
    G = data.gram.copy()
    centre(G)
    best, best_rss = start, _residual(G, start)
    error = None
    for _ in range(iterations if start.rank else 0):
        step, covariance = _gauss_newton(G, best)
        if error is None:
            error = np.sqrt(np.abs(np.diag(covariance)) * best_rss / (m * data.snapshots.shape[1]))
        for damping in (1.0, 0.3, 0.1, 0.01):
            trial = from_eigenvalues(data, pair(best.eigenvalues + damping * step), start.delays, start.bound)
            rss = _residual(G, trial)
            if rss < best_rss:
                break
        else:
            break
        done = best_rss - rss < 1e-10 * best_rss
        best, best_rss = trial, rss
        if done:
            break
    moved = [np.abs(best.eigenvalues - z).min() for z in start.eigenvalues]
    if error is not None and np.any(np.array(moved) > 2.0 * error):
        return from_eigenvalues(
            data, start.eigenvalues, start.delays, start.bound, "optimum beyond two standard errors: dmd kept"
        )
    return best


def _residual(G: np.ndarray, model: Koopman) -> float:
    """Sum of squares that the model leaves, from the centred Gram matrix."""
    left = np.eye(len(G)) - basis(model.eigenvalues, 0, len(G), 1).T @ model.weights
    return float(np.einsum("ij,jk,ik->", left, G, left))


def _gauss_newton(G: np.ndarray, model: Koopman) -> tuple[np.ndarray, np.ndarray]:
    """Step (r,) of the eigenvalues, and (J'J)^-1 (r, r)."""
    lam, m = model.eigenvalues, len(G)
    times = np.arange(m)
    P = model.weights[1:].astype(complex)  # complex amplitudes at the first snapshot = P @ snapshots
    up = np.flatnonzero(lam.imag > 0)
    P[up] = (P[up] - 1j * P[up + 1]) / 2
    P[up + 1] = P[up].conj()
    safe = np.where(np.abs(lam) < 1e-12, 1e-12, lam)
    dB = times[:, None] * safe ** np.maximum(times - 1, 0)[:, None]
    u = dB - basis(lam, 0, m, 1).T @ (model.weights @ dB)
    inverse = np.linalg.pinv((u.conj().T @ u) * (P.conj() @ G @ P.T), rcond=1e-14, hermitian=True)
    return inverse @ np.einsum("ik,ij,kj->k", u.conj(), G, P.conj()), inverse
