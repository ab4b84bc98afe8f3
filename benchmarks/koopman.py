"""Koopman fit and forecast against PyDMD and against one read of the trajectory.

    python benchmarks/koopman.py [--quick] [--output benchmarks/results/koopman.json]

One thread, float64, the contestants interleaved in one process, medians, ratios of medians.  Trajectories are
planted: a constant, a decaying pair and two real modes, white noise of 1 %.  PyDMD is `DMD(svd_rank=r)`, through
`hankel_preprocessing` for d > 1, and its forecast ten snapshots ahead; PyDMD must be installed for its columns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np

from koopman_hpo import koopman

SIZES = ((20, 3, 5), (50, 10, 10), (100, 1000, 5), (50, 100_000, 1))
RANK, STEPS = 4, 10
BARS = {"given": {(20, 3, 5): 0.1, (100, 1000, 5): 0.01}, "recorded": {(50, 100_000, 1): 1.5}}


def planted(m: int, q: int, seed: int = 0) -> np.ndarray:
    """(m, q): constant, decaying pair, two real modes, 1 % white noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(m)
    pair = np.exp((-2 / m + 6j / m) * t)
    shapes = np.stack([np.ones(m), pair.real, pair.imag, np.exp(-3 * t / m), np.exp(-8 * t / m)])
    return shapes.T @ rng.normal(size=(5, q)) + 0.01 * rng.normal(size=(m, q))


def pydmd_forecast(H: np.ndarray, d: int) -> np.ndarray:
    """PyDMD's fit and forecast: it materialises the reconstruction up to the horizon."""
    from pydmd import DMD
    from pydmd.preprocessing import hankel_preprocessing

    model = DMD(svd_rank=RANK)
    model = hankel_preprocessing(model, d=d) if d > 1 else model
    model.fit(H.T)
    model.dmd_time["tend"] += STEPS
    return model.reconstructed_data[:, -1].real


def recorded(H: np.ndarray) -> koopman.Recorder:
    recorder = koopman.Recorder(H.shape[1], len(H))
    for h in H:
        recorder.append(h)
    return recorder


def contestants(H: np.ndarray, d: int, with_pydmd: bool) -> dict[str, Callable[[], object]]:
    recorder = recorded(H)
    out: dict[str, Callable[[], object]] = {
        "read": H.sum,
        "given": lambda: koopman.fit(H, delays=d, rank=RANK).forecast(STEPS),
        "recorded": lambda: koopman.fit(recorder, delays=d, rank=RANK).forecast(STEPS),
        "automatic": lambda: koopman.fit(H).forecast(STEPS),
        "extrapolate": lambda: koopman.extrapolate(H, STEPS),
    }
    if with_pydmd:
        out["pydmd"] = lambda: pydmd_forecast(H, d)
    return out


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; every round makes each call, once untimed, fast ones several times in a row."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = int(np.clip(0.002 / (time.perf_counter() - start), 1, 50))
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # each with warm caches, whoever came before
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def measure(quick: bool) -> list[dict[str, object]]:
    try:
        with_pydmd = bool(importlib.metadata.version("pydmd"))
    except importlib.metadata.PackageNotFoundError:
        with_pydmd = False
    rows = []
    for m, q, d in SIZES:
        rounds = (5 if q > 100 else 15) if quick else (15 if q > 100 else 60)
        rows.append({"tau": m, "q": q, "d": d, "ms": interleaved(contestants(planted(m, q), d, with_pydmd), rounds)})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'(tau, q, d)':>18} {'call':>12} {'ms':>10} {'/ PyDMD':>9} {'/ read':>9}  bar"]
    for row in rows:
        ms, size = row["ms"], (row["tau"], row["q"], row["d"])
        for name, value in ms.items():
            by_pydmd = f"{value / ms['pydmd']:9.4f}" if "pydmd" in ms else f"{'-':>9}"
            bar = BARS.get(name, {}).get(size, 1.0 if name == "automatic" else "")
            lines.append(f"{size!s:>18} {name:>12} {value:10.4f} {by_pydmd} {value / ms['read']:9.2f}  {bar}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    known = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {n: importlib.metadata.version(n) for n in ("numpy", "numba", "scipy", "pydmd") if n in known}


def cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def on_one_thread() -> None:
    """Start anew with one thread for every library: they read it when they are loaded."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    one["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if not os.environ.items() >= one.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | one)


def main() -> None:
    on_one_thread()
    parser = argparse.ArgumentParser(description="Koopman fit and forecast against PyDMD and one read.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "koopman.json")
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyDMD warns about condition numbers
        rows = measure(arguments.quick)
    print(table(rows))
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "python": platform.python_version(),
        "versions": versions(),
        "quick": arguments.quick,
        "rank": RANK,
        "steps": STEPS,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
