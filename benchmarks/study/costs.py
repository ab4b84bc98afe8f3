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
    """A run at its start, its batches of 64, each another, and 500 validation examples; random data."""
    rng = np.random.default_rng(0)
    n = 64 * STEPS
    X, y = rng.normal(size=(n + 500, sizes[0])), rng.integers(0, 10, n + 500)
    run = inner.sgd(mlp(sizes), Space(lr=log(0.02), momentum=logit(0.9), weight_decay=log(1e-3)))
    return run, [(X[i : i + 64], y[i : i + 64]) for i in range(0, n, 64)], (X[n:], y[n:])


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Medians of calls that alternate: a window, then one estimate from it, as in the tuner: caches are the window's."""
    rows = []
    for sizes in SIZES:
        run, batches, val = window(sizes)
        took: dict[str, list[float]] = {"window": [], "age unknown": [], "age known": []}
        for _ in range(ROUNDS + 1):  # the first one warms up
            for name in ("age unknown", "age known"):
                run.forget(0)
                clock = time.perf_counter()
                _, H = run.run(run.space.phi0, batches, val)
                took["window"].append(time.perf_counter() - clock)
                age = (run.t - STEPS + 1, 1) if name == "age known" else None
                clock = time.perf_counter()
                koopman.extrapolate(H, 40, age=age)
                took[name].append(time.perf_counter() - clock)
        middle = {name: float(np.median(times[2:])) for name, times in took.items()}
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
