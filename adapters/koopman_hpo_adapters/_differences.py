"""Directional derivatives of a gradient by central differences, for models that have no `grad_jvp`, and their error.

Letters: p parameters, q tangent directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from koopman_hpo.errors import AdapterError, reals, short, whole
from koopman_hpo.problem import Problem

NOTE = "central differences of grad (fourth order, four gradients a direction); difference_error measures their error"
STENCIL = (
    (1, 8 / 12),
    (-1, -8 / 12),
    (2, -1 / 12),
    (-2, 1 / 12),
)  # fourth order: the error is step^4 / 30 G'''''


def along(gradient, theta, hyper, z, dhyper, out, shrink=1.0):
    """out (p,) <- derivative of `gradient(theta, hyper)` along (z, dhyper).

    Parameters and each hyperparameter are moved on their own and the results added, each with a step that suits its
    size: a tangent of theta may be many orders smaller, relative to theta, than the tangent of a hyperparameter.
    gradient: (theta, hyper) -> (p,); z: (p,); dhyper: {name: float or (n,)}; shrink: factor on every step.
    """
    out.fill(0)
    size, moved = _rms(theta), np.abs(z).max()
    if moved > 0 or np.isnan(moved):
        step = _step(shrink * _relative_step(theta.dtype) * size, moved, theta.dtype)
        _add(lambda t: gradient(theta + theta.dtype.type(t) * z, hyper), step, out)
    for name, d in dhyper.items():
        moved = np.abs(d).max()
        if moved > 0 or np.isnan(moved):
            step = _step(shrink * _relative_step(theta.dtype) * _rms(hyper[name]), moved, theta.dtype)
            # the default arguments pin this turn's name and tangent
            _add(lambda t, name=name, d=d: gradient(theta, {**hyper, name: hyper[name] + t * d}), step, out)


def difference_error(problem: Problem, theta, hyper, batch, seed: int = 0) -> float:
    """Relative error of `problem.grad_jvp`, measured: against differences of half the step, along a random direction.

    Where `grad_jvp` is itself made of differences this is their error, to a small factor; where it is exact or
    hand-written it is the error of the check, and a value far above 1e-8 (float32: 1e-3) says that `grad_jvp` is not
    the derivative of the gradient.

    Args:
      theta: (p,); hyper: {name: natural value} of the loss hyperparameters, {} for none; batch: as the model takes.
      seed: of the direction, normal and as large as theta and hyper.

    Returns:
      |grad_jvp - differences| / |differences| in the 2-norm; 0 where both vanish.

    Raises:
      AdapterError: no problem, or a theta, hyper or seed that fits none.
    """
    call = "difference_error"
    if not isinstance(problem, Problem):
        raise AdapterError(f"{call}: the first argument must be a Problem, got {type(problem).__name__}.")
    if not isinstance(hyper, Mapping):
        raise AdapterError(f"{call}: hyper must be a dict {{name: natural value}}, {{}} for none, got {short(hyper)}.")
    rng = np.random.default_rng(whole(call, "seed", seed, 0, error=AdapterError))
    theta = reals(call, "theta", theta, AdapterError).astype(problem.params.dtype)
    if theta.shape != problem.params.shape:
        raise AdapterError(f"{call}: theta must have shape {problem.params.shape}, got {theta.shape}.")
    for name, value in hyper.items():
        if not np.isfinite(reals(call, f"hyper[{name!r}]", value, AdapterError)).all() or np.size(value) == 0:
            raise AdapterError(f"{call}: hyper[{name!r}] must be finite and not empty, got {short(value)}.")
    z = (_rms(theta) * rng.normal(size=theta.shape)).astype(theta.dtype)
    tangent = lambda value: np.asarray(_rms(value) * rng.normal(size=np.shape(value)))
    dhyper = {name: tangent(value) for name, value in hyper.items()}
    _, _, (claimed,) = problem.grad_jvp(theta, hyper, z[None], {k: d[None] for k, d in dhyper.items()}, batch)
    nothing = {name: d[None][:0] for name, d in dhyper.items()}
    gradient = lambda th, hy: problem.grad_jvp(th, hy, np.empty((0, th.size), th.dtype), nothing, batch)[1]
    measured = np.empty_like(theta)
    along(gradient, theta, hyper, z, dhyper, measured, shrink=0.5)
    gap = float(np.linalg.norm(claimed - measured))
    return gap / float(np.linalg.norm(measured)) if gap else 0.0


def _add(gradient, step, out):
    """out += d gradient(t) / dt at 0; each value is used before the next call, which may reuse its memory."""
    for place, weight in STENCIL:
        g = gradient(place * step)
        with np.errstate(over="ignore", invalid="ignore"):  # divergence is the guard's business
            out += out.dtype.type(weight / step) * g


def _step(size, moved, dtype):
    """size / moved, held so that four of it are finite in that dtype: a tangent may be too small for its scale."""
    with np.errstate(over="ignore"):
        return min(size / moved, np.finfo(dtype).max / 4)


def _relative_step(dtype) -> float:
    """Balances step^4 (truncation) with eps / step (rounding): error about eps^(4/5), 3e-13 or 3e-6."""
    return float(np.finfo(dtype).eps) ** 0.2


def _rms(value) -> float:
    """Root mean square; 1 where the value is zero and gives no scale."""
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))) or 1.0
