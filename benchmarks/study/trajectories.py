"""Hypergradients as training goes: one file a run, made once, so that every forecaster sees the same windows.

A run at fixed hyperparameters.  `b` is where tangents begin: anew at each of a few steps ("reset"), or at 0 and carried on
("cumulative").  The truth of both is the hypergradient at the horizon of the same tangents.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .problems import NEEDS_DATA, Case, Started, start
from .settings import Settings

HORIZON = 1000
EVERY = 10  # beyond the windows, for figures
BEGINNINGS = (0, 100, 400)
LONGEST = 100  # of a window
LATEST = 500  # end of a cumulative window


class Trajectory(NamedTuple):
    """Of tangents begun at one step."""

    begun: int
    t: np.ndarray  # (n,) the inner steps at which h was taken, the last one HORIZON
    H: np.ndarray  # (n, q)

    def window(self, stop: int, tau: int) -> np.ndarray:
        """(tau, q): the hypergradients of the tau steps that end at step `stop`."""
        rows = np.searchsorted(self.t, np.arange(stop - tau + 1, stop + 1))
        assert (self.t[rows] == np.arange(stop - tau + 1, stop + 1)).all()
        return self.H[rows]

    @property
    def truth(self) -> np.ndarray:
        return self.H[-1]


def recorded(begun: int) -> set[int]:
    """The steps at which a hypergradient is taken."""
    end = LATEST if begun == 0 else begun + LONGEST
    return {*range(begun + 1, end + 1), *range(end, HORIZON + 1, EVERY), HORIZON}


Drive = Callable[[Started, int], tuple[np.ndarray, Any]]  # (run, step) -> phi (q,), batch


def as_begun(s: Started, t: int) -> tuple[np.ndarray, Any]:
    """Hyperparameters and data stay what they are."""
    return s.run.space.phi0, s.batch(t)


def trained(case: Case, data: pathlib.Path | None, begun: int, drive: Drive = as_begun) -> Trajectory:
    """Train to the horizon, tangents from step `begun`."""
    s, steps = start(case, data), recorded(begun)
    H = []
    for t in range(HORIZON):
        s.run.step(*drive(s, t), tangents=t >= begun)
        if t + 1 in steps:
            H.append(s.run.hypergradient(s.val).grad)
    return Trajectory(begun, np.array(sorted(steps)), np.array(H))


def trajectories(case: Case, data: pathlib.Path | None, cache: pathlib.Path) -> list[Trajectory]:
    """Those of all beginnings, from the cache where they are."""
    path = cache / f"{case.name}.npz"
    if not path.exists():
        found = {}
        with np.errstate(all="ignore"):
            for begun in BEGINNINGS:
                one = trained(case, data, begun)
                found |= {f"t{begun}": one.t, f"H{begun}": one.H}
        cache.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".part.npz")
        np.savez(partial_file, **found)
        partial_file.rename(path)
    with np.load(path) as arrays:
        return [Trajectory(b, arrays[f"t{b}"], arrays[f"H{b}"]) for b in BEGINNINGS]


def make(cases: list[Case], settings: Settings) -> list[Case]:
    """Fill the cache; the cases that can be run here: without --data those on MNIST and KMNIST are left out."""
    there = [c for c in cases if settings.data is not None or c.problem not in NEEDS_DATA]
    settings.map(partial(trajectories, data=settings.data, cache=settings.cache), there)
    return there
