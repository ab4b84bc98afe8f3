"""The compiled parts against NumPy: small eigenproblems, kernels, one fit against the textbook."""

import numpy as np
import pytest
import reference_koopman as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from koopman_hpo import koopman
from koopman_hpo.kernels.cpu import trajectory
from koopman_hpo.koopman import deviation, poles, select, small

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=30, deadline=None)


def matched(found, wanted):
    """Largest distance when each found value takes its nearest wanted one, each once."""
    left, worst = list(wanted), 0.0
    for z in sorted(found, key=abs):
        k = int(np.argmin([abs(z - w) for w in left]))
        worst = max(worst, abs(z - left.pop(k)))
    return worst


@few
@given(n=st.integers(1, 12), seed=seeds)
def test_general_eigenvalues_are_those_of_lapack_in_exact_pairs(n, seed):
    A = np.random.default_rng(seed).normal(size=(n, n))
    lam = poles.eigenvalues(A.copy())
    assert matched(lam, np.linalg.eigvals(A)) < 1e-9 * n  # a random matrix has condition numbers up to about 1e6
    up = np.flatnonzero(lam.imag > 0)
    np.testing.assert_array_equal(lam[up].conj(), lam[up + 1])


CYCLES = np.array(  # under two shifts of its corner, which are real and of opposite sign
    [
        [0.77, -0.50, -0.13, 0.23, 0.36, -0.10],
        [0.19, 0.81, -0.71, -0.08, -0.06, 0.23],
        [0.0, 0.06, 0.95, 0.71, 1.12, -0.40],
        [0.0, 0.0, -0.04, -0.73, -0.05, -0.05],
        [0.0, 0.0, 0.0, 0.47, 0.29, -1.02],
        [0.0, 0.0, 0.0, 0.0, -0.41, -0.09],
    ]
)


@pytest.mark.parametrize(
    "A", [np.roll(np.eye(5), 1, 0), np.zeros((4, 4)), np.diag([1.0, 1.0, 2.0]), np.eye(6, k=1), CYCLES]
)
def test_general_eigenvalues_of_awkward_matrices(A):
    assert matched(poles.eigenvalues(A.copy()), np.linalg.eigvals(A)) < 1e-8


@few
@given(n=st.integers(1, 30), rank=st.integers(1, 30), seed=seeds)
def test_symmetric_eigenpairs_rebuild_the_matrix(n, rank, seed):
    X = np.random.default_rng(seed).normal(size=(n, rank))
    A = X @ X.T
    s, E = small.symmetric(A.copy())
    np.testing.assert_allclose(E.T @ np.diag(s) @ E, A, atol=1e-12 * np.abs(A).max())
    np.testing.assert_allclose(E @ E.T, np.eye(n), atol=1e-12)


@few
@given(seed=seeds, r=st.integers(1, 6))
def test_subspace_iteration_finds_what_the_full_decomposition_finds(seed, r):
    rng = np.random.default_rng(seed)
    K = rng.normal(size=(60, r)) * 10.0 ** rng.uniform(0, 2, size=r)
    K = K @ K.T + 1e-4 * np.eye(60)
    V, s = poles.leading(K.copy(), r, 24)
    W, exact = poles.leading(K.copy(), r, 1000)
    np.testing.assert_allclose(s, exact, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(V * W, axis=0)), 1.0, atol=1e-6)


@few
@given(m=st.integers(2, 12), q=st.integers(1, 4), seed=seeds)
def test_gram_of_the_embedding_is_that_of_the_explicit_hankel_matrix(m, q, seed):
    H = np.random.default_rng(seed).normal(size=(m, q))
    d = 1 + seed % (m - 1)
    G = np.empty((m, m))
    trajectory.gram(H, G)
    np.testing.assert_allclose(G, (H - H[0]) @ (H - H[0]).T, atol=1e-12)
    K = np.empty((m - d + 1, m - d + 1))
    trajectory.hankel_gram(G, d, K)
    X = reference.hankel(H - H[0], d)
    np.testing.assert_allclose(K, X.T @ X, atol=1e-12)
    row = np.empty(m)
    trajectory.gram_row(H, m, 2, None, row)
    np.testing.assert_allclose(row, G[-1], atol=1e-13)


@few
@given(seed=seeds, d=st.integers(1, 8), q=st.integers(1, 5))
def test_a_noisy_fit_is_that_of_the_textbook(seed, d, q):
    r = min(3, d * q)
    f = reference.planted(np.array([0.93, 0.8, 0.9 * np.exp(0.4j)]), 24, q, seed)
    H = f(np.arange(24)) + 0.05 * np.random.default_rng(seed).normal(size=(24, q))
    model = koopman.fit(H, delays=d, rank=r)
    lam = reference.clip(reference.affine_eigenvalues(H, d, r), 1 - 0.2 / 24)
    assert matched(model.eigenvalues, lam) < 1e-6
    for steps in (0, 3, 100):
        # the amplitudes' condition number rises when two eigenvalues are close
        np.testing.assert_allclose(model.forecast(steps), reference.affine_forecast(H, lam, steps), atol=1e-4)


@pytest.mark.parametrize("real", [[0.9], [0.9, 0.5], [0.9, 0.8 + 0.3j], [0.7 + 0.2j, 0.4 + 0.6j]])
def test_noise_through_the_fit_is_that_of_the_whole_jacobian(real):
    """Against all residuals differentiated by real parameters, by differences: q m rows, and no product of small ones."""
    m, q, t = 30, 4, 47
    lam = np.array([w for z in real for w in ([z, np.conj(z)] if np.imag(z) else [z])], complex)
    rng = np.random.default_rng(3)
    H = rng.normal(size=(m, len(lam) + 1)) * 0.3 @ rng.normal(size=(len(lam) + 1, q)) + rng.normal(size=(m, q))
    P = select.fitted(lam, m, 1)
    variance, total = deviation.noise_and_sensitivity(H, lam, P, t)

    A, B, w = P @ H, poles.basis(lam, 0, m, 1), poles.basis(lam, t, 1, 1)[:, 0] @ P
    left = ((H - B.T @ A) ** 2).sum(axis=0) / (m - len(lam) - 1)
    columns, moves = [], []
    for k, z in enumerate(lam):
        step = 1e-6 * (1j if z.imag < 0 else 1)  # the second of a pair stands for its imaginary part
        both = []
        for sign in (1, -1):
            near = lam.copy()
            near[k - (z.imag < 0)] += sign * step
            if z.imag:
                near[k + (z.imag > 0)] = np.conj(near[k - (z.imag < 0)])
            both.append((poles.basis(near, 0, m, 1).T @ A, poles.basis(near, t, 1, 1)[:, 0] @ A))
        inside, ahead = ((x - y) / 2e-6 for x, y in zip(*both, strict=True))
        columns.append((inside - B.T @ (P @ inside)).ravel())
        moves.append(ahead - w @ inside)
    J, D = np.array(columns).T, np.array(moves)
    inverse = np.linalg.pinv(J.T @ J)
    C = inverse @ (J.T * np.tile(left, m)) @ J @ inverse
    np.testing.assert_allclose(variance, left, rtol=1e-10)
    np.testing.assert_allclose(total, left * (w @ w) + np.einsum("kj,kl,lj->j", D, C, D), rtol=1e-6)
