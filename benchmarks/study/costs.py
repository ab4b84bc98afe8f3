"""What the default estimate costs beside the window that it is made from."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import Space, inner, koopman, log, logit

from .page import table
from .settings import Settings

STEPS = 25  # the tuner's window, a snapshot a step
SIZES = ((64, 128, 10), (196, 64, 10), (784, 128, 10))
ROUNDS = 21


def window(sizes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """A run at its start, its batches of 64, and 500 validation examples; random data."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(564, sizes[0])), rng.integers(0, 10, 564)
    run = inner.sgd(mlp(sizes), Space(lr=log(0.02), momentum=logit(0.9), weight_decay=log(1e-3)))
    return run, [(X[:64], y[:64])] * STEPS, (X[64:], y[64:])


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Medians of calls that alternate: a window, then estimates from it, the tuner's own first, while caches are cold."""
    rows = []
    for sizes in SIZES:
        run, batches, val = window(sizes)
        took: dict[str, list[float]] = {"window": [], "age known": [], "age unknown": []}
        for _ in range(ROUNDS + 1):  # the first one warms up
            run.forget(0)
            clock = time.perf_counter()
            _, H = run.run(run.space.phi0, batches, val)
            took["window"].append(time.perf_counter() - clock)
            for name, age in (("age known", (run.t - STEPS + 1, 1)), ("age unknown", None)):
                clock = time.perf_counter()
                koopman.extrapolate(H, 40, age=age)
                took[name].append(time.perf_counter() - clock)
        middle = {name: float(np.median(times[1:])) for name, times in took.items()}
        rows.append({"sizes": sizes, "p": run.params.size} | middle)
    return rows


def online(record: dict[str, Any]) -> str:
    heads = ("network", "p", "window, ms", "aged, ms", "share", "age unknown, ms", "share")
    rows = []
    for r in record["results"]:
        cells = [f"{1e3 * r[k]:.2f}" for k in ("window", "age known", "age unknown")]
        shares = [f"{100 * r[k] / r['window']:.2f} %" for k in ("age known", "age unknown")]
        rows.append(("-".join(map(str, r["sizes"])), f"{r['p']:,}", cells[0], cells[1], shares[0], cells[2], shares[1]))
    return table(heads, rows)


BLOCKS = {"costs.online": online}
FIGURES: dict[str, Any] = {}
