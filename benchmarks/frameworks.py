"""The cost of an exact hypergradient in torch and JAX, ours and its peers', beside plain training in the same framework.

    python benchmarks/frameworks.py [--quick] [--no-memory]

Digits MLP 64-128-10, batch 128, T = 200, and LeNet on digits enlarged to 28 x 28, batch 32, T = 10; float64, SGD with lr,
momentum and weight decay tuned (q = 3).  All methods take the same batches from the same start and must agree on the
hypergradient to 1e-10 before any is timed.  One thread on one core, interleaved in one process, medians of its CPU time.
Memory is the process's peak beyond where it stood before the run, less the same of plain training, each measured in a
process of its own (Linux only).  Peers that are not installed are left out, and named.  Writes results/frameworks.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import framework_peers as peers
import jax
import numpy as np
import torch
from forward import cpu_name, data, interleaved, on_one_thread
from framework_peers import METHODS

RESULTS = Path(__file__).parent / "results" / "frameworks.json"
FLOOR = 1 + 2 * len(peers.TUNED)  # plain steps: one, and two for each tangent of a gradient
HORIZONS = (200, 2000)  # whose memory is compared


def arrays(module):
    """Initial parameters (float64) of a torch module: uniform, within 1 / sqrt(inputs), from a seed."""
    rng, found, bound = np.random.default_rng(0), [], 1.0
    for p in module().parameters():
        bound = 1 / np.sqrt(np.prod(p.shape[1:])) if p.ndim > 1 else bound  # a bias has its weight's
        found.append(rng.uniform(-bound, bound, p.shape))
    return tuple(found)


def mlp(steps):
    batches, val = data(min(steps, 200))
    batches = [batches[t % len(batches)] for t in range(steps)]
    return peers.Case(peers.mlp_module, peers.mlp_forward, peers.mlp_logits, arrays(peers.mlp_module), batches, val)


def lenet(steps):
    batches, val = data(steps)
    grow = lambda X: np.pad(np.kron(X.reshape(-1, 1, 8, 8), np.ones((3, 3))), ((0, 0), (0, 0), (2, 2), (2, 2)))
    batches = [(grow(X[:32]), y[:32]) for X, y in batches]
    val = grow(val[0][:32]), val[1][:32]
    return peers.Case(peers.lenet_module, peers.lenet_forward, peers.lenet_logits, arrays(peers.lenet_module), batches, val)


def agreement(case, names):
    """{method: largest relative difference from reverse mode by hand}; ends the program above 1e-10."""
    reference = peers.torch_reverse(case)
    gap = lambda name: float(np.abs(METHODS[name].run(case) / reference - 1).max())
    gaps = {name: gap(name) for name in names if METHODS[name].kind != "plain"}
    wrong = {name: gap for name, gap in gaps.items() if not gap <= 1e-10}
    if wrong:
        raise SystemExit(
            f"frameworks.py: {wrong} differ from the hypergradient by reverse mode, expected 1e-10: {reference}."
        )
    return gaps


def timed(case, names, repeats):
    """{method: framework, kind, ms a step, ratio to the framework's fastest plain training, gap} of one model."""
    gaps, steps = agreement(case, names), len(case.batches)
    bind = lambda method: (lambda: method.run(case), steps)
    ms = interleaved({name: bind(METHODS[name]) for name in names}, repeats)
    plain = {}
    for name in names:
        framework, kind, *_ = METHODS[name]
        if kind == "plain":
            plain[framework] = min(ms[name], plain.get(framework, np.inf))
    rows = {}
    for name in names:
        framework, kind, *_ = METHODS[name]
        row = {"framework": framework, "kind": kind, "ms_per_step": ms[name], "ratio": ms[name] / plain[framework]}
        rows[name] = row | {"gap": gaps.get(name)}
    return rows


# -- memory ------------------------------------------------------------------------------------------------------------


def peak(name, steps):
    """MiB that a method's peak lies above where the process stood; the method has run once before, over a piece."""
    method = METHODS[name]
    method.run(mlp(min(steps, peers.PIECE)))
    case = mlp(steps)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    method.run(case)
    return (resident("VmHWM") - before) / 1024


def resident(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def memory(names):
    """{method: {T: extra MiB}}, beyond plain training in the same framework, in scans if the method is."""

    def measure(name, steps):
        command = [sys.executable, __file__, "--peak", name, str(steps)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    found = {name: {T: measure(name, T) for T in HORIZONS} for name in names}
    base = lambda name: f"plain, {name.split(', ')[1] if METHODS[name].framework == 'JAX' else 'torch'}"
    return {name: {T: found[name][T] - found[base(name)][T] for T in HORIZONS} for name in names}


# -- what is shown -----------------------------------------------------------------------------------------------------


def report(title, rows, extra=None):
    print(f"\n{title}")
    columns = "".join(f"{f'MiB T={T}':>12s}" for T in HORIZONS) if extra else f"{'/ floor':>10s}"
    print(f"{'':7s}{'':9s}{'':26s}{'ms / step':>10s}{'/ plain':>9s}{'gap':>10s}{columns}")
    for name, row in rows.items():
        start = f"{row['framework']:7s}{row['kind']:9s}{name:26s}{row['ms_per_step']:10.3f}{row['ratio']:9.2f}"
        gap = f"{row['gap']:10.0e}" if row["gap"] is not None else f"{'':10s}"
        end = "".join(f"{mib:12.1f}" for mib in extra[name].values()) if extra else f"{row['ratio'] / FLOOR:10.2f}"
        print(start + gap + end)


def fastest(rows, framework, ours, kind="forward"):
    """The lowest ratio to plain among a framework's methods of a kind, ours or the peers'."""
    fits = lambda name, row: (row["framework"], row["kind"], name.startswith("ours")) == (framework, kind, ours)
    return min(row["ratio"] for name, row in rows.items() if fits(name, row))


def verdicts(mlp_rows, lenet_rows):
    """What was asked for, each with what was found."""
    ratio = lambda a, b: mlp_rows[a]["ms_per_step"] / mlp_rows[b]["ms_per_step"]
    found = [
        ("MLP: ours in torch / plain", fastest(mlp_rows, "torch", True), 3.8),
        (
            "MLP: ours in torch / best forward peer",
            fastest(mlp_rows, "torch", True) / fastest(mlp_rows, "torch", False),
            1.0,
        ),
        ("MLP: ours in JAX / plain", fastest(mlp_rows, "JAX", True), 4.0),
        ("MLP: ours in JAX / by hand, both in a scan", ratio("ours, JAX scan", "by hand, JAX scan"), 1.0),
    ]
    for framework in ("torch", "JAX"):
        mine = fastest(lenet_rows, framework, True)
        found.append((f"LeNet: ours in {framework} / floor of {FLOOR} plain steps", mine / FLOOR, 1.25))
        found.append((f"LeNet: ours in {framework} / best forward peer", mine / fastest(lenet_rows, framework, False), 1.0))
    reverse = fastest(lenet_rows, "torch", False, "reverse")
    found.append(("LeNet: ours in torch / best reverse mode", fastest(lenet_rows, "torch", True) / reverse, None))
    return [{"what": what, "value": value, "bar": bar} for what, value, bar in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "STEPS"), help="print one method's peak memory and end")
    args = parser.parse_args()
    on_one_thread()
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1])))
        return
    absent = peers.missing()
    for name, advice in absent.items():
        print(f"{name} is not installed and left out: {advice}")
    names = [name for name in METHODS if name not in absent]
    repeats = 3 if args.quick else 15
    results = {"mlp": timed(mlp(200), names, repeats), "lenet": timed(lenet(10), names, max(2, repeats // 3))}
    extra = None if args.no_memory or not Path("/proc/self/clear_refs").exists() else memory(names)
    report("Digits MLP 64-128-10, batch 128, T = 200, q = 3", results["mlp"], extra)
    report(f"LeNet, batch 32, T = 10, q = 3, floor {FLOOR} plain steps", results["lenet"])
    checks = verdicts(results["mlp"], results["lenet"])
    print()
    for check in checks:
        print(f"{check['what']:48s}{check['value']:6.2f}" + (f"  (bar {check['bar']})" if check["bar"] else ""))
    record = results | {"peak_extra_mib": extra, "checks": checks, "date": date.today().isoformat()}
    record |= {"cpu": cpu_name(), "python": platform.python_version(), "versions": versions()}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def versions():
    found = {}
    for name in ("numpy", "numba", "torch", "jax", "higher", "torchopt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
