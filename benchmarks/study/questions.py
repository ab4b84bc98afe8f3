"""The open questions about estimates, measured: what its reviewers asked of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from koopman_hpo import koopman

from . import answers, cases, trajectories
from .estimates import short
from .forecasters import Window, aged, offered, published, windows
from .problems import Case, Started, start
from .settings import Settings

Row = dict[str, Any]
BASE = ("full", "mini")  # groups of the questions about the fit
TAU = 50
RANKS, DELAYS = (1, 2, 3, 4, 6, 8), (1, 2, 5, 10, 15, 20, 25)
RATES = tuple(float(f"{x:.3g}") for x in np.geomspace(1e-4, 1.0, 9))
SIZES = (8, 16, 32, 64, 128, 256, None)
HIGH = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
CHANGE = 500


def plain(name: str, gate: float = np.inf) -> Callable[[Window], np.ndarray]:
    return lambda w: offered(name, gate, w).value


JUDGES: dict[str, Callable[[Window], np.ndarray]] = {
    "last": plain("last"),
    "auto": plain("auto", koopman.forecast.GATE),
    "aged": lambda w: aged(w).value,
}


def error(w: Window, value: np.ndarray) -> float:
    return float(np.linalg.norm(value - w.truth) / np.linalg.norm(w.truth))


def medians(ws: Iterable[Window], judges: dict[str, Callable[[Window], np.ndarray]]) -> dict[str, float]:
    """Median relative error of each, over windows."""
    ws = list(ws)
    with np.errstate(all="ignore"):
        return {name: short(np.median([error(w, judge(w)) for w in ws])) for name, judge in judges.items()}


def seen(case: Case, settings: Settings, group: str = "") -> list[Window]:
    return list(windows(group, case, trajectories.trajectories(case, settings.data, settings.cache)))


# ---- what is measured ------------------------------------------------------------------------------------------------


def fits(settings: Settings) -> Row:
    """Rank, delays, observables and modes: other models on the windows of the groups in full batch and in mini-batches."""
    out: Row = {"rank": {}, "delays": {}, "modes": {}, "observables": {}, "moduli": {}}
    for group in BASE:
        ws = [w for c in cases.cases(group, settings.full) for w in seen(c, settings, group) if w.tau == TAU]
        for tangents in ("reset", "cumulative"):
            part, key = [w for w in ws if w.tangents == tangents], f"{group}, {tangents}"
            fixed = lambda w, d, r: koopman.fit(w.H, delays=d, rank=r).forecast(w.steps)
            beside = JUDGES | {"bic": MODES["all modes, bounded"]}
            out["rank"][key] = medians(part, {str(r): partial(fixed, d=TAU // 4, r=r) for r in RANKS} | beside)
            out["delays"][key] = medians(part, {str(d): partial(fixed, d=d, r="auto") for d in DELAYS} | beside)
            out["modes"][key] = medians(part, MODES)
            out["observables"][key] = medians(part, OBSERVABLES)
            lam = np.concatenate([np.abs(koopman.fit(w.H, growth=1e-6).eigenvalues) for w in part])
            out["moduli"][key] = np.histogram(lam, np.linspace(0.5, 1.0, 26))[0].tolist()
    return out


MODES: dict[str, Callable[[Window], np.ndarray]] = {
    "near 1 only, as published": lambda w: published(w).value,
    "near 1 only, else the last value": plain("stationary"),
    "the constant only": lambda w: koopman.fit(w.H).limit(),
    "all modes, bounded": lambda w: koopman.fit(w.H).forecast(w.steps),
    "all modes, nearly free": lambda w: koopman.fit(w.H, growth=1e-6).forecast(w.steps),
    "aged": JUDGES["aged"],
}


def one_by_one(w: Window) -> np.ndarray:
    return np.concatenate([koopman.fit(w.H[:, [j]]).forecast(w.steps) for j in range(w.H.shape[1])])


def with_squares(w: Window) -> np.ndarray:
    """Products of two coordinates are observables, too."""
    H = w.H / np.maximum(np.abs(w.H).max(axis=0), 1e-300)
    i, j = np.triu_indices(H.shape[1])
    return koopman.fit(np.hstack([H, H[:, i] * H[:, j]])).forecast(w.steps)[: H.shape[1]] * np.abs(w.H).max(axis=0)


OBSERVABLES: dict[str, Callable[[Window], np.ndarray]] = {
    "each h alone": one_by_one,
    "all h together": lambda w: koopman.fit(w.H).forecast(w.steps),
    "each in its deviations": plain("dmd"),
    "and their products": with_squares,
    "and its age": JUDGES["aged"],
}


def losses(settings: Settings) -> dict[str, Row]:
    """Training and validation loss as two observables more; softmax regression, the last 50 steps of 50 or 500."""
    out: dict[str, Row] = {}
    for label, size in (("full", None), ("mini", 32)):
        for tangents, begun, end in (("reset", 400, 450), ("cumulative", 0, 500)):
            errors: dict[str, list[float]] = {"h": [], "h and losses": []}
            for lr in (0.003, 0.02):
                for seed in range(cases.FIRST_SEED, cases.FIRST_SEED + (4 if settings.full else 2)):
                    H, truth = observed(Case("softmax", lr, seed, size), begun, end)
                    unit = np.maximum(H.std(axis=0), 1e-300)
                    for name, columns in (("h", len(truth)), ("h and losses", H.shape[1])):
                        X = H[:, :columns] / unit[:columns]
                        value = koopman.fit(X).forecast(trajectories.HORIZON - end)[: len(truth)] * unit[: len(truth)]
                        errors[name].append(float(np.linalg.norm(value - truth) / np.linalg.norm(truth)))
            out[f"{label}, {tangents}"] = {name: short(np.median(e)) for name, e in errors.items()}
    return out


def observed(case: Case, begun: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(50, q + 2): h, validation and training loss of the 50 steps until `end`; and h at the horizon."""
    s, rows = start(case), []
    for t in range(trajectories.HORIZON):
        loss = s.run.step(s.run.space.phi0, s.batch(t), tangents=t >= begun)
        if end - TAU <= t < end:
            h = s.run.hypergradient(s.val)
            rows.append([*h.grad, h.value, loss])
    return np.array(rows), s.run.hypergradient(s.val).grad


