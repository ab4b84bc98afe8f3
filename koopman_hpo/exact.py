"""The exact tools: the hypergradient of a whole run, its trajectory, and a check of both against central differences.

None of them moves the run: it is as before when they return, and when they raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .batches import several
from .errors import HyperparameterError, ShapeError, number, whole
from .inner import Inner, mark, require
from .problem import Array, Hypergradient


@contextmanager
def _kept(run: Inner) -> Iterator[None]:
    before = mark(run)
    try:
        yield
    finally:
        run.restore(before)


def _listed(call: str, batches: Iterable[Any]) -> list[Any]:
    """The batches as a list: a batch itself, passed by mistake, is refused rather than iterated."""
    if not several(batches):
        raise ShapeError(
            f"{call}: batches must be a list or an iterator of batches, one an inner step, got "
            f"{type(batches).__name__}. For T steps on one batch write [batch] * T."
        )
    out = list(batches)
    if not out:
        raise ShapeError(f"{call}: batches is empty; give one batch an inner step.")
    return out


def hypergradient(run: Inner, batches: Iterable[Any], val_batch: Any, *, phi: ArrayLike | None = None) -> Hypergradient:
    """The exact derivative of the outer loss after a run, with respect to the hyperparameters of the whole run.

    Args:
      run: an `Inner`; the run starts from its current state, with zero tangents, and leaves it as it was.
      batches: one batch an inner step.
      val_batch: batch of the outer loss.
      phi: (q,) hyperparameters held during the run; default `run.space.phi0`.

    Returns:
      `Hypergradient(value, grad (q,), natural {name: ...}, t)`.

    Raises:
      ShapeError: no batches, or a batch in place of a list of batches.
    """
    require("hypergradient", run)
    steps = _listed("hypergradient", batches)
    phi = run.space.phi0 if phi is None else phi
    with _kept(run):
        run.forget(0)
        for batch in steps:
            run.step(phi, batch)
        return run.hypergradient(val_batch)


def trajectory(
    run: Inner, batches: Iterable[Any], val_batch: Any, *, every: int = 1, phi: ArrayLike | None = None
) -> NDArray[np.float64]:
    """The hypergradient after every `every` inner steps, (m, q) with time first; otherwise as `hypergradient`."""
    require("trajectory", run)
    steps = _listed("trajectory", batches)
    every = whole("trajectory", "every", every, 1, len(steps), "Later than the last step there is nothing to record.")
    with _kept(run):
        run.forget(0)
        return run.run(run.space.phi0 if phi is None else phi, steps, val_batch, every)[1]


class HypergradientCheck(NamedTuple):
    """What `check_hypergradient` found; `print` it."""

    labels: tuple[str, ...]  # q names of coordinates
    forward: Array  # (q,) forward mode
    central: Array  # (q,) central differences, extrapolated
    uncertainty: Array  # (q,) of the differences themselves
    error: Array  # (q,) |forward - central| relative to the larger of the two; infinite where one is not a number
    passed: NDArray[np.bool_]  # (q,) within rtol, or within the uncertainty of the differences where that is below |h|
    rtol: float

    @property
    def ok(self) -> bool:
        return bool(self.passed.all())

    def __str__(self) -> str:
        width = max(14, *(len(name) for name in self.labels))
        head = f"{'coordinate':<{width}} {'forward mode':>15} {'differences':>15} {'uncertainty':>12} {'error':>9}"
        rows = [
            f"{n:<{width}} {f:>15.8g} {c:>15.8g} {u:>12.1e} {e:>9.1e}  {_verdict(f, c, u, p)}"
            for n, f, c, u, e, p in zip(*self[:6], strict=True)
        ]
        end = f"{int(self.passed.sum())} of {len(self.passed)} agree to {self.rtol:g} relative or within the uncertainty"
        return "\n".join([head, *rows, end])


def check_hypergradient(
    run: Inner,
    batches: Iterable[Any],
    val_batch: Any,
    *,
    phi: ArrayLike | None = None,
    step: float | None = None,
    rtol: float | None = None,
) -> HypergradientCheck:
    """Compare forward mode with central differences of the outer loss over whole runs, coordinate by coordinate.

    The differences are extrapolated from two step sizes (Richardson), whose disagreement gives their uncertainty.  Costs
    4 q plain runs.

    Args:
      run, batches, val_batch, phi: as for `hypergradient`; the inner run must be deterministic given the batches.  At
        a bound of `identity` the comparison is made one step inside.
      step: of the differences, in phi; default 1e-3 (float64) or 3e-2 (float32).
      rtol: agreement asked for; default 1e-6 (float64) or 1e-3 (float32).

    Returns:
      `HypergradientCheck` with `.ok`; its `str` is a table.  A coordinate whose differences are more uncertain than the
      hypergradient is large has not passed: it is UNSURE, and another `step` may tell.

    Raises:
      HyperparameterError: random directions, a step that rounding swallows or that the bounds do not hold.
      ShapeError: as for `hypergradient`.
    """
    call = "check_hypergradient"
    require(call, run)
    steps = _listed(call, batches)
    if run.directions is not None:
        raise HyperparameterError(
            f"{call}: the run follows random directions, whose hypergradient is an estimate. "
            "Check one with directions=None."
        )
    eps = float(np.finfo(run.params.dtype).eps)
    single = run.params.dtype == np.float32
    least, most = math.sqrt(eps), float(np.min(run.space.most / 2 - run.space.least / 2, initial=1.0))
    need = f"a number in {least:.1g}..{most:.2g}: rounding swallows a smaller one, a larger one leaves the bounds"
    step = number(call, "step", min(most, 3e-2 if single else 1e-3) if step is None else step, need, least, most)
    rtol = number(
        call, "rtol", (1e-3 if single else 1e-6) if rtol is None else rtol, "a number > 0", open_low=True, low=0.0
    )
    phi = run.space.check(run.space.phi0 if phi is None else phi, call)
    phi = np.clip(phi, run.space.least + step, run.space.most - step)  # both sides within the bounds
    forward = hypergradient(run, steps, val_batch, phi=phi)

    def value(at: Array) -> float:
        with _kept(run):
            for batch in steps:
                run.step(at, batch, tangents=False)
            return run.hypergradient(val_batch).value

    central, doubt = _differences(value, phi, step)
    doubt += 4 * eps * max(abs(forward.value), 1e-300) / step
    gap = np.abs(forward.grad - central)
    size = np.maximum(np.abs(forward.grad), np.abs(central))
    error = np.divide(gap, size, out=np.where(np.isnan(gap), np.inf, 0.0), where=size > 0)
    passed = (gap <= rtol * size) | ((gap <= doubt) & (doubt < size))
    return HypergradientCheck(run.space.labels, forward.grad, central, doubt, error, passed, rtol)


def _differences(value: Callable[[Array], float], phi: Array, step: float) -> tuple[Array, Array]:
    """Central differences (q,) of `value` at phi, extrapolated from `step` and half of it, and how far they differ (q,)."""
    central, doubt = np.empty((2, phi.size))
    for j in range(phi.size):
        e = np.zeros(phi.size)
        e[j] = step
        wide = (value(phi + e) - value(phi - e)) / (2 * step)
        near = (value(phi + e / 2) - value(phi - e / 2)) / step
        central[j] = (4 * near - wide) / 3
        doubt[j] = abs(central[j] - near)
    return central, doubt


def _verdict(forward: float, central: float, doubt: float, passed: bool) -> str:
    if passed:
        return "ok"
    return "UNSURE" if abs(forward - central) <= doubt else "DIFFERS"
