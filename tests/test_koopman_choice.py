"""What the automatic choices choose: rank by BIC, the robust median's error, and a better fit by optimized DMD."""

import math

import numpy as np
import pytest

from koopman_hpo import koopman
from koopman_hpo.koopman import variants
from koopman_hpo.koopman.select import bic
from koopman_hpo.koopman.window import window


def two_modes(seed, noise, m=60, q=3):
    """(m, q): a constant and two decaying modes under white noise."""
    rng, t = np.random.default_rng(seed), np.arange(m)[:, None]
    a, b, c = rng.normal(size=(3, q))
    return c + a * 0.93**t + b * 0.75**t + noise * rng.normal(size=(m, q))


def test_bic_counts_eigenvalues_and_amplitudes():
    """Schwarz 1978: n log(rss / n) + k log n, with n = m q values and k = r eigenvalues and (r + 1) q amplitudes."""
    assert bic(2.0, 50, 3, 4) == pytest.approx(150 * math.log(2.0 / 150) + (4 + 5 * 3) * math.log(150), rel=1e-15)


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_rank_is_that_of_the_planted_modes(noise):
    ranks = [koopman.fit(two_modes(seed, noise)).rank for seed in range(20)]
    assert ranks.count(2) >= 19


def test_noise_alone_earns_no_modes():
    ranks = [koopman.fit(np.random.default_rng(seed).normal(size=(50, 3))).rank for seed in range(20)]
    assert ranks.count(1) >= 18  # the least rank there is


def test_the_robust_median_states_an_error_that_grows_with_the_noise():
    quiet, loud = (
        np.median([koopman.extrapolate(two_modes(s, n), 20, "robust").error for s in range(20)]) for n in (1e-3, 1e-1)
    )
    assert 0 < quiet < loud


def residual(eigenvalues, H):
    """Least squares of H (m, q) on the modes and a constant."""
    basis = np.concatenate([eigenvalues[None] ** np.arange(len(H))[:, None], np.ones((len(H), 1))], axis=1)
    return np.linalg.norm(H - basis @ np.linalg.lstsq(basis, H.astype(complex), rcond=None)[0])


def test_optimized_dmd_fits_the_window_better_than_dmd():
    gains = []
    for seed in range(10):
        H = two_modes(seed, 3e-2, m=40)
        H = (H - H[-1]) / H.std(axis=0)
        data = window(H, "test")
        plain, best = variants.regression(data, 0.2, variants.REGRESSIONS["dmd"]), variants.optimised(data, 0.2)
        gains.append(1 - residual(best.eigenvalues, H) / residual(plain.eigenvalues, H))
    assert min(gains) > -1e-9  # never worse
    assert sum(g > 1e-6 for g in gains) >= 8  # it minimises what DMD only estimates
