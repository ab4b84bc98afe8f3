"""The guard: when a window is thrown away, and what the trajectory says about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import HyperparameterError
from .hyperparameters import Space

Array = NDArray[Any]


@dataclass(frozen=True)
class Guard:
    """When to roll back, and what to do then.

    A window is thrown away when a loss or hypergradient is not finite, or when the validation loss exceeds
    `L0 + (factor - 1) |L0|`, with L0 its value before training.  (Compared with L0 and not with the window before: a slow
    climb would slip through.)  The run goes back to the window's start, tangents are zeroed, and the hyperparameters in
    `shrink_names` are divided by `shrink`.  After `patience` rollbacks in a row tuning stops.

    Chaos: the tangents grow by more than `chaos_growth` a step over `chaos_steps` steps while the hypergradient flips its
    sign at half of its records or more.  The estimate is then recorded and not used, and the tangents start again.
    """

    factor: float = 1.5
    shrink: float = 3.0
    shrink_names: tuple[str, ...] = ("lr",)
    patience: int = 20
    chaos_growth: float = 0.003
    chaos_steps: int = 100

    def __post_init__(self) -> None:
        if not (self.factor > 1 and self.shrink > 1 and self.patience >= 1 and self.chaos_steps >= 1):
            raise HyperparameterError(
                f"Guard: needs factor > 1, shrink > 1, patience >= 1 and chaos_steps >= 1, got {self}."
            )

    def verdict(self, value: float, h: Array, start: float) -> str:
        """Why the window must go, or an empty string."""
        if not math.isfinite(value):
            return f"validation loss is {value}"
        if not np.isfinite(h).all():
            return "hypergradient is not finite"
        limit = start + (self.factor - 1) * abs(start)
        return f"validation loss {value:.4g} exceeds {limit:.4g}" if value > limit else ""

    def shrunk(self, space: Space, phi: Array) -> Array:
        """(q,) phi with the step sizes divided by `shrink`, within the bounds; phi itself where there are none."""
        natural = space.natural(phi)
        names = [n for n in self.shrink_names if n in space]
        return space.phi(natural | {n: np.clip(natural[n] / self.shrink, *space[n].bounds) for n in names})


def coherence(H: Array) -> Array:
    """(q,) `|mean h| / mean |h|` of a trajectory (m, q): 1 where the sign never wavers, near 0 for a coin toss."""
    total = np.abs(H).mean(axis=0)
    return np.divide(np.abs(H.mean(axis=0)), total, out=np.ones(H.shape[1]), where=total > 0)


def flips(H: Array) -> float:
    """Largest share, over the coordinates, of neighbours in the trajectory (m, q) that differ in sign; 0 where m < 3."""
    if len(H) < 3:
        return 0.0
    return float((np.sign(H[1:]) * np.sign(H[:-1]) < 0).mean(axis=0).max())
