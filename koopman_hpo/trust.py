"""A trust region for deterministic training: few, large steps of phi, on predicted outer losses and hypergradients.

`krylov.estimate` gives the outer loss at the horizon, its hypergradient h, and the errors of both.  `minimise` uses it all:
a quasi-Newton model of the outer loss, made from differences of h, proposes a step within a box around phi and within the
space's bounds.  The decrease that it promises must stand out from the errors, or phi is looked at more closely before it
moves.  The predicted losses before and after then decide whether the step stands, and how long the next one may be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import BFGS, lsq_linear

from . import krylov
from .engine import CoreInner
from .errors import HyperparameterError, flag, number, whole
from .guard import Guard
from .history import History, Record
from .krylov.reverse import PRICE
from .krylov.roll import LOOSE
from .problem import Array

RADIUS, LONGEST, SHORTEST = 1.0, 2.0, 1e-3  # of a step, in any coordinate of phi: the first, and within which it may lie
TAKEN, POOR, GOOD = 0.1, 0.25, 0.75  # actual over promised decrease: needed; the radius shrinks below, may grow above
DOUBT = 0.5  # part of the promised decrease that errors may hide (Carter 1991)
SOFT = 0.3  # curvature where nothing is known of it, of that along the first step: the radius bounds the step there
MENDED = 0.5  # of what spaces miss of the outer loss, the error that is left when it is counted
CLOSER, FINEST = 4.0, 1e-6  # what divides the tolerance of a closer look, and the finest
SHARPER = 0.7  # part of its error that a closer look may leave, for another to be worth its cost
SETTLED = 0.25  # part of what `tol` asks of the slope that the best step's promise may be, for an end
ASTRAY = 1.0  # error of h, relative to h, at which training must go on
PATIENCE = 10  # starts that may be given up
LASTING = frozenset({"weight_decay"})  # the optimizers' hyperparameters that matter however long a run is
PASSING = 1.0  # the longest step in the coordinates of the others: training far from what is known is seen badly


class Minimum(NamedTuple):
    """What `minimise` found, and how."""

    phi: Array  # (q,)
    hyper: dict[str, Any]  # natural values
    value: float  # outer loss at the horizon, predicted; NaN where no look could be used
    h: Array  # (q,) its hypergradient, predicted
    error: Array  # (q,) of h, estimated
    params: NDArray  # (p,) at the horizon, predicted
    cost: int  # gradients of the inner loss that all of it was worth
    steps: int  # inner steps among them
    reason: str  # why it ended
    history: History  # a record a look


class Look(NamedTuple):
    """The outer loss at the horizon as a function of phi, predicted at one phi."""

    phi: Array  # (q,)
    value: float
    doubt: float  # error of the value
    h: Array  # (q,)
    error: Array  # (q,)
    deviation: float  # error of h, relative
    params: NDArray  # (p,)
    trouble: str  # why it cannot be used; empty if it can
    why: str  # the estimator's own words
    end: dict[str, NDArray]  # the run's snapshot, at the horizon if it can be used
    tolerance: float
    stages: int


class Horizon:
    """Looks at phi, and counts what they cost: runs that begin again or, `warm`, go on."""

    def __init__(self, run: CoreInner, train: Any, val: Any, steps: int, warm: bool, window: int, columns: int):
        self.run, self.train, self.val = run, train, val
        self.steps, self.warm, self.window, self.columns = steps, warm, window, columns
        self.cost = self.taken = 0
        self.exact = False  # whether predictions have come to cost more than the whole run and back
        run.forget(0)
        self.start = run.snapshot()

    def look(self, phi: Array, after: Look | None, tolerance: float, stages: int, trained: bool = False) -> Look:
        """Predict at phi.  A warm run goes on where `after` ended, `trained` for a window of steps first; any other begins
        again, with a window."""
        run, window = self.run, self.window if trained or not self.warm else 0
        run.restore((after.end if self.warm and after is not None else self.start) | {"phi": phi})
        for _ in range(window):
            run.step(phi, self.train, tangents=not self.warm)
        self.taken += window
        self.cost += window * (1 if self.warm else 1 + run.space.q)
        found = self.predicted(self.steps - window, stages, tolerance)
        trouble, end, params = _trouble(found), run.snapshot(), run.params
        if found.params is not None and not trouble:
            params = found.params.astype(params.dtype)
            end["theta"] = params
        missed = MENDED * abs(found.missed)
        share = sum(found.bends) + (LOOSE * tolerance if found.hvps and found.bends else 0.0)
        away = share * np.sqrt(np.mean(found.estimate**2))
        error = np.full(phi.size, np.hypot(away, missed))  # moving phi by one may change what is missed by as much
        rest = (params, trouble, found.reason, end, tolerance, stages)
        return Look(phi, found.outer_loss, missed, found.estimate, error, found.deviation, *rest)

    def predicted(self, ahead: int, stages: int, tolerance: float) -> krylov.Forecast:
        """The run some steps ahead: exactly, once that costs no more than the prediction before did."""
        given = self.run, self.train, self.val, ahead
        found = krylov.exactly(*given) if self.exact else None
        if found is not None:
            self.cost += PRICE * ahead + found.outers
            return found
        found = krylov.estimate(*given, columns=self.columns, stages=stages, tolerance=tolerance)
        cost = found.gradients + found.hvps + found.outers + self.run.space.q * found.mixed
        self.exact = not self.warm and cost > PRICE * ahead
        self.cost += cost
        return found

    def closer(self, look: Look) -> Look:
        """The same phi with smaller errors: a warm run from where the look ended, trained on if h is astray; any other in
        more stages."""
        stages = look.stages if self.warm else min(30, 2 * look.stages)
        return self.look(look.phi, look, look.tolerance / CLOSER, stages, trained=look.deviation >= ASTRAY)


def _trouble(found: krylov.Forecast) -> str:
    if found.params is None or not (np.isfinite(found.outer_loss) and np.isfinite(found.estimate).all()):
        return "not finite"
    return f"training grows: {found.edge:.3g} of the curvature that its steps can stand" if found.grows else ""


def propose(B: Array, h: Array, low: Array, high: Array) -> tuple[Array, float]:
    """The step s (q,) in low..high that minimises `h's + s'Bs / 2`, and the decrease; B (q, q) positive definite."""
    size, V = np.linalg.eigh(B)
    root = np.sqrt(np.maximum(size, 1e-12 * size[-1]))
    s = lsq_linear(root[:, None] * V.T, -(V.T @ h) / root, bounds=(low, high), method="bvls").x
    return s, -float(h @ s + 0.5 * s @ B @ s)


def learned(curvature: BFGS | None, s: Array, y: Array) -> BFGS | None:
    """The curvature after a step s (q,) along which h changed by y (q,)."""
    if not y.any():
        return curvature
    if curvature is None:
        least = 1e-3 * float(np.linalg.norm(s) * np.linalg.norm(y))
        curvature = BFGS(exception_strategy="damp_update", init_scale=SOFT * max(abs(float(s @ y)), least) / float(s @ s))
        curvature.initialize(s.size, "hess")
    curvature.update(s, y)
    return curvature


def minimise(
    run: CoreInner,
    train_batch: Any,
    val_batch: Any,
    *,
    steps: int,
    warm: bool = False,
    window: int = 0,
    columns: int = 64,
    stages: int | None = None,
    tolerance: float = 0.01,
    tol: float = 1e-3,
    looks: int = 60,
    phi: ArrayLike | None = None,
) -> Minimum:
    """Minimise the outer loss after `steps` inner steps on one batch, over the hyperparameters; the run does not move.

    A look at phi predicts the loss, its hypergradient and their errors.  A step that is worse than promised is not taken
    and the radius shrinks; so it does where a look is not finite or training would grow, which is recorded as refused.  A
    start that is refused is given up for one with smaller step sizes (`Guard().shrunk`).  Where a prediction from the start
    has cost more than all steps and their way back (sgd, nothing tuned in the loss), those are taken from then on: exact.

    Args:
      run: a run of the core at its start: sgd, adam, adamw or rmsprop on a `Problem`.
      train_batch: of every inner step.  val_batch: of the outer loss.
      steps: T, inner steps of a run.
      warm: go on from parameters found at the phi before, and not from the start.  For hyperparameters of the loss and
        weight decay, where T steps bring training to its end: its start does not matter then.
      window: inner steps that are really taken, before the rest is predicted: with tangents at every look, which then is
        exact if it is `steps`; or warm, at the first look and where the prediction goes astray.
      columns: Krylov columns of a stage, at most.
      stages: of the prediction, `krylov.estimate`; default 5, or 1 if warm.
      tolerance: of `krylov.estimate` at first; closer looks take a finer one.  h is taken to be uncertain by ten times it,
        which is what the adjoint may leave out, and by what curvature and preconditioner change along the stages.
      tol: ends when the slope promises less than this share of the loss within a distance of 1 in every coordinate, or the
        model of it less than a quarter of that anywhere.
      looks: at most.
      phi: (q,) where to begin; default `run.space.phi0`.

    Returns:
      `Minimum`.  Its cost counts a gradient, an outer gradient and a Hessian-vector product as one, a mixed derivative as
      q, and an inner step as one, with tangents as 1 + q, there and back as 3.  In its history `step` is the cost so far,
      `move` the step of phi (zero if not taken), `reason` holds promised and actual decrease.

    Raises:
      NotFrozenError: the run has no frozen step.
      HyperparameterError: settings that make no sense; `warm` with hyperparameters that a converged run does not depend on.

    Source: Conn, Gould and Toint 2000, "Trust-region methods", chapters 6 and 12; Carter 1991, "On the global convergence
    of trust region algorithms using inexact gradient information".
    """
    call = "trust.minimise"
    krylov.check_run(call, run)
    warm, steps = flag(call, "warm", warm), whole(call, "steps", steps, 1)
    window = whole(call, "window", window, 0, steps, "It is part of the run.")
    columns, looks = whole(call, "columns", columns, 3), whole(call, "looks", looks, 1)
    stages = (1 if warm else 5) if stages is None else whole(call, "stages", stages, 1, 30)
    share = "a number with 0 < {} < 1"
    tolerance = number(call, "tolerance", tolerance, share.format("tolerance"), 0.0, 1.0, open_low=True, open_high=True)
    tol = number(call, "tol", tol, share.format("tol"), 0.0, 1.0, open_low=True, open_high=True)
    _check_space(call, run, warm)
    space = run.space
    start = space.clip(space.check(space.phi0 if phi is None else phi, call))
    before = run.snapshot()
    try:
        search = _Search(Horizon(run, train_batch, val_batch, steps, warm, window, columns), looks)
        return search.found(*search.down(search.first(start, tolerance, stages), tol))
    finally:
        run.restore(before)


def _check_space(call: str, run: CoreInner, warm: bool) -> None:
    if run.directions is not None:
        raise HyperparameterError(f"{call}: the run follows random directions. Make it with directions=None.")
    neglected = krylov.neglected(run.space)
    if neglected:
        raise HyperparameterError(
            f"{call}: {neglected[0]!r} acts on the preconditioner alone, which predictions freeze. Hold it fixed, or tune "
            f"it with a Tuner."
        )
    passing = _passing(run)
    if warm and (passing or run.space.scheduled):
        what = f"{passing[0]!r} does not matter" if passing else "a schedule is over"
        raise HyperparameterError(
            f"{call}: warm=True is for training that has converged, where {what}. Take warm=False, or hold it fixed."
        )


def _passing(run: CoreInner) -> list[str]:
    """Hyperparameters that do not matter once training has converged."""
    return [name for name in run.space if name in run.rule.defaults and name not in LASTING]


class _Search:
    """The steps of phi, and their record."""

    def __init__(self, horizon: Horizon, looks: int):
        self.horizon, self.looks = horizon, looks
        space = horizon.run.space
        self.longest = np.full(space.q, LONGEST)  # of a step, in every coordinate
        for name in _passing(horizon.run):
            self.longest[space.where(name)] = PASSING
        self.history = History(space.labels, space.transforms)

    def note(self, look: Look, event: str, reason: str, move: Array | None = None) -> None:
        """A record of a look; `move` (q,) if phi goes there."""
        nothing = np.full(look.phi.size, np.nan)
        h = np.where(np.isfinite(look.h), look.h, np.nan)
        self.history.append(
            Record(
                step=self.horizon.cost,
                t=self.horizon.steps,
                phi=look.phi,
                h=h,
                estimate=h,
                error=look.error,
                move=np.zeros(look.phi.size) if move is None else -move,
                coherence=nothing,
                loss=np.nan,
                value=look.value,
                accepted=move is not None,
                method="krylov",
                reason=f"{reason}; {look.why}" if look.trouble else reason,
                event=event,
            )
        )

    def first(self, phi: Array, tolerance: float, stages: int) -> Look:
        """A look at the start, or at one with smaller step sizes."""
        for _ in range(PATIENCE):
            look = self.horizon.look(phi, None, tolerance, stages, trained=True)
            self.note(look, f"refused: {look.trouble}" if look.trouble else "", "start")
            shrunk = Guard().shrunk(self.horizon.run.space, phi)
            if not look.trouble or np.array_equal(shrunk, phi) or len(self.history) >= self.looks:
                break
            phi = shrunk
        return look

    def down(self, here: Look, tol: float) -> tuple[Look, str]:
        """From one look to the next, lower one, until it ends; the last, and why."""
        space, curvature, radius, sharper = self.horizon.run.space, None, RADIUS, True
        while True:
            low, high = space.low - here.phi, space.high - here.phi
            unit = np.where(here.h > 0, np.maximum(low, -1.0), np.minimum(high, 1.0))
            slope, unsure = -float(here.h @ unit), float(np.linalg.norm(here.error * unit)) + here.doubt
            enough = tol * abs(here.value)
            if here.trouble:
                return here, f"stopped: {here.trouble} at the start"
            if max(slope, unsure) <= enough:
                return here, f"converged: the slope promises {slope:.2g} of {here.value:.6g}, with an error of {unsure:.2g}"
            if radius < SHORTEST:
                return here, f"stopped: no decrease within a radius of {radius:.2g}"
            if len(self.history) >= self.looks:
                return here, f"stopped: {self.looks} looks"
            B = np.eye(space.q) * np.abs(here.h).max() / radius if curvature is None else curvature.get_matrix()
            reaches = np.minimum(radius, self.longest)
            s, promised = propose(B, here.h, np.maximum(low, -reaches), np.minimum(high, reaches))
            doubt = float(np.linalg.norm(here.error * s)) + here.doubt
            if promised + doubt <= SETTLED * enough and np.abs(s).max() < radius:
                return here, f"converged: the best step promises {promised:.2g} of {here.value:.6g}, doubt {doubt:.2g}"
            if sharper and (slope <= enough or doubt > DOUBT * promised):
                if here.tolerance <= FINEST:
                    return here, f"stopped: the decrease of {promised:.2g} that is left hides in an error of {doubt:.2g}"
                blurred, here = here, self.nearer(here, f"promised {promised:.3g}, doubt {doubt:.3g}")
                sharper = self.sharper(np.linalg.norm(here.error), np.linalg.norm(blurred.error))
                continue
            trial, ratio = self.tried(here, space.clip(here.phi + s), promised, radius)
            reach = float(np.abs(s).max())
            if not trial.trouble:
                curvature = learned(curvature, trial.phi - here.phi, trial.h - here.h)
            if ratio > GOOD and reach > 0.8 * radius:
                radius = min(2 * radius, LONGEST)
            elif not ratio >= POOR:
                radius = reach / 4
            here = trial if ratio > TAKEN else here

    def sharper(self, error: Any, before: Any) -> bool:
        """Whether closer looks are worth their cost: more stages may not help; a warm run has trained on."""
        return self.horizon.warm or bool(error <= SHARPER * before)

    def nearer(self, look: Look, why: str) -> Look:
        """A closer look; the one before stands where that cannot be used."""
        closer = self.horizon.closer(look)
        self.note(closer, f"refused: {closer.trouble}" if closer.trouble else "looked closer", why)
        return look._replace(tolerance=closer.tolerance, stages=closer.stages) if closer.trouble else closer

    def tried(self, here: Look, phi: Array, promised: float, radius: float) -> tuple[Look, float]:
        """A look at phi, close enough to tell whether the promise holds, and the share of it that does."""
        trial = self.horizon.look(phi, here, here.tolerance, here.stages)
        sharper = True
        while sharper and not trial.trouble and trial.doubt > DOUBT * promised and trial.tolerance > FINEST:
            if len(self.history) + 1 >= self.looks:
                break
            self.note(trial, "unsure", f"promised {promised:.3g}, doubt of the value {trial.doubt:.3g}")
            blurred, trial = trial, self.horizon.closer(trial)
            sharper = self.sharper(trial.doubt, blurred.doubt)
        if trial.trouble:
            self.note(trial, f"refused: {trial.trouble}", f"radius {radius:.3g}")
            return trial, -np.inf
        actual = here.value - trial.value
        taken = actual > TAKEN * promised
        why = f"actual {actual:.3g} of promised {promised:.3g}, radius {radius:.3g}"
        self.note(trial, "" if taken else "rejected", why, phi - here.phi if taken else None)
        return trial, actual / promised

    def found(self, last: Look, reason: str) -> Minimum:
        h, run = self.horizon, self.horizon.run
        hyper, value = run.space.natural(last.phi), float("nan") if last.trouble else last.value
        return Minimum(last.phi, hyper, value, last.h, last.error, last.params, h.cost, h.taken, reason, self.history)
