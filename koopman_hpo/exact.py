"""The exact tools: the hypergradient of a whole run, its trajectory, and a check of both against central differences.

None of them moves the run: it is as before when they return, and when they raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import HyperparameterError, ShapeError
from .inner import Inner, require
from .problem import Array, Hypergradient


@contextmanager
def _kept(run: Inner) -> Iterator[None]:
    before = run.snapshot()
    try:
        yield
    finally:
        run.restore(before)


def _listed(call: str, batches: Iterable[Any]) -> list[Any]:
    """The batches as a list: a batch itself, passed by mistake, is refused rather than iterated."""
    if isinstance(batches, tuple | dict | str | np.ndarray) or not isinstance(batches, Iterable):
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
    if not isinstance(every, int | np.integer) or not 1 <= every <= len(steps):
        raise HyperparameterError(f"trajectory: every must be a whole number in [1, {len(steps)}], got {every!r}.")
    with _kept(run):
        run.forget(0)
        return run.run(run.space.phi0 if phi is None else phi, steps, val_batch, every)[1]


class HypergradientCheck(NamedTuple):
    """What `check_hypergradient` found; `print` it."""

    labels: tuple[str, ...]  # q names of coordinates
    forward: Array  # (q,) forward mode
    central: Array  # (q,) central differences, extrapolated
    uncertainty: Array  # (q,) of the differences themselves
    error: Array  # (q,) |forward - central| relative to the larger of the two
    passed: NDArray[np.bool_]  # (q,) within rtol, or within the uncertainty of the differences
    rtol: float

    @property
    def ok(self) -> bool:
        return bool(self.passed.all())

    def __str__(self) -> str:
        width = max(14, *(len(name) for name in self.labels))
        head = f"{'coordinate':<{width}} {'forward mode':>15} {'differences':>15} {'uncertainty':>12} {'error':>9}"
        rows = [
            f"{n:<{width}} {f:>15.8g} {c:>15.8g} {u:>12.1e} {e:>9.1e}  {'ok' if p else 'DIFFERS'}"
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
      run, batches, val_batch, phi: as for `hypergradient`; the inner run must be deterministic given the batches.
      step: of the differences, in phi; default 1e-3 (float64) or 3e-2 (float32).
      rtol: agreement asked for; default 1e-6 (float64) or 1e-3 (float32).

    Returns:
      `HypergradientCheck` with `.ok`; its `str` is a table.
    """
    require("check_hypergradient", run)
    steps = _listed("check_hypergradient", batches)
    if getattr(run, "directions", None) is not None:
        raise HyperparameterError(
            "check_hypergradient: the run follows random directions, whose hypergradient is an estimate. "
            "Check one with directions=None."
        )
    phi = run.space.check(run.space.phi0 if phi is None else phi, "check_hypergradient")
    forward = hypergradient(run, steps, val_batch, phi=phi)
    single = run.params.dtype == np.float32
    step = step or (3e-2 if single else 1e-3)
    rtol = rtol or (1e-3 if single else 1e-6)

    def value(at: Array) -> float:
        with _kept(run):
            for batch in steps:
                run.step(at, batch, tangents=False)
            return run.hypergradient(val_batch).value

    central, doubt = np.empty((2, run.space.q))
    for j in range(run.space.q):
        e = np.zeros(run.space.q)
        e[j] = step
        wide = (value(phi + e) - value(phi - e)) / (2 * step)
        near = (value(phi + e / 2) - value(phi - e / 2)) / step
        central[j] = (4 * near - wide) / 3
        rounding = 4 * np.finfo(run.params.dtype).eps * max(abs(forward.value), 1e-300) / step
        doubt[j] = abs(central[j] - near) + rounding
    gap = np.abs(forward.grad - central)
    size = np.maximum(np.abs(forward.grad), np.abs(central))
    error = np.divide(gap, size, out=np.zeros_like(gap), where=size > 0)
    passed = (gap <= rtol * size) | (gap <= doubt)
    return HypergradientCheck(run.space.labels, forward.grad, central, doubt, error, passed, rtol)