def sweep(settings: Settings, name: str, values: Iterable[Any], case: Callable[[Any, int], Case]) -> list[Row]:
    """Errors of the judges at tau 50, reset and cumulative, as one thing changes."""
    seeds = range(cases.FIRST_SEED, cases.FIRST_SEED + (4 if settings.full else 2))
    rows = []
    for value in values:
        made = trajectories.make([case(value, seed) for seed in seeds], settings)
        ws = [w for c in made for w in seen(c, settings) if w.tau == TAU]
        both = {t: medians([w for w in ws if w.tangents == t], JUDGES) for t in ("reset", "cumulative")} if ws else {}
        rows.append({name: value} | both)
    return rows


def lower_rate(s: Started, t: int) -> tuple[np.ndarray, Any]:
    """A tenth of the learning rate from step 500 on."""
    phi, batch = trajectories.as_begun(s, t)
    return (phi + np.eye(1, len(phi))[0] * np.log(0.1) if t >= CHANGE else phi), batch


def other_data(s: Started, t: int) -> tuple[np.ndarray, Any]:
    """The first half of the data until step 500, then the second."""
    X, y = s.train
    half = len(y) // 2
    part = (X[half:], y[half:]) if t >= CHANGE else (X[:half], y[:half])
    return s.run.space.phi0, part


DRIVES = {"nothing": trajectories.as_begun, "lr falls to a tenth": lower_rate, "new data": other_data}


def changes(settings: Settings) -> dict[str, Row]:
    """Windows before step 500, where something changes at step 500 that they cannot know."""
    out = {}
    for name, drive in DRIVES.items():
        ws = []
        for seed in range(cases.FIRST_SEED, cases.FIRST_SEED + (4 if settings.full else 2)):
            for lr in (0.003, 0.02):
                case = Case("softmax", lr, seed)
                ws += windows("", case, [trajectories.trained(case, None, begun, drive) for begun in (0, 100)])
        out[name] = medians([w for w in ws if w.tau == TAU], JUDGES)
    return out


def explosions(settings: Settings) -> list[Row]:
    """At large lr: the exact hypergradient of lr at step 300, and what a tenth more and less of lr does to the loss."""
    rows = []
    for lr in HIGH:
        for seed in range(cases.FIRST_SEED, cases.FIRST_SEED + (4 if settings.full else 2)):
            loss, h, found = {}, np.nan, np.nan
            for factor in (1 / 1.1, 1.0, 1.1):
                s = start(Case("mlp", lr * factor, seed, 32))
                H = []
                with np.errstate(all="ignore"):
                    for t in range(300):
                        s.run.step(s.run.space.phi0, s.batch(t), tangents=factor == 1.0)
                        if factor == 1.0 and t < 100:
                            H.append(s.run.hypergradient(s.val).grad)
                    after = s.run.hypergradient(s.val)
                loss[factor] = after.value
                if factor == 1.0:
                    h = after.grad[0]
                    if np.isfinite(H).all():
                        found = koopman.extrapolate(np.array(H[50:]), 200, age=(51, 51)).value[0]
            slope = (loss[1.1] - loss[1 / 1.1]) / (2 * np.log(1.1))
            values = {"exact": h, "aged": found, "slope": slope}
            rows.append({"lr": lr, "seed": seed} | {k: short(v) if np.isfinite(v) else None for k, v in values.items()})
    return rows


def measure(settings: Settings) -> Row:
    """All of the above."""
    by_lr = lambda size: lambda lr, seed: Case("softmax", lr, seed, size)
    return {
        "fits": fits(settings),
        "losses": losses(settings),
        "rates": {"full": sweep(settings, "lr", RATES, by_lr(None)), "mini": sweep(settings, "lr", RATES, by_lr(32))},
        "sizes": sweep(settings, "size", SIZES, lambda size, seed: Case("softmax", 0.02, seed, size)),
        "changes": changes(settings),
        "explosions": explosions(settings),
    }


BLOCKS, FIGURES = answers.BLOCKS, answers.FIGURES
