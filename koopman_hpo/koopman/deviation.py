"""How wrong a forecast may be: noise through the fit (delta method), and the same fit on parts of the window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from koopman_hpo.koopman.poles import LEAST_SQUARES, basis
from koopman_hpo.koopman.select import search

if TYPE_CHECKING:
    from koopman_hpo.koopman.model import Koopman


def noise_and_sensitivity(model: Koopman, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the noise (q,), and variance (q,) that it gives to the fitted value at time t (delta method).

    With P the weights, u_k the derivative of the k-th basis function minus its projection, and a_k (q,) its
    amplitudes, the Jacobian of the residual by lambda_k is the outer product u_k a_k: all is small products.
    """
    H, lam = model.window.snapshots, model.eigenvalues
    m, r = len(H), len(lam)
    B, v = basis(lam, 0, m, 1).T, basis(lam, t, 1, 1)[:, 0]
    w = v @ model.weights
    residual = H - B @ (model.weights @ H)
    variance = (residual**2).sum(axis=0) / max(1, m - r - 1)
    total = variance * (w @ w)
    if r:
        times = np.arange(m)
        with np.errstate(all="ignore"):  # a derivative that underflows is zero
            safe = np.where(np.abs(lam) < 1e-12, 1e-12, lam)
            dB = times[:, None] * safe ** np.maximum(times - 1, 0)[:, None]
            dv = t * np.exp((t - 1) * np.log(safe))
        a = model.first_modes
        u = dB - B @ (model.weights @ dB)
        UU = u.conj().T @ u
        M = UU * (a.conj() @ a.T)
        inverse = np.linalg.pinv(M, rcond=1e-13, hermitian=True)
        C = inverse @ (UU * ((a.conj() * variance) @ a.T)) @ inverse
        D = (np.nan_to_num(dv) - w @ dB)[:, None] * a
        total = total + np.maximum(np.einsum("kj,kl,lj->j", D, C, D.conj()).real, 0.0)
    return variance, total


def spread(model: Koopman, steps: int, variant: int = LEAST_SQUARES) -> np.ndarray:
    """(q,): mean square distance of the forecast from those of the first and the last four fifths of the window."""
    G = model.window.gram
    m = len(G)
    cut = m // 5
    r, d = model.rank, min(model.delays, m - cut - model.rank - 1)
    if cut == 0 or r < 1 or d < 1:
        return np.zeros(model.window.snapshots.shape[1])
    w = basis(model.eigenvalues, m - 1 + steps, 1, 1)[:, 0] @ model.weights
    total = np.zeros(model.window.snapshots.shape[1])
    for start, stop in ((0, m - cut), (cut, m)):
        part = np.ascontiguousarray(G[start:stop, start:stop])
        _, lam, P = search(part, len(total), np.array([d]), (r, r), model.bound, 1, variant)
        difference = w.copy()
        difference[start:stop] -= basis(lam, m - 1 - start + steps, 1, 1)[:, 0] @ P
        total += (difference @ model.window.snapshots) ** 2 / 2
    return total


def standard_error(model: Koopman, steps: int) -> np.ndarray:
    """(q,): delta method and half the spread over parts of the window, in quadrature.

    Half, because a fit on four fifths of a window scatters about twice as far from the whole window's fit as that
    one from the truth (for a mean the ratio is 1/2, for an extrapolated exponential 1.5 to 3).  On planted decaying
    modes with white noise of 1 % twice this error covers the truth in 84 to 98 % of cases.
    """
    t = len(model.window.snapshots) - 1 + steps
    return np.sqrt(noise_and_sensitivity(model, t)[1] + spread(model, steps) / 4)
