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
from numba import njit
from numpy.typing import NDArray

from koopman_hpo.koopman.small import dot

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
NARROW = np.exp(-0.5 * ((EXPONENTS - PRIOR[0]) / PRIOR[1]) ** 2)  # prior of each exponent, for the estimate
NARROW /= NARROW.sum()
FLAT = (1.0 - BROAD) * NARROW + BROAD / len(EXPONENTS)  # for its error


class Age(NamedTuple):
    """How old training and its tangents are at the first snapshot, in snapshots: tangents <= training, both > 0."""

    training: float
    tangents: float


def forecast(H: Array, steps: int, age: Age) -> tuple[Array, Array]:
    """Estimate (q,) and its error (q,) `steps` snapshots after the last of H (m, q), m >= 3; each coordinate alone.

    The estimate is the posterior mean over exponents and lags, drawn towards zero where that lowers its expected square
    error.  The error is a half width that held the truth in 80 % of windows, of a broader posterior.
    """
    return _forecast(H, float(steps), float(age.training), float(age.tangents))


@njit(cache=True, nogil=True)
def _forecast(H, steps, training, tangents):
    (m, q), now = H.shape, tangents + H.shape[0] - 1.0  # the tangents' age
    B, ahead = candidates(m, steps, training, tangents)
    value, error = np.empty(q), np.empty(q)
    posterior(H.T.copy(), B, ahead, MISFIT * m / now, DRIFT * np.log1p(steps / now), value, error)
    return value, error


@njit(cache=True, nogil=True)
def candidates(m, steps, training, tangents):
    """The law for each lag and exponent: within the window (c, m), relative to its end, and at the horizon (c,)."""
    exponents = EXPONENTS.shape[0]
    B, ahead = np.empty((len(LAGS) * exponents, m)), np.empty(len(LAGS) * exponents)
    for i in range(m + 1):
        at = m - 1.0 + steps if i == m else float(i)
        s, t = (training + at) / (training + m - 1.0), tangents + at
        power, between = s ** -EXPONENTS[0], s ** (EXPONENTS[0] - EXPONENTS[1])
        for j in range(len(LAGS)):
            lag = m * LAGS[j]
            x = (t + lag * np.expm1(-t / lag) if lag > 0.0 else t) * power
            for k in range(j * exponents, (j + 1) * exponents):
                if i == m:
                    ahead[k] = x
                else:
                    B[k, i] = x
                x *= between
    return B, ahead


@njit(cache=True, nogil=True)
def posterior(rows, B, ahead, misfit, drift, value, error):
    """value, error (q,) <- `forecast` of rows (q, m), from `candidates`.

    misfit: relative standard deviation of the law itself within the window; drift: of what it foresees.
    """
    c, m = B.shape
    A, F, rss, squares, noise, p = np.empty((6, c))
    for k in range(c):
        squares[k] = dot(B[k], B[k])
    for j in range(rows.shape[0]):
        h = rows[j]
        power, best = dot(h, h), 0
        for k in range(c):
            A[k] = dot(B[k], h) / squares[k]  # amplitudes by least squares
            rss[k] = max(power - A[k] ** 2 * squares[k], 0.0)
            if rss[k] < rss[best]:
                best = k
        variance = (rss[best] / (m - 2) + misfit**2 * power / m) * inflation(h, B[best], A[best])
        for k in range(c):
            F[k] = A[k] * ahead[k]
            noise[k] = variance * ahead[k] ** 2 / squares[k]
            p[k] = np.exp(-ratio(rss[k] - rss[best], 2.0 * variance))
        mean = moment(p, NARROW, F, noise, 0.0)[0]
        doubt = CAUTION * moment(p, NARROW, F, noise, mean)[1] + (drift * mean) ** 2
        value[j] = mean * ratio(mean**2, mean**2 + doubt)
        error[j] = LEVEL * np.sqrt(moment(p, FLAT, F, noise, value[j])[1] + (drift * value[j]) ** 2)


@njit(cache=True, nogil=True)
def moment(likelihood, prior, F, noise, centre):
    """Mean of F (c,), and of its square distance from the centre with the noise's variance (c,), over the posterior."""
    total = mean = square = 0.0
    for k in range(F.shape[0]):
        p = likelihood[k] * prior[k % prior.shape[0]]
        total += p
        mean += p * F[k]
        square += p * ((F[k] - centre) ** 2 + noise[k])
    return mean / total, square / total


@njit(cache=True, nogil=True)
def inflation(h, basis, amplitude):
    """How many snapshots (m,) say as much as one independent one: residuals that go together count as fewer."""
    m = h.shape[0]
    product = square = before = 0.0
    for i in range(m):
        now = h[i] - amplitude * basis[i]
        product += now * before
        square += now * now
        before = now
    rho = ratio(product, square)
    return min(max((1.0 + rho) / max(1.0 - rho, 1e-9), 1.0), m / 2)


@njit(cache=True, nogil=True)
def ratio(a, b):
    """a / b, zero where b is."""
    return a / b if b > 0.0 else 0.0
