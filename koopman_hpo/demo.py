"""`koopman-hpo demo`: a digits classifier tuned from a bad learning rate, beside random full runs.

An MLP 64-32-10 on scikit-learn's handwritten digits (1,000 training, 300 validation, 497 test images), momentum SGD,
batch 64; lr, momentum and L2 are tuned.  One BLAS thread: on matrices this small more of them only wait.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from koopman_hpo_adapters.numpy import Model, mlp
from koopman_hpo_adapters.progress import Progress, bar

from . import inner
from .errors import DivergenceWarning
from .history import History
from .hyperparameters import log, logit
from .space import Space
from .strategies import Glocal, Local, Strategy
from .tuner import Tuner

BATCH = 64
MOMENTUM, L2 = 0.9, 1e-4
Set = tuple[np.ndarray, np.ndarray]  # X (n, 64), y (n,)


class Setting(NamedTuple):
    """What the command line sets."""

    seed: int
    steps: int  # inner steps a run
    lr: float  # to start from
    random: int  # random full runs


class Data(NamedTuple):
    train: Set
    val: Set
    test: Set


class Run(NamedTuple):
    """A run that has ended."""

    test: float  # loss on the test set
    accuracy: float
    val: float  # loss on the validation set
    seconds: float  # processor time
    curve: tuple[np.ndarray, np.ndarray]  # steps (n,), validation losses (n,)
    hyper: dict[str, Any]  # natural values at the end
    history: History | None = None
    reason: str = "finished"


def main(setting: Setting, out: Path) -> int:
    """Everything: runs, table, one line of gain, figure and history in the folder `out`."""
    from threadpoolctl import threadpool_limits  # type: ignore

    data = split(setting.seed)
    start = space(setting.lr)  # refuses a rate at or below zero before anything is written
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"the folder {out} is not writable; name another with --out")
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", DivergenceWarning)  # the table says it
        _compile(data)
        runs = {"fixed": plain(setting, data, start, "fixed ")}
        runs |= {n: tuned(setting, data, start, s, n) for n, s in (("local", Local()), ("glocal", Glocal()))}
        searched = random_search(setting, data)
    _print(setting, runs, searched)
    _save(setting, runs, searched, start, out)
    return 0


def split(seed: int) -> Data:
    """Digits in random order, scaled by the training set's mean and standard deviation."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    train, val, test = order[:1000], order[1000:1300], order[1300:]
    X = (X - X[train].mean()) / X[train].std()
    return Data((X[train], y[train]), (X[val], y[val]), (X[test], y[test]))


