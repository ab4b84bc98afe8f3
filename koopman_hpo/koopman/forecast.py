"""`extrapolate`: one call from a window of snapshots to a value, its error, and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from koopman_hpo.errors import HyperparameterError, choice, reals, short, whole
from koopman_hpo.koopman import aging, checks, median, robust, sequence, variants
from koopman_hpo.koopman.aging import Age
from koopman_hpo.koopman.deviation import standard_error
from koopman_hpo.koopman.model import STEPS_COUNT, Koopman
from koopman_hpo.koopman.model import fit as fit_model
from koopman_hpo.koopman.window import Window, deviations, relative_gram, times, units, window

GROWTH = 0.2  # c in |lambda| <= 1 - c / m
GATE = 0.5  # a forecast is accepted if its error is below this part of its move
STRICT = 0.2  # of that, where the aging law is the alternative


@dataclass(frozen=True, eq=False)
class Forecast:
    """What `extrapolate` returns.  A forecast that is not accepted has the last snapshot as its value."""

    value: np.ndarray  # (q,), in the unit of the snapshots
    error: np.ndarray  # (q,), same unit; of `value`: see `extrapolate`
    accepted: bool  # False: the last snapshot stands
    reason: str  # the decision in words, with both numbers of the gate
    method: str  # the method whose value this is
    move: float  # root mean square distance from the last snapshot to the gated forecast, in standard deviations
    deviation: float  # root mean square of its estimated error, same unit: accepted if < gate * move


# A method: (data in units of its standard deviations, steps, growth) -> value (q,), error (q,), note
Estimate = tuple[np.ndarray, np.ndarray, str]


def _from_model(model: Koopman, steps: int) -> Estimate:
    return model.forecast(steps), standard_error(model, steps), model.note


def _regression(variant: int, data: Window, steps: int, growth: float) -> Estimate:
    return _from_model(variants.regression(data, growth, variant), steps)


def _autoregression(data: Window, steps: int, growth: float) -> Estimate:
    return _from_model(variants.autoregression(data, growth), steps)


def _optimised(data: Window, steps: int, growth: float) -> Estimate:
    return _from_model(variants.optimised(data, growth), steps)


def _stationary(data: Window, steps: int, growth: float) -> Estimate:
    model = fit_model(data.snapshots, modes="stationary", growth=growth)
    return model.forecast(steps), model.error(steps), model.note


def _weighted(weights: Callable[[np.ndarray, int], np.ndarray], data: Window, steps: int, growth: float) -> Estimate:
    """Weights on snapshots; their error is the spread over the first and the last four fifths of the window."""
    m = len(data.gram)
    cut = max(1, m // 5)
    W = np.zeros((3, m))
    W[0] = weights(data.gram, steps)
    W[1, : m - cut] = weights(np.ascontiguousarray(data.gram[: m - cut, : m - cut]), steps + cut)
    W[2, cut:] = weights(np.ascontiguousarray(data.gram[cut:, cut:]), steps)
    value, early, late = W @ data.snapshots
    return value, np.sqrt(((early - value) ** 2 + (late - value) ** 2) / 2), ""


def _aitken(data: Window, steps: int, growth: float) -> Estimate:
    m = len(data.snapshots)
    cut = max(1, m // 5)
    rows = np.zeros((3, 3, m))
    rows[0] = sequence.thirds(m)
    rows[1, :, : m - cut] = rows[2, :, cut:] = sequence.thirds(m - cut)
    value, early, late = (sequence.aitken(means) for means in rows @ data.snapshots)
    return value, np.sqrt(((early - value) ** 2 + (late - value) ** 2) / 2), ""


def _robust(data: Window, steps: int, growth: float) -> Estimate:
    """Median of five members by coordinate; its error is half the distance between the second and the fourth."""
    value, error = median.forecast(data.gram, data.snapshots, steps)
    return value, error, ""


def _limit(weights: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda G, steps: weights(G)


_ESTIMATES: dict[str, Callable[[Window, int, float], Estimate]] = {
    "affine": partial(_weighted, robust.affine),
    "aitken": _aitken,
    "anderson": partial(_weighted, _limit(sequence.anderson)),
    "ar": _autoregression,
    "blocks": partial(_weighted, robust.blocks),
    "dmd": partial(_regression, variants.REGRESSIONS["dmd"]),
    "fb": partial(_regression, variants.REGRESSIONS["fb"]),
    "mpe": partial(_weighted, _limit(sequence.mpe)),
    "optdmd": _optimised,
    "robust": _robust,
    "rre": partial(_weighted, _limit(sequence.rre)),
    "stationary": _stationary,
    "tls": partial(_regression, variants.REGRESSIONS["tls"]),
}
METHODS: tuple[str, ...] = tuple(sorted([*_ESTIMATES, "auto", "last"]))
LEAST_AGE, MOST_AGE = 1e-12, 1e12  # powers of what lies between are no zeros and no infinities
LEAST_SNAPSHOTS = 10  # fewer say too little of a trajectory: the last value stands


def _in_deviations(data: Window) -> tuple[Window, np.ndarray, np.ndarray]:
    """The window with each coordinate in its standard deviations; those (q,); the unit (q,) of its values.

    Hyperparameters have units of their own, and none may drown the others.  A wide trajectory (q > m) is one
    quantity many times over: one scale serves it, and the recorded Gram matrix stays of use.
    """
    H = data.snapshots
    m, q = H.shape
    if q > m:
        variance = (data.gram.trace() - data.gram.sum() / m) / (m * q)
        return data, np.full(q, np.sqrt(max(variance, 0.0)) or 1.0), np.ones(q)
    scale = units(H)
    scaled = H / scale
    return Window(scaled, relative_gram(scaled)), scale, scale


def _rms(x: np.ndarray) -> float:
    return math.sqrt(float(x @ x) / len(x))


def _stay(data: Window, method: str, reason: str, move: float = 0.0, deviation: float = 0.0) -> Forecast:
    """The last value, with the window's standard deviation as its error."""
    return Forecast(
        data.snapshots[-1].copy(), deviations(data.snapshots), method == "last", reason, "last", move, deviation
    )


