"""`estimate`: the hypergradient at the horizon, its error, and whether to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .. import koopman
from ..engine import CoreInner
from ..errors import HyperparameterError, NotFrozenError, ShapeError, choice, flag, number, whole
from ..problem import Array
from ..space import Space
from . import drift, frozen, noise, reverse, roll
from .model import Model

GATE = 0.5  # accepted if the error is below this part of the value
NOISES = ("epoch", "independent")
NEGLECTED = ("beta2", "alpha")  # hyperparameters of the preconditioner alone, which is frozen
NOISE_DOUBT = 0.5  # share of the noise term that its own error is taken to be, beside its spread over batches
BATCHES = 4  # that a sample of the noise is made of, at most
MOST_STEPS = 10**9


class Settings(NamedTuple):
    """The settings of `estimate`, as it explains them."""

    columns: int = 24
    stages: int = 4
    midpoint: bool = True
    noise: str | None = None
    batches: Sequence[Any] | None = None
    hvp_batch: Any = None
    samples: int = 8
    depth: int = 4
    tolerance: float = 0.02
    gate: float = GATE
    seed: int = 0

    def checked(self, call: str) -> Settings:
        """The same as numbers that make sense.

        Raises:
          HyperparameterError, ShapeError: in the name of the call.
        """
        _check_batches(call, self.noise, self.batches)
        return self._replace(
            columns=whole(call, "columns", self.columns, 3),
            stages=whole(call, "stages", self.stages, 1, 30),
            midpoint=flag(call, "midpoint", self.midpoint),
            samples=whole(call, "samples", self.samples, 1),
            depth=whole(call, "depth", self.depth, 1, 100),
            tolerance=number(call, "tolerance", self.tolerance, "a share in [0, 1)", 0.0, 1.0, open_high=True),
            gate=number(call, "gate", self.gate, "a number > 0", 0.0, open_low=True),
            seed=whole(call, "seed", self.seed, 0),
        )


@dataclass(frozen=True, eq=False)
class Forecast(koopman.Forecast):
    """What `estimate` returns: a `koopman.Forecast` and what it rests on.

    `move` and `deviation` are root mean squares of the distance from the current hypergradient and of the error, both
    relative to the root mean square of the estimate.  Not accepted: the value is the current hypergradient.
    """

    estimate: Array  # (q,) the estimate, accepted or not
    spectrum: tuple[
        Array, ...
    ] = ()  # of each stage, eigenvalues of the preconditioned step `rate (H + wd)`, before clipping
    stages: tuple[int, ...] = ()  # inner steps of each
    basis: tuple[int, ...] = ()  # columns of each stage's Krylov space
    hvps: int = 0  # Hessian-vector products of the inner loss; with noise, two a stage of each single batch too
    gradients: int = 0  # of the inner loss
    mixed: int = 0  # mixed derivatives of the inner loss, q rows each
    outers: int = 0  # gradients and Hessian-vector products of the outer loss
    noise_share: float = 0.0  # |what noise adds| / (|what noise adds| + |the rest|)
    bends: tuple[float, ...] = ()  # of each stage, what it freezes and really changes, as a share of its gradient
    outer_loss: float = float("nan")  # at the horizon, accepted or not; without the noise term
    missed: float = 0.0  # what the frozen gradients' mismatches add to the loss at `params`, in it if smaller: its doubt
    params: Array | None = None  # (p,) at the horizon, float64; None where nothing was rolled
    edge: float = 0.0  # largest curvature met, as a share of that at which frozen steps grow
    grows: bool = False  # whether training diverges: sgd's does beyond the edge, adaptive steps give way


_DEFAULTS = Settings()


def estimate(
    inner: CoreInner,
    train_batch: Any,
    val_batch: Any,
    steps: int,
    *,
    columns: int = _DEFAULTS.columns,
    stages: int = _DEFAULTS.stages,
    midpoint: bool = _DEFAULTS.midpoint,
    noise: str | None = None,
    batches: Sequence[Any] | None = None,
    hvp_batch: Any = None,
    samples: int = _DEFAULTS.samples,
    depth: int = _DEFAULTS.depth,
    tolerance: float = _DEFAULTS.tolerance,
    gate: float = _DEFAULTS.gate,
    seed: int = _DEFAULTS.seed,
) -> Forecast:
    """The hypergradient `steps` inner steps ahead, from the known dynamics of training; the run does not move.

    Each stage freezes the curvature (and the preconditioner of adam, adamw, rmsprop) and moves parameters, momentum and
    adjoint by a power of a small matrix.  Exact for a quadratic loss under sgd with `columns` >= p.

    Args:
      inner: a run of the core, at the window's end, its tangents as far back as h shall count.
      train_batch: what the mean gradient is taken on: everything, or much.  val_batch: of the outer loss.
      steps: inner steps to the horizon, >= 0; 0 gives the current hypergradient.
      columns: Krylov columns of a stage at most, >= 3, one Hessian-vector product each; more than p are p.
      tolerance: a stage gets no more columns once they leave out less than this share of the change of its gradient, and
        ten times that of the adjoint's; its products are in single precision where the model has it. 0: all columns, full
        precision; so it is where `columns` >= p.
      stages: how many are planned, each 1.6 times as long as the one before; where the frozen gradient goes astray they
        are shorter and up to twice as many, where it stays true longer and fewer.
      midpoint: take a stage's Hessian where its middle is expected, not at its start: costs nothing more.
      noise: "epoch": add what the noise of `batches`, one epoch drawn without replacement, leaves at the horizon and how it
        moves the mean of training; "independent": of independent batches; None: the same batch at every step.
      batches: list of mini-batches; also tells the frozen second moments of adam and rmsprop their noise.
      hvp_batch: for Hessian-vector products only, default train_batch. In full batch a part of it costs accuracy.
      samples, depth: samples of the noise, and the columns of each; where there are more batches, mixtures of four times
        as many at most.
      gate: accepted if the estimated error is below this share of the estimate (root mean squares).
      seed: of the choice of the batches and of their mixtures.

    Returns:
      `Forecast`.  Its error is what fewer columns would change, the frozen gradients' defects at the stages' ends, and
      the noise term's spread, in quadrature: an estimate, not a bound.  beta2 (adam) and alpha (rmsprop) act on the
      preconditioner alone, which is frozen: their coordinates keep the current hypergradient, and its size as their error.
      The noise term leaves out the hyperparameters of the loss.  Not accepted where training `grows`.

    Raises:
      NotFrozenError: the inner run has no frozen step (jax's own train_step, adagrad, lion), or a loss that is another one
        at every step: random numbers, a schedule of its hyperparameters.
      HyperparameterError, ShapeError: settings that make no sense; too few batches for the noise term.
    """
    call = "krylov.estimate"
    check_run(call, inner)
    steps = whole(call, "steps", steps, 0, MOST_STEPS, "Steps are inner steps from now to the horizon.")
    given = Settings(columns, stages, midpoint, noise, batches, hvp_batch, samples, depth, tolerance, gate, seed)
    plan = given.checked(call)
    value, now, *_ = inner.hypergradient(val_batch)
    if not np.isfinite(now).all():
        return _current(now, False, "last value: it is not finite, nor is the run")
    if steps == 0:
        here = inner.params.astype(np.float64)
        return replace(_current(now, True, "0 steps ahead: the current hypergradient"), outer_loss=value, params=here)
    p = inner.params.size
    plan = plan._replace(columns=min(plan.columns, p), tolerance=0.0 if plan.columns >= p else plan.tolerance)
    model = Model(inner.dynamics(), inner.space, train_batch, train_batch if hvp_batch is None else hvp_batch, val_batch)
    with np.errstate(all="ignore"):
        try:
            found = _rolled(model, plan, steps, now)
        except np.linalg.LinAlgError as problem:
            found = _current(now, False, f"last value: the frozen run cannot be rolled ({problem})")
    check_run(call, inner)  # random numbers in the loss show when it is computed
    return found


def exactly(inner: CoreInner, train_batch: Any, val_batch: Any, steps: int) -> Forecast | None:
    """The same by taking all steps, for real and back: no error, and a cost of `reverse.PRICE` gradients a step; None where
    that cannot be done."""
    model = Model(inner.dynamics(), inner.space, train_batch, train_batch, val_batch)
    if steps == 0 or not reverse.can(model, steps):
        return None
    with np.errstate(all="ignore"):
        h, end = reverse.hypergradient(model, steps)
    return replace(
        _current(h, True, "all steps taken, and back"),
        method="reverse",
        stages=(steps,),
        hvps=model.hvps,
        gradients=model.gradients,
        outers=model.outers,
        outer_loss=model.outer_loss,
        params=end,
    )


def check_run(call: str, inner: Any) -> None:
    """Refuse a run whose step cannot be frozen.

    Raises:
      NotFrozenError: saying why.  HyperparameterError: it tunes nothing.
    """
    if not isinstance(inner, CoreInner):
        raise NotFrozenError(
            f"{call}: needs a run of the core whose optimizer is known: koopman_hpo.inner.sgd, adam, adamw or rmsprop on a "
            f"Problem, or torch's. Of {type(inner).__name__}, a train step of one's own, the rule cannot be read. Write "
            f"the model as jax.problem(...), or use koopman.extrapolate(H, ahead)."
        )
    frozen.check(call, inner.rule)
    space = inner.space
    if space.q == 0:
        raise HyperparameterError(f"{call}: the run tunes nothing: its space is empty. Give it a hyperparameter.")
    moving = [n for n in space.names if n not in inner.rule.defaults and space[n].knots is not None]
    if moving:
        raise NotFrozenError(
            f"{call}: {moving[0]!r} changes the loss with the step, and one loss is frozen a stage. Hold it constant, or "
            f"extrapolate the trajectory: koopman.extrapolate(H, ahead)."
        )
    if inner.beside:
        raise NotFrozenError(
            f"{call}: a step with {inner.beside} cannot be frozen. Make the run without, or extrapolate the trajectory: "
            f"koopman.extrapolate(H, ahead)."
        )


def _rolled(model: Model, plan: Settings, steps: int, now: Array) -> Forecast:
    """The estimate and its gate."""
    chosen, slots = _chosen(plan, plan.samples), model.dynamics.state.slots
    variance = roll.variance(model, chosen) if chosen and slots.shape[0] > 1 else 0.0
    rolled = roll.forward(model, steps, plan.stages, plan.columns, plan.tolerance, plan.midpoint, variance)
    h, fewer, missed, paths, pulls = roll.backward(model, rolled, plan.columns, plan.tolerance)
    extra, doubt = _noise(model, plan, steps, rolled, pulls)
    edge = max(path.edge for path in paths)
    grows = edge > 1 and model.dynamics.rule.name == "sgd"
    judged = _judged(model.space, plan.gate, now, h + extra, h - fewer, doubt, sum(rolled.defects), edge if grows else 0.0)
    return replace(
        judged,
        spectrum=tuple(path.spectrum for path in paths),
        stages=tuple(stage.steps for stage, _ in rolled.stages),
        basis=tuple(len(path.U) for path in paths),
        hvps=model.hvps,
        gradients=model.gradients,
        mixed=model.mixeds,
        outers=model.outers,
        noise_share=_rms(extra) / max(_rms(extra) + _rms(h), 1e-300),
        bends=tuple(rolled.bends),
        outer_loss=model.outer_loss + (missed if abs(missed) <= abs(model.outer_loss) else 0.0),
        missed=missed,
        params=rolled.end.theta,
        edge=edge,
        grows=grows,
    )


def _judged(
    space: Space, gate: float, now: Array, value: Array, fewer: Array, doubt: Array, defects: float, growth: float
) -> Forecast:
    """The estimate `value` (q,), its error, and whether it is accepted.  fewer: what fewer columns change; doubt: the error
    of the noise term; defects: of the stages, shares of the value; growth: the edge beyond which training grows, or 0."""
    left_out, known = neglected(space), np.ones(space.q, np.bool_)
    for name in left_out:
        known[space.where(name)] = False
    error = np.sqrt(fewer**2 + (defects * _rms(value[known])) ** 2 + doubt**2)
    size, deviation = _rms(value[known]), _rms(error[known])
    deviation = deviation / size if size else 0.0 if known.any() and not deviation else np.inf
    value, error = np.where(known, value, now), np.where(known, error, np.abs(now))
    finite = bool(np.isfinite(value).all() and np.isfinite(error).all())
    accepted = finite and deviation < gate and not growth
    kept = f"; {' and '.join(left_out)} as now" if left_out else ""
    reason = f"estimated error {deviation:.3g} of the estimate, gate {gate:g}{kept}"
    if not finite:
        reason = "krylov is not finite"
    elif growth:
        reason = f"training grows: {growth:.3g} of the curvature that its steps can stand"
    return Forecast(
        value=value if accepted else now.copy(),
        error=error if finite else np.full_like(now, np.inf),
        accepted=accepted,
        reason=f"krylov, {reason}" if accepted else f"last value: {reason}",
        method="krylov",
        move=_rms(value - now) / (_rms(value) or 1.0),
        deviation=deviation,
        estimate=value,
    )


def neglected(space: Space) -> list[str]:
    """The names that act on a preconditioner alone."""
    return [name for name in space.names if name in NEGLECTED]


def _noise(model: Model, plan: Settings, steps: int, rolled: roll.Rolled, pulls: list[Array]) -> tuple[Array, Array]:
    """(q,) what the noise of the batches adds to h, and its error."""
    if plan.noise is None:
        return np.zeros(model.space.q), np.zeros(model.space.q)
    epoch = len(plan.batches or ()) if plan.noise == "epoch" else None
    stages, some, rough = [stage for stage, _ in rolled.stages], _chosen(plan, BATCHES * plan.samples), plan.tolerance > 0
    around = noise.measured(model, rolled, some, epoch, plan.samples, plan.depth, plan.seed, rough)
    raised, doubt = noise.correction(model, around, steps)
    pulled = drift.pull(model, around, list(zip(stages, pulls, strict=True)))
    return raised + pulled, doubt + NOISE_DOUBT * np.hypot(raised, pulled)


def _current(now: Array, accepted: bool, reason: str) -> Forecast:
    error = np.zeros_like(now) if accepted else np.full_like(now, np.inf)
    return Forecast(now, error, accepted, reason, "krylov", 0.0, 0.0, now.copy(), outers=1)


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _check_batches(call: str, noise_kind: str | None, batches: Sequence[Any] | None) -> None:
    if noise_kind is not None:
        choice(call, "noise", noise_kind, NOISES)
    if batches is not None and not isinstance(batches, list):
        raise ShapeError(
            f"{call}: batches must be a list of mini-batches, got {type(batches).__name__}. For an epoch: "
            f"[batch for batch in loader]."
        )
    if noise_kind is not None and (batches is None or len(batches) < 2):
        raise ShapeError(
            f"{call}: noise={noise_kind!r} needs batches=[...], at least two mini-batches (all of an epoch for "
            f"'epoch'), got {'none' if batches is None else len(batches)}. For one batch at every step take noise=None."
        )


def _chosen(plan: Settings, most: int) -> list[Any]:
    """The batches that stand for the noise, so many at most."""
    batches = plan.batches or []
    chosen = np.random.default_rng(plan.seed).permutation(len(batches))[:most]
    return [batches[i] for i in sorted(chosen)]
