"""Strategies: which estimate of the global hypergradient, from which snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import koopman, krylov
from .engine import CoreInner
from .errors import HyperparameterError, NotFrozenError, choice, number, whole
from .inner import Inner
from .koopman import Forecast

Array = NDArray[Any]
Mode = Literal["online", "restart"]


class Strategy(Protocol):
    """What the tuner asks of a strategy.

    Attributes:
      mode: the outer loop it is made for.
      snapshots: hypergradients wanted a window.
      cut: share of the horizon that the first run in mode `restart` goes.

    A strategy may also have `suits(run)`, which raises where it cannot work with a run; `look(H, ahead, window)`, which is
    then called in place of `estimate`, with the run itself: a `Window`; and `recognises(batch)`, whether it knows of a
    step's batch.
    """

    @property
    def mode(self) -> Mode: ...
    @property
    def snapshots(self) -> int: ...
    @property
    def cut(self) -> float: ...
    def estimate(self, H: Array, ahead: int) -> Forecast: ...


class Window(NamedTuple):
    """A window's end, for strategies that look at the run and not at its trajectory alone; they must not move it."""

    run: Inner
    val_batch: Any  # of the outer loss
    steps: int  # inner steps to the horizon
    length: int  # inner steps of the window
    strayed: bool = False  # whether steps so far were on batches that the strategy does not recognise


def _check(strategy: Strategy) -> None:
    """Refuse settings that no tuner can work with."""
    call = type(strategy).__name__
    choice(call, "mode", strategy.mode, ("online", "restart"))
    whole(call, "snapshots", strategy.snapshots)
    number(call, "cut", strategy.cut, "a share of the horizon in (0, 1]", 0.0, 1.0, open_low=True)


def _last(H: Array, reason: str) -> Forecast:
    return replace(koopman.extrapolate(H[-1:], 0, method="last"), accepted=True, reason=reason)


@dataclass(frozen=True)
class Local:
    """The hypergradient at the end of the window as it is: cheapest, short-sighted."""

    mode: Mode = "online"
    snapshots: int = 1
    cut: float = 0.1

    def __post_init__(self) -> None:
        _check(self)

    def estimate(self, H: Array, ahead: int) -> Forecast:
        """The last of the snapshots H (m, q), whatever lies ahead."""
        return _last(H, "the last value, by choice")


@dataclass(frozen=True)
class Global:
    """The exact hypergradient at the end of full training: right, and a whole run an update."""

    mode: Mode = "restart"
    snapshots: int = 1
    cut: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if self.mode != "restart" or self.cut != 1.0:
            raise HyperparameterError(
                "Global: needs whole runs, mode='restart' and cut=1. For one pass take Local or Glocal."
            )

    def estimate(self, H: Array, ahead: int) -> Forecast:
        """The last of the snapshots H (m, q): the run's end."""
        return _last(H, "the end of training")


class Unset:
    """A training batch that was not given; None may be one."""

    def __repr__(self) -> str:
        return "not given"


UNSET = Unset()
ESTIMATORS = ("trajectory", "krylov", "auto")
PRODUCTS = 15  # Hessian-vector products that a stage takes, about