def extrapolate(
    snapshots: Any,
    steps: int,
    method: str = "auto",
    *,
    growth: float = GROWTH,
    gate: float = GATE,
    age: tuple[float, float] | None = None,
) -> Forecast:
    """The trajectory `steps` snapshots after its last one, or its last value where no forecast can be believed.

    Args:
      snapshots: (m, q) real, m >= 1, row t is the hypergradient at snapshot t; or a `Recorder`.
      steps: integer >= 0, snapshots after the last one.
      method: one of `METHODS`.  "auto": affine DMD ("dmd") if its error passes the gate, else the robust median.
        "dmd", "tls", "fb", "ar", "optdmd": modes and an exact constant, eigenvalues by least squares, total least
        squares, forward-backward, autoregression, variable projection.  "affine", "blocks": DMD of differences,
        of block means.  "rre", "mpe", "anderson", "aitken": limits, for steps that reach them.  "robust": median.
        "stationary": the paper's rule.  "last": the last value.
      growth: c in |lambda| <= 1 - c / m, for the methods with an exact constant and for "stationary".
      gate: a forecast is accepted if its estimated error is below `gate` times its move away from the last value
        (root mean squares over coordinates, in standard deviations of the window).  The robust median has the
        last value among its members and needs no gate.
      age: how old training and its tangents are at the first snapshot, in snapshots: (1, 1) where both began one
        snapshot earlier, (401, 1) where the tangents were reset after 400.  Given, "auto" knows that h began at zero:
        affine DMD if its error is below a fifth of the gate, else the aging law (`koopman.aging`), which no other method
        uses.  For windows of which it is true; None where tangents were let fade.

    Returns:
      `Forecast`.  With `age` and "auto" its error is a half width that held the truth in 80 % of the windows of
      docs/evidence.md.  Otherwise it is a standard error of the fit: what the window does not show is not in it, and it
      held the truth in a small part of them.

      Where the window is too short, the fit singular or the gate closed, `accepted` is False, the value is the last
      snapshot, and `reason` says why.

    Raises:
      ShapeError: an empty window, not real, not finite, or of the wrong shape.
      HyperparameterError: steps, method, growth, gate or age make no sense.

    Equivariance: all methods under h -> a h + b with a scale and an offset of each coordinate's own when q <= m; for
    q > m, under a common scale, any offset and (all but "aitken" and "robust", which work by coordinate) rotations.  With
    `age`, under scales of each coordinate.
    """
    data = window(snapshots, "koopman.extrapolate")
    k = whole("koopman.extrapolate", "steps", steps, 0, checks.MOST_STEPS, STEPS_COUNT)
    choice("koopman.extrapolate", "method", method, METHODS)
    checks.fraction(growth, "growth", "koopman.extrapolate", 0.0, LEAST_SNAPSHOTS)
    checks.fraction(gate, "gate", "koopman.extrapolate", 0.0, np.inf)
    old = None if age is None else _age(age)
    if data.unit == 1.0:
        return _forecast(data, k, method, growth, gate, old)
    inside = _forecast(Window(data.snapshots / data.unit, data.gram), k, method, growth, gate, old)
    return replace(inside, value=times(inside.value, data.unit), error=times(inside.error, data.unit))


