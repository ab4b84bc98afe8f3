"""The aging law: how hypergradients of a training run rise and fade as the run and its tangents grow old.

Gradient descent on a loss with a broad spectrum forgets like a power of its age.  A hypergradient whose tangents began when
training was b steps old is then, to a good approximation,

    h_t = A e(t) s_t^-gamma,   s_t = b + t,   e(t) = t - l (1 - exp(-t / l))

with t the tangents' age and l the lag of momentum.  It rises like t, peaks near the age b, and decays like a power: what no
sum of a few exponentials fitted to a short window foresees.  gamma is near 2 for optimizer hyperparameters, whatever the
model (docs/evidence.md): that is the prior, and a window of snapshots refines it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Chosen on seeds 0 to 2 of the study's dense models; docs/evidence.md reports other seeds, and two models more.
EXPONENTS = np.linspace(-1.0, 5.0, 31)  # gamma
PRIOR = (1.9, 0.4)  # mean and standard deviation of gamma
BROAD = 0.3  # share of a flat prior, for the error alone
LAGS = (0.0, 0.1, 0.2, 0.4, 0.8)  # l, in windows
MISFIT = 0.02  # of the law itself within a window, relative, while tangents are young
DRIFT = 0.3  # relative error of the law, per e-fold of the tangents' age to come
CAUTION = 2.0  # the posterior variance counts so many times against the estimate
LEVEL = 1.5  # standard deviations in the stated error: it held the truth in 80 % of windows
COLUMNS = 512  # at a time


class Age(NamedTuple):
    """How old training and its tangents are at the first snapshot, in snapshots: tangents <= training, both > 0."""

    training: float
    tangents: float


class _Law(NamedTuple):
    """The candidates (c,), one for each lag and exponent."""

    basis: Array  # (c, m) e(t) s^-gamma over the window, s relative to its end
    ahead: Array  # (c,) the same at the horizon
    prior: Array  # (c,) narrow: for the estimate
    broad: Array  # (c,): for its error
    misfit: float  # relative standard deviation
    drift: float  # relative standard deviation


def _law(m: int, steps: int, age: Age) -> _Law:
    at = np.append(np.arange(m), m - 1.0 + steps)
    t, s = age.tangents + at, age.training + at
    lag = m * np.array(LAGS)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        e = np.where(lag > 0, t + lag * np.expm1(-t / lag), t)  # (l, m + 1)
    power = (s / s[m - 1]) ** -EXPONENTS[:, None]
    B = (e[:, None] * power).reshape(-1, m + 1)
    mean, sd = PRIOR
    narrow = np.exp(-0.5 * ((EXPONENTS - mean) / sd) ** 2)
    narrow /= narrow.sum()
    broad = (1.0 - BROAD) * narrow + BROAD / len(EXPONENTS)
    tile = lambda p: np.tile(p, len(LAGS))
    drift = DRIFT * np.log(t[-1] / t[m - 1])
    return _Law(B[:, :m], B[:, m], tile(narrow), tile(broad), MISFIT * m / t[m - 1], float(drift))


def forecast(H: Array, steps: int, age: Age) -> tuple[Array, Array]:
    """Estimate (q,) and its error (q,) `steps` snapshots after the last of H (m, q), m >= 3.

    The estimate is the posterior mean over exponents and lags, drawn towards zero where that lowers its expected square
    error.  The error is a half width that held the truth in 80 % of windows, of a broader posterior.
    """
    law = _law(len(H), steps, age)
    parts = [_posterior(law, H[:, i : i + COLUMNS]) for i in range(0, H.shape[1], COLUMNS)]
    value, error = (np.concatenate(x) for x in zip(*parts, strict=True))
    return value, error


def _posterior(law: _Law, H: Array) -> tuple[Array, Array]:
    """`forecast` of some columns (m, q)."""
    m = len(H)
    squares = np.einsum("cm,cm->c", law.basis, law.basis)[:, None]
    A = law.basis @ H / squares  # (c, q) amplitudes by least squares
    power = np.einsum("mq,mq->q", H, H)
    rss = np.maximum(power - A**2 * squares, 0.0)
    best = rss.argmin(axis=0)
    variance = rss.min(axis=0) / (m - 2) + law.misfit**2 * power / m
    # residuals that go together count as fewer
    residual = H - law.basis[best].T * np.take_along_axis(A, best[None], axis=0)
    variance *= _inflation(residual)
    likelihood = np.exp(-_ratio(rss - rss.min(axis=0), 2.0 * variance))
    F = A * law.ahead[:, None]
    noise = variance * law.ahead[:, None] ** 2 / squares
    p = _normalised(law.prior, likelihood)
    mean = (p * F).sum(axis=0)
    doubt = CAUTION * (p * ((F - mean) ** 2 + noise)).sum(axis=0) + (law.drift * mean) ** 2
    value = mean * _ratio(mean**2, mean**2 + doubt)
    p = _normalised(law.broad, likelihood)
    error = (p * ((F - value) ** 2 + noise)).sum(axis=0) + (law.drift * value) ** 2
    return value, LEVEL * np.sqrt(error)


def _inflation(residual: Array) -> Array:
    """(q,): how many snapshots (m, q) say as much as one independent one, from the correlation of neighbours."""
    rho = _ratio((residual[1:] * residual[:-1]).sum(axis=0), (residual**2).sum(axis=0))
    return np.clip((1.0 + rho) / np.maximum(1.0 - rho, 1e-9), 1.0, len(residual) / 2)


def _normalised(prior: Array, likelihood: Array) -> Array:
    p = prior[:, None] * likelihood
    return p / p.sum(axis=0)


def _ratio(a: Array, b: Array) -> Array:
    """a / b, zero where b is."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=np.asarray(b) > 0)