def batches(train: Set, seed: int) -> Callable[[int], Set]:
    """A function of the step: each epoch in an order of its own, the same whoever asks."""
    X, y = train
    n = len(y)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(n)

    def batch(t: int) -> Set:
        epoch, k = divmod(t, n // BATCH)
        chosen = order(epoch)[k * BATCH : (k + 1) * BATCH]
        return X[chosen], y[chosen]

    return batch


def space(lr: float, momentum: float = MOMENTUM, l2: float = L2) -> Space:
    return Space(lr=log(lr), momentum=logit(momentum), l2=log(l2))


def model(seed: int) -> Model:
    return mlp((64, 32, 10), seed=seed)


# -- runs --------------------------------------------------------------------------------------------------------------


def tuned(setting: Setting, data: Data, start: Space, strategy: Strategy, label: str) -> Run:
    net, batch = model(setting.seed), batches(data.train, setting.seed)
    window = min(25, setting.steps)
    tuner = Tuner(inner.sgd(net, start), strategy, steps=setting.steps, window=window, callbacks=[Progress(f"{label:7s}")])
    began = time.process_time()
    result = tuner.fit(batch, [data.val])
    seconds = time.process_time() - began
    curve = (result.history.step, result.history.value)
    return _ended(net, result.params, data, seconds, curve, result.hyper, result.history, result.reason)


def plain(setting: Setting, data: Data, start: Space, label: str = "", shown: Any = None) -> Run:
    """Training with the hyperparameters held where they start, and no tangents."""
    net, batch = model(setting.seed), batches(data.train, setting.seed)
    run = inner.sgd(net, start)
    shown = shown or bar(setting.steps, label)
    seconds, steps, losses = 0.0, [], []
    for first in range(0, setting.steps, 25):
        last = min(first + 25, setting.steps)
        began = time.process_time()
        for t in range(first, last):
            run.step(start.phi0, batch(t), tangents=False)
        seconds += time.process_time() - began
        steps.append(last)
        losses.append(net.outer(run.params, {}, data.val)[0])
        shown.update(last - first)
    if label:
        shown.close()
    curve = (np.array(steps), np.array(losses))
    return _ended(net, run.params, data, seconds, curve, start.natural(start.phi0))


def random_search(setting: Setting, data: Data) -> list[Run]:
    """Full runs with lr in 1e-4..10 and L2 in 1e-6..1e-1, log-uniform, and momentum in 0..0.99, uniform."""
    rng = np.random.default_rng(setting.seed)
    shown = bar(setting.random * setting.steps, "random ")
    runs = []
    for _ in range(setting.random):
        at = space(10 ** rng.uniform(-4, 1), rng.uniform(0, 0.99), 10 ** rng.uniform(-6, -1))
        runs.append(plain(setting, data, at, shown=shown))
    shown.close()
    return runs


def _ended(net, params, data, seconds, curve, hyper, history=None, reason="finished") -> Run:
    test, val = (float(net.outer(params, {}, d)[0]) for d in (data.test, data.val))
    return Run(test, net.accuracy(params, *data.test), val, seconds, curve, hyper, history, reason)


def _compile(data: Data) -> None:
    """Load or compile every kernel, so that no run's time contains it."""
    setting = Setting(0, 50, 1e-2, 0)
    shown = bar(2, "kernels")
    plain(setting, data, space(1e-2), shown=bar(50, disable=True))
    shown.update()
    run = inner.sgd(model(0), space(1e-2))
    Tuner(run, Glocal(), steps=50).fit(batches(data.train, 0), [data.val])
    shown.update()
    shown.close()


# -- what is shown -----------------------------------------------------------------------------------------------------


def _best(searched: list[Run]) -> Run:
    """The run that one would choose: by validation loss."""
    return min(searched, key=lambda r: r.val if np.isfinite(r.val) else np.inf)


def _print(setting: Setting, runs: dict[str, Run], searched: list[Run]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    step = np.median([r.seconds for r in (runs["fixed"], *searched)]) / setting.steps
    title = f"Digits, MLP 64-32-10, {setting.steps:,} steps from lr {setting.lr:g}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
    table.caption = "plain steps: processor time of the run over that of a step without tangents"
    table.add_column("run")
    for name in ("test loss", "accuracy", "plain steps", "lr", "momentum", "l2"):
        table.add_column(name, justify="right")
    rows = {name: (r, r.seconds / step) for name, r in runs.items()}
    rows["fixed"] = (runs["fixed"], setting.steps)
    if searched:
        table.caption += f"\n{len(searched)} random: the one that is best on the validation set"
        rows[f"{len(searched)} random"] = (_best(searched), len(searched) * setting.steps)
    for name, (r, cost) in rows.items():
        hyper = [f"{r.hyper['lr']:.2g}", f"{r.hyper['momentum']:.3g}", f"{r.hyper['l2']:.2g}"]
        note = "" if r.reason == "finished" else f" ({r.reason})"
        table.add_row(name + note, f"{r.test:.4f}", f"{100 * r.accuracy:.1f} %", f"{cost:,.0f}", *hyper)
    console = Console()
    console.print(table)
    console.print(_gain(setting, runs, searched, runs["glocal"].seconds / step), highlight=False, soft_wrap=True)


def _gain(setting: Setting, runs: dict[str, Run], searched: list[Run], cost: float) -> str:
    fixed, glocal = runs["fixed"], runs["glocal"]
    line = f"Glocal, from the same bad start: test loss {glocal.test:.3f} where the untuned run ends at {fixed.test:.3f}"
    if searched:
        share = len(searched) * setting.steps / cost
        line += f"; the best of {len(searched)} random runs has {_best(searched).test:.3f} at {share:.1f} times the cost"
    return line + "."


def _save(setting: Setting, runs: dict[str, Run], searched: list[Run], start: Space, out: Path) -> None:
    from koopman_hpo_adapters.plot import figure

    history = runs["glocal"].history
    assert history is not None
    curves = {name: r.curve for name, r in runs.items()}
    background = [r.curve for r in searched]
    drawn = figure(history, curves=curves, background=background, behind=f"{len(searched)} random")
    picture = out / "demo.png"
    drawn.savefig(picture, dpi=200)
    saved = history.save(out / "history.npz")
    print(f"figure:  {picture}\nhistory: {saved}  (koopman-hpo report {saved})")
