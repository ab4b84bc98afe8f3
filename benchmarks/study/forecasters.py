"""Every way to h[T] from a window of hypergradients, as functions of a `Window`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from koopman_hpo import koopman
from koopman_hpo.koopman import aging
from koopman_hpo.koopman.model import near_one

from .problems import Case
from .trajectories import BEGINNINGS, HORIZON, LATEST, Trajectory

TAUS = (20, 50, 100)
CUMULATIVE_ENDS = (250, LATEST)


class Window(NamedTuple):
    """What a forecaster sees, and what it is judged by."""

    group: str
    case: Case
    tangents: str  # "reset" or "cumulative"
    begun: int
    tau: int
    H: np.ndarray  # (tau, q)
    steps: int  # to the horizon
    age: tuple[float, float]  # of training and tangents, at the first row
    truth: np.ndarray  # (q,)


class Estimate(NamedTuple):
    value: np.ndarray  # (q,)
    error: np.ndarray  # (q,) as stated; NaN where none is
    accepted: bool = True


def windows(group: str, case: Case, found: list[Trajectory]) -> Iterator[Window]:
    """The windows of a run; none of a trajectory that is not finite."""
    for one in found:
        if not np.isfinite(one.H).all():
            continue
        ends = [("reset", tau, one.begun + tau) for tau in TAUS]
        if one.begun == BEGINNINGS[0]:
            ends += [("cumulative", tau, end) for end in CUMULATIVE_ENDS for tau in TAUS]
        for tangents, tau, end in ends:
            age = (end - tau + 1.0, end - tau + 1.0 - one.begun)
            yield Window(group, case, tangents, one.begun, tau, one.window(end, tau), HORIZON - end, age, one.truth)


def aged(w: Window) -> Estimate:
    """`auto`, told how old training and tangents are."""
    found = koopman.extrapolate(w.H, w.steps, age=w.age)
    return Estimate(found.value, found.error, found.accepted)


def law(w: Window) -> Estimate:
    """The aging law alone."""
    scale = np.abs(w.H).max(axis=0)
    scale[scale == 0] = 1.0
    value, error = aging.forecast(w.H / scale, w.steps, aging.Age(*w.age))
    return Estimate(value * scale, error * scale)


def offered(method: str, gate: float, w: Window) -> Estimate:
    """A method of `koopman.extrapolate`, which knows no age."""
    found = koopman.extrapolate(w.H, w.steps, method, gate=gate)
    return Estimate(found.value, found.error, found.accepted)


def published(w: Window) -> Estimate:
    """The rule as published: the modes with an eigenvalue near 1, as they are at the window's end; none: zero."""
    model = koopman.fit(w.H, modes="stationary")
    keep = near_one(model.eigenvalues, len(w.H))
    return Estimate(model.modes[keep].sum(axis=0).real, np.full(len(w.truth), np.nan), bool(keep.any()))


def pydmd(w: Window) -> Estimate:
    """PyDMD's DMD with its own choice of rank, on tau / 4 delays, run on to the horizon."""
    from pydmd import DMD
    from pydmd.preprocessing import hankel_preprocessing

    nothing = np.full(len(w.truth), np.nan)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            model = hankel_preprocessing(DMD(svd_rank=0), d=max(2, len(w.H) // 4))
            model.fit(w.H.T)
            model.dmd_time["tend"] += w.steps
            value = np.real(model.reconstructed_data[:, -1])
    except (ValueError, np.linalg.LinAlgError):
        return Estimate(w.H[-1], nothing, False)
    return Estimate(np.nan_to_num(value, posinf=1e300, neginf=-1e300), nothing)


def forecasters() -> dict[str, Callable[[Window], Estimate]]:
    """By name: `auto` with the age, then each method offered as it is (its gate left open), then what others do."""
    own = {name: partial(offered, name, np.inf) for name in koopman.METHODS if name != "auto"}
    others: dict[str, Callable[[Window], Estimate]] = {"paper's rule": published}
    try:
        import pydmd as _  # noqa: F401
    except ImportError:
        pass
    else:
        others["PyDMD"] = pydmd
    return {"aged": aged, "law": law, "auto": partial(offered, "auto", koopman.forecast.GATE)} | own | others
