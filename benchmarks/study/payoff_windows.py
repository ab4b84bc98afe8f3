"""What else a window might say of the horizon: observables, validation batches, batch orders, past windows, subspaces.

On windows of 50 steps of softmax regression and an MLP on digits, full batch and batches of 32.  Each idea is a function of
a `Look`; it is judged by the error of its h[T] over the last value's, geometric mean over windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo import koopman

from .cases import FIRST_SEED, SGD
from .estimates import short
from .page import table
from .problems import Case, Started, start
from .settings import Settings
from .trajectories import HORIZON

Array = np.ndarray
TAU, BATCH, DRAWN = 50, 32, 50  # a window, a training batch, a validation batch
BEGINNINGS = {0: 500, 100: 150, 400: 450}  # where tangents begin: the last step that is looked at
ENDS = {0: (50, 250, 500), 100: (150,), 400: (450,)}  # of windows; the first of each is "reset"
RANK = 6  # of `poles`, at most
GROWTH = 0.2  # |lambda| <= 1 - GROWTH / m
BASE = "last value"
PARTS = ("full, reset", "full, cumulative", "mini, reset", "mini, cumulative")


class Look(NamedTuple):
    """A window, and what was seen beside its hypergradients."""

    part: str
    H: Array  # (50, q) on all validation data
    beside: Array  # (50, 4): training and validation loss, norms of the training and the validation gradient
    drawn: dict[str, Array]  # (50, q) on less validation data
    past: tuple[Array, ...]  # earlier windows (50, q) of the run, the newest last
    since: Array  # (n, q) all since the tangents began
    steps: int  # to the horizon
    age: tuple[float, float]  # of training and tangents, at the first row
    truth: Array  # (q,)


class Seen(NamedTuple):
    """What one step shows."""

    h: Array  # (q,)
    beside: tuple[float, ...]
    drawn: dict[str, Array]


def rows(s: Started, n: int, seed: Sequence[int]) -> tuple[Array, Array]:
    """n validation examples."""
    pick = np.random.default_rng(seed).choice(len(s.val[1]), n, replace=False)
    return s.val[0][pick], s.val[1][pick]


def seen(s: Started, batch: Any, loss: float, t: int, seed: int) -> Seen:
    """All that is observed after step t: hypergradients on all, on 50 and on 200 examples that stay, on 50 that change."""
    whole, at = s.run.hypergradient(s.val), s.run.linearise(batch, s.val)
    few = {"50": (DRAWN, (seed, 0)), "200": (4 * DRAWN, (seed, 0)), "50, new ones": (DRAWN, (seed, t + 1))}
    drawn = {name: s.run.hypergradient(rows(s, *how)).grad for name, how in few.items()}
    norms = (float(np.linalg.norm(at.gradient)), float(np.linalg.norm(at.outer_gradient)))
    return Seen(whole.grad, (loss, whole.value, *norms), drawn)


def looks(case: Case, cycled: bool = False) -> Iterator[Look]:
    """The windows of a run; `cycled`: every epoch goes through the same batches in the same order."""
    past: list[Array] = []
    for begun, last in BEGINNINGS.items():
        s, known = start(case), []
        epoch = len(s.epoch) if cycled and s.epoch else HORIZON
        for t in range(HORIZON):
            batch = s.batch(t % epoch)
            loss = s.run.step(s.run.space.phi0, batch, tangents=t >= begun)
            if begun <= t < last:
                known.append(seen(s, batch, loss, t, case.seed))
        truth, H = s.run.hypergradient(s.val).grad, np.array([k.h for k in known])
        if not np.isfinite(H).all() or not np.isfinite(truth).all():
            return
        for end in ENDS[begun]:
            kind = "reset" if end == ENDS[begun][0] else "cumulative"
            part = known[end - begun - TAU : end - begun]
            before = past if kind == "reset" else [H[end - k - TAU : end - k] for k in (2 * TAU, TAU) if end - k - TAU >= 0]
            yield Look(
                f"{'mini' if case.size else 'full'}, {kind}",
                np.array([k.h for k in part]),
                np.array([k.beside for k in part]),
                {name: np.array([k.drawn[name] for k in part]) for name in part[0].drawn},
                tuple(before),
                H[: end - begun],
                HORIZON - end,
                (end - TAU + 1.0, end - TAU + 1.0 - begun),
                truth,
            )
        past.append(H[:TAU])


# -- ideas -------------------------------------------------------------------------------------------------------------


def forecast(H: Array, look: Look, method: str = "dmd", aged: bool = False) -> Array:
    """(q,) by `koopman.extrapolate`, the gate left open for a method by name."""
    gate = koopman.forecast.GATE if method == "auto" else np.inf
    found = koopman.extrapolate(H, look.steps, method, gate=gate, age=look.age if aged else None)
    return found.value[: len(look.truth)]


def beside(columns: slice, look: Look, aged: bool = False) -> Array:
    """With what is seen beside h as coordinates more."""
    return forecast(np.hstack([look.H, look.beside[:, columns]]), look, "auto" if aged else "dmd", aged)


def blocks(H: Array, d: int) -> Array:
    """(d q, m - d + 1): the block Hankel matrix of H (m, q) less its mean column: the constant is gone, exactly."""
    m = len(H) - d + 1
    K = np.concatenate([H[i : i + m].T for i in range(d)])
    return K - K.mean(axis=1, keepdims=True)


def poles(windows: Sequence[Array], subspace: bool, keep: float, d: int) -> Array:
    """Eigenvalues of one operator for all windows (m, q): by DMD on delays, or from the subspace of the future that the
    past explains (the projection of N4SID, unweighted).  `keep`: singular values that count, of the largest; d: delays."""
    q = windows[0].shape[1]
    if not subspace:
        K = [blocks(H, d + 1) for H in windows]
        X, Y = (np.hstack([k[part] for k in K]) for part in (slice(None, -q), slice(q, None)))
        U, s, Vt = np.linalg.svd(X, full_matrices=False)
        r = order(s, keep)
        return np.linalg.eigvals(U[:, :r].T @ Y @ Vt[:r].T / s[:r])
    K = [blocks(H, 2 * d) for H in windows]
    past, future = (np.hstack([k[part] for k in K]) for part in (slice(None, d * q), slice(d * q, None)))
    Vt = np.linalg.svd(past, full_matrices=False)[2]
    U, s, _ = np.linalg.svd(future @ Vt.T, full_matrices=False)
    gamma = U[:, : order(s, keep)]
    return np.linalg.eigvals(np.linalg.lstsq(gamma[:-q], gamma[q:], rcond=None)[0])


def order(s: Array, keep: float) -> int:
    """How many singular values (n,) count."""
    return max(1, min(RANK, int((s > keep * s[0]).sum())))


def carried(H: Array, lam: Array, steps: int) -> Array:
    """(q,): H (m, q) as a constant and modes lam^t, by least squares, at `steps` after its end."""
    m = len(H)
    lam = lam * np.minimum(1.0, (1.0 - GROWTH / m) / np.maximum(np.abs(lam), 1e-12))
    at = lambda t: np.concatenate([np.ones((len(t), 1)), lam ** (t[:, None] - m + 1.0)], axis=1)
    basis = at(np.arange(m))
    size = np.abs(basis).max(axis=0)
    amplitudes = np.linalg.lstsq(basis / size, H.astype(complex), rcond=1e-8)[0] / size[:, None]
    return (at(np.array([m - 1 + steps])) @ amplitudes)[0].real


def identified(subspace: bool, pooled: bool, keep: float, d: int, look: Look) -> Array:
    scale = np.maximum(look.H.std(axis=0), 1e-300)
    windows = [H / np.maximum(H.std(axis=0), 1e-300) for H in (*(look.past if pooled else ()), look.H)]
    return carried(look.H / scale, poles(windows, subspace, keep, d), look.steps) * scale


def since(look: Look) -> Array:
    """Aged, on one window of all steps since the tangents began."""
    training, tangents = look.age
    return koopman.extrapolate(look.since, look.steps, age=(training - tangents + 1.0, 1.0)).value


def weighted(look: Look) -> Array:
    """Aged forecasts of the windows since the tangents began, by the errors they state."""
    n, (training, tangents) = len(look.since), look.age
    found = []
    for end in range(n, TAU - 1, -TAU):
        age = (training - n + end, tangents - n + end)
        found.append(koopman.extrapolate(look.since[end - TAU : end], look.steps + n - end, age=age))
    weight = np.array([1.0 / np.maximum(f.error, 1e-300) ** 2 for f in found])
    return (weight * [f.value for f in found]).sum(axis=0) / weight.sum(axis=0)


Idea = Callable[[Look], Array]
PLAIN: dict[str, Idea] = {
    BASE: lambda look: look.H[-1],
    "dmd": lambda look: forecast(look.H, look),
    "auto": lambda look: forecast(look.H, look, "auto"),
    "aged": lambda look: forecast(look.H, look, "auto", aged=True),
}
OBSERVED = {"both losses": slice(0, 2), "both gradients' norms": slice(2, 4), "all four": slice(0, 4)}
SUBSPACE: dict[str, Idea] = {  # with what was best for each on seeds below 10
    "one operator, of this window": partial(identified, False, False, 0.03, 6),
    "one operator, of past windows too": partial(identified, False, True, 0.1, 3),
    "subspace identification": partial(identified, True, False, 0.03, 3),
    "subspace identification, past windows too": partial(identified, True, True, 0.1, 3),
}
IDEAS: dict[str, Idea] = (
    PLAIN
    | {
        f"{name}, and {what}": partial(beside, columns, aged=name == "aged")
        for name in ("dmd", "aged")
        for what, columns in OBSERVED.items()
    }
    | SUBSPACE
    | {"aged, one window since the tangents began": since, "aged, all windows since then, by stated error": weighted}
    | {
        f"{name}, h on {drawn}": lambda look, drawn=drawn, aged=name == "aged": (
            forecast(look.drawn[drawn], look, "auto", True) if aged else look.drawn[drawn][-1]
        )
        for drawn in ("50", "50, new ones", "200")
        for name in (BASE, "aged")
    }
)
CYCLED = PLAIN | SUBSPACE


# -- measuring and reading ---------------------------------------------------------------------------------------------


def judged(job: tuple[Case, bool]) -> list[dict[str, Any]]:
    """Of each window, its part and the relative error of each idea."""
    case, cycled = job
    found, ideas = [], CYCLED if cycled else IDEAS
    with np.errstate(all="ignore"):
        for look in looks(case, cycled):
            size = np.linalg.norm(look.truth)
            errors = {n: float(np.linalg.norm(f(look) - look.truth) / size) for n, f in ideas.items()}
            found.append({"part": look.part, "cycled": cycled, "errors": errors})
    return found


def plan(seeds: Sequence[int]) -> list[tuple[Case, bool]]:
    made = [Case(p, lr, seed, size) for p in ("softmax", "mlp") for lr in SGD for seed in seeds for size in (None, BATCH)]
    return [(case, False) for case in made] + [(case, True) for case in made if case.size]


def measure(settings: Settings, first: int = FIRST_SEED) -> list[dict[str, Any]]:
    """`ratios` as training goes, and with equal epochs."""
    windows = [w for part in settings.map(judged, plan(range(first, first + (4 if settings.full else 2)))) for w in part]
    return [ratios([w for w in windows if w["cycled"] == cycled]) for cycled in (False, True)]


def ratios(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """{idea: {part: geometric mean of its error over the last value's}}; the last value's own; how many windows a part."""
    parts = {p: [w["errors"] for w in windows if w["part"] == p] for p in PARTS}
    parts = {p: found for p, found in parts.items() if found}
    mean = lambda values: short(np.exp(np.mean(np.log(values))))
    over = lambda idea, found: mean([e[idea] / e[BASE] for e in found])
    return {
        "windows": {p: len(found) for p, found in parts.items()},
        "last": {p: mean([e[BASE] for e in found]) for p, found in parts.items()},
        "ideas": {idea: {p: over(idea, found) for p, found in parts.items()} for idea in windows[0]["errors"]},
    }


def block(record: dict[str, Any]) -> str:
    """Two tables: as training goes, and with the same batches in every epoch."""
    say = lambda part: part.replace("mini", "batches of 32")
    plain, cycled = record["results"]["windows"]
    own = ["its error, geometric mean", *(plain["last"][p] for p in PARTS)]
    lines = [[n, *(v[p] for p in PARTS)] for n, v in plain["ideas"].items()]
    first = table(["error / last value's", *map(say, PARTS)], [lines[0], own, *lines[1:]])
    mini, ideas = PARTS[2:], cycled["ideas"]
    own = ["its error, geometric mean", *(found["last"][p] for found in (plain, cycled) for p in mini)]
    lines = [[n, *(found["ideas"][n][p] for found in (plain, cycled) for p in mini)] for n in ideas]
    heads = [f"{batches}, {p.split(', ')[1]}" for batches in ("epochs drawn anew", "equal epochs") for p in mini]
    second = table(["batches of 32, error / last value's", *heads], [lines[0], own, *lines[1:]])
    counts = "; ".join(f"{n} {say(p)}" for p, n in plain["windows"].items())
    return f"Windows: {counts}.\n\n{first}\n\n{second}"