@dataclass(frozen=True)
class Glocal:
    """The window's trajectory extrapolated to the end of training (Hataya & Kawahara, arXiv 2402.02741), or the training
    dynamics themselves rolled there (`koopman_hpo.krylov`).

    Args:
      method: of `koopman.extrapolate`.
      clip: the extrapolated estimate is kept within `clip` times the largest |h| of the window, by coordinate: an outlier
        would inflate an outer Adam's second moment for many windows.  A krylov estimate is taken as it is.
      snapshots: hypergradients wanted a window.
      estimator: "trajectory"; "krylov": `krylov.estimate` where it passes its gate, else the trajectory's; "auto": krylov
        where the inner problem is deterministic (every step on `train_batch` itself, or `batches` of one), where
        hyperparameters of the loss are tuned, and where `batches` are given and it costs less than `share` of the window,
        about; else, for a run that cannot be frozen, and where beta2 or alpha is tuned, the trajectory's.  The reason is
        recorded.
      train_batch: of krylov, what the mean gradient is taken on.  batches, noise: of krylov, how training differs from
        steps on `train_batch`, as for `krylov.estimate`; batches=[train_batch] says that it does not.
      settings: further keywords of `krylov.estimate`.
      share: of the cost of the window's gradients and tangents.

    Raises:
      HyperparameterError, ShapeError: settings that make no sense.
    """

    method: str = "auto"
    clip: float = 3.0
    mode: Mode = "online"
    snapshots: int = 25
    cut: float = 0.1
    estimator: str = "trajectory"
    train_batch: Any = field(default=UNSET, repr=False, compare=False)
    batches: list[Any] | None = field(default=None, repr=False, compare=False)
    noise: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    share: float = 0.5

    def __post_init__(self) -> None:
        _check(self)
        choice("Glocal", "method", self.method, koopman.METHODS)
        number("Glocal", "clip", self.clip, "a number > 0", 0.0, open_low=True)
        choice("Glocal", "estimator", self.estimator, ESTIMATORS)
        number("Glocal", "share", self.share, "a number > 0", 0.0, open_low=True)
        if self.estimator == "trajectory":
            return
        if self.train_batch is UNSET:
            raise HyperparameterError(
                f"Glocal: estimator={self.estimator!r} needs train_batch=..., what the mean gradient is taken on: all "
                f"training data, or much of it."
            )
        self._krylov()

    def _krylov(self) -> krylov.Settings:
        names = [n for n in krylov.Settings._fields if n not in ("batches", "noise")]
        if not isinstance(self.settings, Mapping) or not set(self.settings) <= set(names):
            raise HyperparameterError(f"Glocal: settings must be a dict of {names}, got {self.settings!r}.")
        return krylov.Settings(batches=self.batches, noise=self.noise, **self.settings).checked("Glocal")

    def estimate(self, H: Array, ahead: int) -> Forecast:
        """Extrapolate the snapshots H (m, q) by `ahead` more, clipped."""
        forecast = koopman.extrapolate(H, ahead, method=self.method)
        with np.errstate(over="ignore"):
            limit = self.clip * np.abs(H).max(axis=0)
        return replace(forecast, value=np.clip(forecast.value, -limit, limit))

    def suits(self, run: Inner) -> None:
        """Raise NotFrozenError where "krylov" cannot work with the run."""
        if self.estimator == "krylov":
            krylov.check_run("Glocal", run)

    def recognises(self, batch: Any) -> bool:
        """Whether a step's batch is `train_batch`: the same object, or of the same arrays."""
        given = self.train_batch
        alike = isinstance(batch, tuple | list) and type(batch) is type(given) and len(batch) == len(given)
        return batch is given or (alike and all(a is b for a, b in zip(batch, given, strict=True)))

    def look(self, H: Array, ahead: int, window: Window) -> Forecast:
        """The estimate by the chosen estimator; H (m, q) and ahead as for `estimate`."""
        if self.estimator == "trajectory":
            return self.estimate(H, ahead)
        why = self._too_dear(window) if self.estimator == "auto" else ""
        found = why or self._rolled(window)
        if isinstance(found, Forecast):
            return found
        other = self.estimate(H, ahead)
        return replace(other, reason=f"{found}; {other.reason}")

    def _rolled(self, window: Window) -> Forecast | str:
        """The estimate by krylov, or why there is none."""
        plan = self._krylov()._asdict()
        try:
            found = krylov.estimate(window.run, self.train_batch, window.val_batch, window.steps, **plan)  # type: ignore
        except NotFrozenError as error:  # what only the loss itself shows
            return f"no krylov ({error})"
        return found if found.accepted else f"krylov not accepted ({found.reason.removeprefix('last value: ')})"

    def _too_dear(self, window: Window) -> str:
        """Why "auto" does not even try krylov, or an empty string."""
        try:
            krylov.check_run("Glocal", window.run)
        except NotFrozenError as error:
            return f"no krylov ({error})"
        run = window.run
        assert isinstance(run, CoreInner)
        neglected = krylov.neglected(run.space)
        if neglected:
            return f"no krylov ({', '.join(neglected)} is tuned, which it leaves out)"
        loss = any(name not in run.rule.defaults for name in run.space.names)
        if loss or (self.noise is None and self.batches is not None and len(self.batches) == 1):
            return ""
        if self.noise is None and self.batches is None:
            return "no krylov (steps are not all on train_batch: tell it batches=[...])" if window.strayed else ""
        plan = self._krylov()
        ratio = _size(self.train_batch) / max(_size(self.batches[0]), 1) if self.batches else 1.0
        cost = plan.stages * PRODUCTS * ratio / (window.length * (1 + run.space.q))
        return "" if cost <= self.share else f"no krylov (about {cost:.2g} of the window's cost, share {self.share:g})"


def _size(batch: Any) -> int:
    """Examples in a batch: the length of its first array, as far as one can tell."""
    first = batch
    while isinstance(first, tuple | list | Mapping) and len(first):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return len(first) if hasattr(first, "__len__") else 1