def _age(given: Any) -> Age:
    """`given`, checked."""
    call = "koopman.extrapolate"
    need = f"two ages (training, tangents) in snapshots, {LEAST_AGE:g} <= tangents <= training <= {MOST_AGE:g}"
    ages = reals(call, "age", given, HyperparameterError, need)
    if ages.shape != (2,) or not LEAST_AGE <= ages[1] <= ages[0] <= MOST_AGE:
        raise HyperparameterError(
            f"{call}: age must be {need}, got {short(given)}. (1, 1) is a window from the start of training on."
        )
    return Age(float(ages[0]), float(ages[1]))


def _forecast(data: Window, k: int, method: str, growth: float, gate: float, age: Age | None) -> Forecast:
    """The decision of `extrapolate`, its arguments checked."""
    m = len(data.snapshots)
    if data.gram.trace() == 0.0 and m > 1:
        return Forecast(
            data.snapshots[-1].copy(), np.zeros(data.snapshots.shape[1]), True, "constant trajectory", method, 0.0, 0.0
        )
    if method == "last":
        return _stay(data, "last", "the last value, as asked")
    if m < LEAST_SNAPSHOTS:
        return _stay(data, method, f"last value: {m} snapshots, a forecast needs {LEAST_SNAPSHOTS}")
    scaled, scale, unit = _in_deviations(data)
    attempt = lambda method, gate: _attempt(data, scaled, scale, unit, k, method, growth, gate)
    if method != "auto":
        return attempt(method, gate)
    if age is not None:
        return _aged(data, scaled, scale, unit, k, age, attempt("dmd", gate * STRICT))
    first = attempt("dmd", gate)
    return first if first.accepted else _second(first, attempt("robust", gate))


def _second(first: Forecast, second: Forecast) -> Forecast:
    """The second choice of "auto", with the gate's numbers of the first, which was not accepted."""
    reason = f"dmd not believed ({first.reason}), so {second.reason}"
    return replace(second, reason=reason, move=first.move, deviation=first.deviation)


def _aged(
    data: Window, scaled: Window, scale: np.ndarray, unit: np.ndarray, steps: int, age: Age, first: Forecast
) -> Forecast:
    """The DMD `first` if accepted, else the aging law.  How far apart they are is part of the error of the first."""
    value, error = aging.forecast(scaled.snapshots, steps, age)
    value, error = value * unit, error * unit
    if first.accepted:
        return replace(first, error=aging.LEVEL * np.hypot(first.error, first.value - value))
    move, deviation = _rms((value - data.snapshots[-1]) / scale), _rms(error / scale)
    if not (np.isfinite(value).all() and np.isfinite(deviation)):
        return _stay(data, "aging", "last value: the aging law gave values that are not finite")
    reason = f"dmd not believed ({first.reason}), so the aging law: error {deviation:.3g}, move {move:.3g}"
    return Forecast(value, error, True, reason, "aging", move, deviation)


def _attempt(
    data: Window, scaled: Window, scale: np.ndarray, unit: np.ndarray, steps: int, method: str, growth: float, gate: float
) -> Forecast:
    """One method and its gate."""
    try:
        with np.errstate(all="ignore"):
            value, error, note = _ESTIMATES[method](scaled, steps, growth)
    except np.linalg.LinAlgError as problem:
        return _stay(data, method, f"last value: {method} is singular ({problem})")
    value, error = value * unit, error * unit
    move, deviation = _rms((value - data.snapshots[-1]) / scale), _rms(error / scale)
    numbers = f"error {deviation:.3g} against a move of {move:.3g} standard deviations"
    if not (np.isfinite(value).all() and np.isfinite(deviation)):
        return _stay(data, method, f"last value: {method} gave values that are not finite")
    if note and method == "stationary":
        return _stay(data, method, f"last value: {note}", move, deviation)
    if method != "robust" and not deviation < gate * move:
        return _stay(data, method, f"last value: {method} has {numbers}, gate {gate:g}", move, deviation)
    reason = f"robust median, {numbers}" if method == "robust" else f"{method}, {numbers}"
    return Forecast(value, error, True, reason, method, move, deviation)
