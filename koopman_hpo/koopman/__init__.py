"""Koopman extrapolation: delay embedding, fit, forecast, error estimate; sequence extrapolation; a recorder."""

from __future__ import annotations

from .forecast import METHODS, Forecast, extrapolate
from .model import Koopman, fit
from .recorder import Recorder

__all__ = ["METHODS", "Forecast", "Koopman", "Recorder", "extrapolate", "fit"]
