"""Strategies: which estimate of the global hypergradient, from which snapshots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from . import koopman
from .errors import HyperparameterError, choice, number, whole
from .koopman import Forecast

Array = NDArray[Any]
Mode = Literal["online", "restart"]


class Strategy(Protocol):
    """What the tuner asks of a strategy.

    Attributes:
      mode: the outer loop it is made for.
      snapshots: hypergradients wanted a window.
      cut: share of the horizon that the first run in mode `restart` goes.
    """

    @property
    def mode(self) -> Mode: ...
    @property
    def snapshots(self) -> int: ...
    @property
    def cut(self) -> float: ...
    def estimate(self, H: Array, ahead: int) -> Forecast: ...


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


@dataclass(frozen=True)
class Glocal:
    """The window's trajectory extrapolated to the end of training (Hataya & Kawahara, arXiv 2402.02741).

    Args:
      method: of `koopman.extrapolate`.
      clip: the estimate is kept within `clip` times the largest |h| of the window, by coordinate: an outlier would
        inflate an outer Adam's second moment for many windows.
      snapshots: hypergradients wanted a window.
    """

    method: str = "auto"
    clip: float = 3.0
    mode: Mode = "online"
    snapshots: int = 25
    cut: float = 0.1

    def __post_init__(self) -> None:
        _check(self)
        choice("Glocal", "method", self.method, koopman.METHODS)
        number("Glocal", "clip", self.clip, "a number > 0", 0.0, open_low=True)

    def estimate(self, H: Array, ahead: int) -> Forecast:
        """Extrapolate the snapshots H (m, q) by `ahead` more, clipped."""
        forecast = koopman.extrapolate(H, ahead, method=self.method)
        with np.errstate(over="ignore"):
            limit = self.clip * np.abs(H).max(axis=0)
        return replace(forecast, value=np.clip(forecast.value, -limit, limit))
