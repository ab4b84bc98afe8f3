"""Textbook NumPy for the Koopman tests: explicit Hankel matrices, singular value decompositions, stepping.

No Numba, no Gram matrices, one function a formula; slow and obvious.
"""

from __future__ import annotations

import numpy as np


def hankel(H: np.ndarray, d: int) -> np.ndarray:
    """(m, q) -> (d q, m - d + 1): column i stacks the snapshots i..i + d - 1."""
    return np.stack([H[i : i + d].ravel() for i in range(len(H) - d + 1)], axis=1)


def affine_eigenvalues(H: np.ndarray, d: int, r: int) -> np.ndarray:
    """Delay DMD with an intercept, in the r leading principal directions of all delay vectors."""
    X = hankel(H, d)
    U = np.linalg.svd(X - X.mean(axis=1, keepdims=True))[0][:, :r]
    Z = U.T @ X
    before = np.vstack([Z[:, :-1], np.ones(Z.shape[1] - 1)])
    return np.linalg.eigvals(np.linalg.lstsq(before.T, Z[:, 1:].T, rcond=None)[0].T[:, :r])


def affine_forecast(H: np.ndarray, lam: np.ndarray, steps: int) -> np.ndarray:
    """Constant and complex amplitudes by least squares over the window, then lambda**t."""
    t = np.arange(len(H))
    V = np.column_stack([np.ones(len(H)), lam[None, :] ** t[:, None]])
    B = np.linalg.lstsq(V, H.astype(complex), rcond=None)[0]
    return (np.append(1.0, lam ** (len(H) - 1 + steps)) @ B).real


def clip(lam: np.ndarray, bound: float) -> np.ndarray:
    return np.where(np.abs(lam) > bound, lam * bound / np.maximum(np.abs(lam), 1e-300), lam)


def difference_dmd(H: np.ndarray, steps: int, d: int, energy: float, rank: int, bound: float) -> np.ndarray:
    """The last snapshot plus `steps` differences, one after the other, by DMD of the Hankel matrix of differences."""
    D = hankel(np.diff(H, axis=0), d)
    U, s, Vt = np.linalg.svd(D[:, :-1], full_matrices=False)
    r = min(rank, int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), energy)) + 1, int((s > 1e-6 * s[0]).sum()))
    A = U[:, :r].T @ D[:, 1:] @ Vt[:r].T / s[:r]
    lam, E = np.linalg.eig(A)
    lam, b = clip(lam, bound), np.linalg.solve(E, U[:, :r].T @ D[:, -1])
    value = H[-1].astype(complex)
    for j in range(1, steps + 1):
        value = value + (U[:, :r] @ E @ (lam**j * b))[-H.shape[1] :]
    return value.real


def reduced_rank(H: np.ndarray, k: int) -> np.ndarray:
    """RRE of the last k differences: least |D c| with sum c = 1, from the pseudoinverse."""
    D = np.diff(H, axis=0)[-k:].T
    x = H[-k - 1 : -1].T
    # c = e_1 + N y spans sum c = 1
    N = np.vstack([-np.ones(k - 1), np.eye(k - 1)])
    y = np.linalg.lstsq(D @ N, -D[:, 0], rcond=None)[0]
    return x @ (np.eye(k)[0] + N @ y)


def planted(lam: np.ndarray, m: int, q: int, seed: int, constant: float = 1.0):
    """t -> (len(t), q): constant plus Re(sum_k a_k lambda_k**t) with random amplitudes; pairs need one of two."""
    rng = np.random.default_rng(seed)
    c = constant * rng.normal(size=q)
    a = rng.normal(size=(len(lam), q)) + 1j * rng.normal(size=(len(lam), q))
    a = np.where(np.abs(lam.imag)[:, None] > 0, a, a.real)
    return lambda t: c + ((np.asarray(lam)[None, :] ** np.atleast_1d(t)[:, None]) @ a).real
