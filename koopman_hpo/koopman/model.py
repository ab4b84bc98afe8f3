"""`fit`: a Koopman model of a trajectory, `h_t = constant + sum_k modes_k lambda_k^t`, exact in its constant."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from koopman_hpo.errors import HyperparameterError, choice, reals, short, whole
from koopman_hpo.koopman import checks
from koopman_hpo.koopman.deviation import standard_error
from koopman_hpo.koopman.poles import LEAST_SQUARES, basis
from koopman_hpo.koopman.select import candidate_delays, search, svht
from koopman_hpo.koopman.window import Window, times, window

MAX_RANK = 8
STEPS_COUNT = "Steps count snapshots after the last one."


@dataclass(frozen=True, eq=False)
class Koopman:
    """A fitted trajectory.  `steps` count snapshots after the last one; 0 is the fitted value at the last one."""

    eigenvalues: np.ndarray  # (r,) complex, per snapshot; conjugates adjacent
    delays: int  # d, as used
    rank: int  # r, as found: less than asked for where the trajectory holds less
    bound: float  # |lambda| <= bound
    note: str  # what a reader must know, or ""
    window: Window = field(repr=False)
    weights: np.ndarray = field(repr=False)  # (c, m): amplitudes of the real basis = weights @ snapshots
    stationary: bool = False

    @cached_property
    def _amplitudes(self) -> np.ndarray:
        """(c, q): of the constant and of each real basis function, at the first snapshot; one read of the data."""
        return self.weights @ self.window.snapshots

    @cached_property
    def constant(self) -> np.ndarray:
        """(q,), in the unit of the snapshots: what is left when every mode has decayed."""
        if self.stationary:
            return self._stationary_weights() @ self.window.snapshots
        return self._amplitudes[0]

    @cached_property
    def first_modes(self) -> np.ndarray:
        """(r, q) complex: the modes as they are at the first snapshot."""
        rows = self._amplitudes[0 if self.stationary else 1 :].astype(complex)
        up = np.flatnonzero(self.eigenvalues.imag > 0)
        rows[up] = (rows[up] - 1j * rows[up + 1]) / 2
        rows[up + 1] = rows[up].conj()
        return rows

    @cached_property
    def modes(self) -> np.ndarray:
        """(r, q) complex, in the unit of the snapshots, at the last one: h = constant + Re(lambda**steps @ modes)."""
        return self.first_modes * _powers(self.eigenvalues, len(self.window.snapshots) - 1)[:, None]

    def _stationary_weights(self) -> np.ndarray:
        """(m,): the modes with lambda near 1 as they are at the last snapshot; the last snapshot if there are none."""
        m = len(self.window.snapshots)
        keep = near_one(self.eigenvalues, m)
        if not keep.any():
            return np.eye(1, m, m - 1)[0]
        v = basis(self.eigenvalues, m - 1, 1, 0)[:, 0]
        return (v * keep) @ self.weights

    def _steps(self, steps: Any, call: str) -> np.ndarray:
        x = reals(f"koopman.{call}", "steps", steps, HyperparameterError)
        t = np.asarray(steps)
        if t.dtype.kind not in "iu" or t.ndim > 1 or not ((x >= 0) & (x <= checks.MOST_STEPS)).all():
            raise HyperparameterError(
                f"koopman.{call}: steps must be a whole number in 0..{checks.MOST_STEPS}, or a vector of such, got "
                f"{short(steps)}. {STEPS_COUNT}"
            )
        return t

    def forecast(self, steps: Any) -> np.ndarray:
        """The value `steps` snapshots after the last, in closed form for any horizon.

        Args:
          steps: integer >= 0, or a vector (k,) of such.

        Returns:
          (q,) or (k, q), real, in the unit of the snapshots.

        Raises:
          HyperparameterError: steps are negative or no integers.
        """
        if type(steps) is not int or not 0 <= steps <= checks.MOST_STEPS:
            t = self._steps(steps, "forecast")
            if t.ndim:
                return self._forecasts(t)
            steps = int(t)
        if self.stationary:
            return self.constant.copy()
        v = basis(self.eigenvalues, len(self.window.snapshots) - 1 + steps, 1, 1)[:, 0]
        if "_amplitudes" in self.__dict__:
            return v @ self._amplitudes
        return (v @ self.weights) @ self.window.snapshots

    def _forecasts(self, t: np.ndarray) -> np.ndarray:
        if self.stationary:
            return np.tile(self.constant, (len(t), 1))
        return self.constant + (_powers(self.eigenvalues, t[:, None]) @ self.modes).real

    def limit(self) -> np.ndarray:
        """(q,): the forecast for infinitely many steps, the constant."""
        return self.constant.copy()

    def error(self, steps: int) -> np.ndarray:
        """(q,): standard error of `forecast(steps)`, in the unit of the snapshots; an estimate, see below.

        The delta method (noise through the amplitudes and the eigenvalues) and the spread of the same fit over
        the first and the last four fifths of the window, added in quadrature.  It is not calibrated: twice the
        estimate covered the truth in about three cases of four, five times in 95 %.

        Raises:
          HyperparameterError: steps are negative or no integer.
        """
        k = whole("koopman.error", "steps", steps, 0, checks.MOST_STEPS, STEPS_COUNT)
        if self.stationary:  # the paper's rule gives none: the distance to where the trajectory is now
            return np.abs(self.constant - self.window.snapshots[-1])
        unit = self.window.unit
        if unit == 1.0:
            return standard_error(self, k)
        scaled = replace(self, window=self.window._replace(snapshots=self.window.snapshots / unit))
        return times(standard_error(scaled, k), unit)


def _powers(lam: np.ndarray, t: Any) -> np.ndarray:
    """lam**t, 0**0 = 1, without warnings where it underflows."""
    with np.errstate(all="ignore"):
        out = np.power(lam, np.asarray(t, dtype=float))
    return np.where(np.isfinite(out), out, 0.0 + (np.asarray(t) == 0))


def near_one(lam: np.ndarray, m: int) -> np.ndarray:
    """Which eigenvalues (r,) a window of m snapshots cannot tell from 1: |lambda - 1| <= 1 / m."""
    return np.abs(lam - 1.0) <= 1.0 / m


def fit(
    snapshots: Any,
    *,
    delays: int | Literal["auto"] = "auto",
    rank: int | Literal["auto", "svht"] = "auto",
    modes: Literal["decaying", "stationary"] = "decaying",
    growth: float = 0.2,
) -> Koopman:
    """Fit a Koopman model to a trajectory: delay embedding, DMD with an intercept, amplitudes over the window.

    Args:
      snapshots: (m, q) real, row t is the hypergradient at snapshot t; or a `Recorder`.
      delays: d, how many successive snapshots make one delay vector, 1 <= d <= m - 2; "auto" tries five.
      rank: number of modes, 1 <= r <= min(d q, m - d - 1); "auto" by the Bayesian information criterion up to 8,
        together with the delays; "svht" by the optimal hard threshold on singular values (delays m // 4 if auto).
      modes: "decaying": every mode counts as lambda**steps, and the constant is exact (an intercept, lambda = 1).
        "stationary": the paper's rule, no intercept, only modes with |lambda - 1| <= 1 / m count, as constants;
        if there is none, `note` says so and the forecast is the last value.
      growth: c in |lambda| <= 1 - c / m; the slowest time constant believed is m / c snapshots.  ("stationary": 1.)

    Returns:
      `Koopman`; eigenvalues are per snapshot (dimensionless), modes have the unit of the snapshots.

    Raises:
      ShapeError: too few snapshots (m < 3), not real, not finite, or of the wrong shape.
      HyperparameterError: delays, rank, modes or growth out of range.

    Source: Tu et al. 2014, "On dynamic mode decomposition"; Arbabi and Mezic 2017 (delays); for the paper's rule
    Hataya and Mezic, "Glocal hypergradient estimation with Koopman operator".
    """
    data = window(snapshots, "koopman.fit", 3)
    m, q = data.snapshots.shape
    if type(modes) is not str or modes != "decaying":
        choice("koopman.fit", "modes", modes, ("decaying", "stationary"))
    c = checks.fraction(growth, "growth", "koopman.fit", 0.0, m)
    ds, ranks = _settings(delays, rank, m, q)
    intercept = 1 if modes == "decaying" else 0
    G = data.gram if intercept else _absolute_gram(data)
    bound = 1.0 - c / m if intercept else 1.0
    if ranks[0] == 0:
        ranks = (svht(G, int(ds[0]), q, intercept),) * 2
    d, lam, weights = search(G, q, ds, ranks, bound, intercept, LEAST_SQUARES)
    note = ""
    if not intercept and not near_one(lam, m).any():
        note = f"no eigenvalue within 1/{m} of 1: the forecast is the last value"
    return Koopman(lam, int(d), len(lam), bound, note, data, weights, not intercept)


def _settings(delays: Any, rank: Any, m: int, q: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Delays (k,) and the range of ranks to try; (0, 0) is the hard threshold."""
    if type(delays) is int and type(rank) is int and 1 <= delays <= m - 2:  # the common case costs nothing
        ds = [delays]
    elif isinstance(delays, str) and delays == "auto":
        ds = [max(1, min(m // 4, m - 2))] if isinstance(rank, str) and rank == "svht" else list(candidate_delays(m))
    else:
        do = 'Record more snapshots, or delays="auto".'
        ds = [whole("koopman.fit", "delays", delays, 1, m - 2, do)]
    if isinstance(rank, str) and rank in ("auto", "svht"):
        return np.array(ds), ((1, MAX_RANK) if rank == "auto" else (0, 0))
    r = whole("koopman.fit", "rank", rank, do='Or rank="auto", "svht".')
    enough = [d for d in ds if r <= min(d * q, m - d - 1)]
    if not enough:
        raise HyperparameterError(
            f"koopman.fit: rank={r} needs 1 <= rank <= min(d q, m - d - 1), got snapshots of shape (m, q) = "
            f"{(m, q)} and delays={delays}. Record more inner steps, change delays, or lower rank."
        )
    return np.array(enough), (r, r)


def _absolute_gram(data: Window) -> np.ndarray:
    """The Gram matrix of the snapshots themselves, from the one relative to the first; one more read."""
    H = data.snapshots if data.unit == 1.0 else data.snapshots / data.unit
    cross = H @ H[0]
    return data.gram + cross[:, None] + cross[None, :] - cross[0]
