"""The model-based operator against the exact hypergradient at the horizon, affine DMD, and the window's last value.

    python benchmarks/krylov.py [--groups full mini noisy adam kmnist cnn] [--orders N] [--add] [--data DIR] [--output FILE]
        [--image FILE]

A window is 50 inner steps after 0, 100 or 400 of plain training, its tangents begun anew; the horizon is step 1,000; the
truth is the same run's hypergradient there.  Digits: softmax regression and an MLP 64-32-10, 800 training and 500
validation images, three learning rates, three seeds.  Groups: full batch; batches of 32, twelve seeds, for there chance has
its say; the same with 20 % random labels; Adam, full batch and batches of 32; KMNIST pooled to 14x14, MLP 196-64-10, in
batches of 64; MNIST likewise, a LeNet in JAX, batches of 50.

The truth of mini-batches is that of one order of the batches, which no forecast knows: with --orders N, "expected" is the
mean of the exact hypergradients of N other orders, from the window's end on.

Errors are norms relative to the truth's; "constant" is the control, one direction for all windows of a group, made from the
true ones of its other runs.  One thread; cost is the median of calls that alternate with the window's own 50
steps, tangents and hypergradients included, divided by the median of those.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
from koopman import cpu, on_one_thread, versions
from study.problems import NEEDS_DATA, Case, Started, feed, start

from koopman_hpo import koopman
from koopman_hpo.krylov import estimate

WINDOW, HORIZON, STARTS, SEEDS = 50, 1000, (0, 100, 400), (0, 1, 2)
MANY = (*SEEDS, *range(9, 18))  # for batches; what the estimate does about their noise was chosen on the six between
GROUPS = ("full", "mini", "noisy", "adam", "kmnist", "cnn")
ROUNDS = 3
OTHERS = 10**6  # seed of the first of the other orders


def plan(group: str) -> list[Case]:
    """The runs of a group."""
    if group == "kmnist":
        return [Case("kmnist", lr, seed, 64) for lr in (0.003, 0.02) for seed in (0, 1)]
    if group == "cnn":
        return [Case("cnn", lr, seed, 50) for lr in (0.003, 0.02) for seed in (0, 1)]
    if group == "adam":
        rates = (3e-4, 1e-3, 3e-3)
        return [Case("mlp", r, s, size, optimizer="adam") for size in (None, 32) for r in rates for s in SEEDS[:2]]
    size, noise, seeds = {"full": (None, 0.0, SEEDS), "mini": (32, 0.0, MANY), "noisy": (32, 0.2, MANY)}[group]
    return [Case(m, lr, s, size, noise) for m in ("softmax", "mlp") for lr in (0.003, 0.02, 0.1) for s in seeds]


def windows(
    group: str, case: Case, folder: pathlib.Path | None, rounds: int = ROUNDS, orders: int = 0
) -> list[dict[str, Any]]:
    """Each window's truth, its estimates, and their cost."""
    return [{"group": group} | one(case, begun, start(case, folder), rounds, orders) for begun in STARTS]


def one(case: Case, begun: int, s: Started, rounds: int, orders: int) -> dict[str, Any]:
    r, batch = s.run, s.batch
    phi, ahead = r.space.phi0, HORIZON - WINDOW - begun
    for t in range(begun):
        r.step(phi, batch(t), tangents=False)
    before, steps = r.snapshot(), [batch(t) for t in range(begun, begun + WINDOW)]
    noise: dict[str, Any] = {}
    if s.epoch is not None:
        noise = {"batches": s.epoch, "stages": 6} | ({"noise": "epoch"} if case.optimizer == "sgd" else {})
    took: dict[str, list[float]] = {"window": [], "krylov": []}
    for _ in range(rounds):
        r.restore(before)
        clock = time.perf_counter()
        _, H = r.run(phi, steps, s.val)
        took["window"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        found = estimate(r, s.train, s.val, ahead, **noise)
        took["krylov"].append(time.perf_counter() - clock)
    plain = estimate(r, s.train, s.val, ahead, stages=6) if "noise" in noise else found
    here = r.snapshot()
    others = [feed(s.train, case.size, OTHERS + k) for k in range(orders if case.size is not None else 0)]
    true, *every = (end(r, here, order, begun, s) for order in (batch, *others))
    values = {
        "true": true,
        "krylov": found.estimate,
        "plain": plain.estimate,
        "aged": koopman.extrapolate(H, ahead, age=(begun + 1, 1)).value,
        "affine": koopman.extrapolate(H, ahead, method="affine", gate=np.inf).value,
        "last": H[-1],
    } | ({"expected": np.mean(every, axis=0)} if every else {})
    return (
        asdict(case)
        | {name: value.tolist() for name, value in values.items()}
        | {
            "begun": begun,
            "accepted": found.accepted,
            "deviation": found.deviation,
            "noise_share": found.noise_share,
            "stages": len(found.stages),
            "hvps": found.hvps,
            "cost": float(np.median(took["krylov"]) / np.median(took["window"])),
        }
    )


def end(run: Any, here: dict[str, Any], batch: Any, begun: int, s: Started) -> np.ndarray:
    """(q,) the exact hypergradient at the horizon, from a window's end, with batches in some order."""
    run.restore(here)
    for t in range(begun + WINDOW, HORIZON):
        run.step(run.space.phi0, batch(t))
    return run.hypergradient(s.val).grad


METHODS = ("krylov", "plain", "aged", "affine", "last")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and shares over windows."""
    true = np.array([row["true"] for row in rows])
    size = np.linalg.norm(true, axis=1)
    error = {m: np.linalg.norm(np.array([row[m] for row in rows]) - true, axis=1) / size for m in METHODS}
    cosine = lambda m: np.array([np.dot(row[m], row["true"]) for row in rows]) / size
    taken = np.array([row["accepted"] for row in rows])
    doubt = np.array([row["deviation"] for row in rows])
    share = lambda x: float(np.mean(x)) if np.size(x) else None
    known = {} if "expected" not in rows[0] else against_expected(rows, true)
    middle = lambda x: float(np.median(x)) if len(x) else None
    return {
        "windows": len(rows),
        "error": {m: middle(e) for m, e in error.items()},
        "sign": {m: share(np.sign([row[m] for row in rows]) == np.sign(true)) for m in METHODS}
        | {"constant": constant(rows)},
        "wins_against_affine": share(error["krylov"] < error["affine"]),
        "wins_against_last": share(error["krylov"] < error["last"]),
        "accepted": share(taken),
        "error_accepted": middle(error["krylov"][taken]),
        "error_accepted_last": middle(error["last"][taken]),
        "sign_accepted": share(np.sign(np.array([row["krylov"] for row in rows])[taken]) == np.sign(true[taken])),
        "backwards_accepted": int(np.sum(cosine("krylov")[taken] <= 0)),
        "covered_once": share(error["krylov"] < doubt),
        "covered_twice": share(error["krylov"] < 2 * doubt),
        "cost_in_windows": middle([row["cost"] for row in rows]),
        "hvps": middle([row["hvps"] for row in rows]),
    } | known


def against_expected(rows: list[dict[str, Any]], true: np.ndarray) -> dict[str, Any]:
    """How far the mean over other orders of the batches is from the truth, and methods from that mean."""
    mean = np.array([row["expected"] for row in rows])
    off = lambda x, y: float(np.median(np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)))
    same = lambda x, y: float(np.mean(np.sign(x) == np.sign(y)))
    method = {m: np.array([row[m] for row in rows]) for m in ("krylov", "last")}
    return {
        "expected": {"error": off(mean, true), "sign": same(mean, true)},
        "error_of_expected": {m: off(x, mean) for m, x in method.items()},
        "sign_of_expected": {m: same(x, mean) for m, x in method.items()},
    }


def constant(rows: list[dict[str, Any]]) -> float | None:
    """The control: share of signs that one direction for all gets right, the mean of the true ones of the other runs."""
    run = lambda row: (row["group"], row["problem"], row["lr"], row["seed"], row["size"])
    unit = np.array([row["true"] for row in rows])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    right = []
    for row, true in zip(rows, unit, strict=True):
        others = unit[[run(r) != run(row) for r in rows]]
        if len(others):
            right.append(np.sign(others.mean(axis=0)) == np.sign(true))
    return float(np.mean(right)) if right else None


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summaries by group, and by model, batch and learning rate within each."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        batch = "full batch" if row["size"] is None else f"batch {row['size']}"
        group = f"{row['group']}, {batch}" if row["group"] == "adam" else row["group"]
        for name in (
            *(["mini and noisy"] if group in ("mini", "noisy") else []),
            group,
            f"{group}: {row['problem']}",
            f"{group}: lr {row['lr']:g}",
            f"{group}: begun at {row['begun']}",
        ):
            parts.setdefault(name, []).append(row)
    return {name: summary(part) for name, part in sorted(parts.items())}


def show(found: dict[str, dict[str, Any]]) -> None:
    heads = ("krylov", "plain", "affine", "last", "sign", "constant", "wins", "taken", "error", "2x", "cost")
    print(f"{'':26} {'n':>4} " + " ".join(f"{h:>8}" for h in heads))
    for name, s in found.items():
        e = s["error"]
        accepted = np.nan if s["error_accepted"] is None else s["error_accepted"]
        print(
            f"{name:26} {s['windows']:4} {e['krylov']:8.4f} {e['plain']:8.4f} {e['affine']:8.3f} {e['last']:8.3f} "
            f"{s['sign']['krylov']:8.2f} {s['sign']['constant'] or np.nan:8.2f} {s['wins_against_affine']:8.2f} "
            f"{s['accepted']:8.2f} {accepted:8.4f} {s['covered_twice']:8.2f} {s['cost_in_windows']:8.2f}"
        )
    if any("expected" in s for s in found.values()):
        heads = " ".join(f"{h:>8}" for h in ("krylov", "last", "sign", "last"))
        print(f"\n{'expected from other orders':36} {'error':>8} {'sign':>8} {'off it:':>13}" + heads)
    for name, s in found.items():
        if "expected" in s:
            e, of, sign = s["expected"], s["error_of_expected"], s["sign_of_expected"]
            numbers = (of["krylov"], of["last"], sign["krylov"], sign["last"])
            print(f"{name:36} {e['error']:8.4f} {e['sign']:8.2f} {'':13}" + " ".join(f"{x:8.3f}" for x in numbers))


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Predicted against true d loss / d log lr at the horizon."""
    from koopman_hpo_adapters.plot import BLUE, GREY, ORANGE, STYLE
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=(9.2, 3.6), layout="constrained")
        for ax, group in zip(fig.subplots(1, 2), ("full", "mini"), strict=True):
            part = [row for row in rows if row["group"] == group]
            ax.axline((0, 0), slope=1, color=GREY, lw=0.8)
            dots = lambda method, rows, label, ax=ax, **look: ax.plot(
                [r["true"][0] for r in rows], [r[method][0] for r in rows], "o", ms=4.5, ls="", label=label, **look
            )
            dots("last", part, "last value", color=ORANGE, mec="white", mew=0.5)
            dots("krylov", [r for r in part if r["accepted"]], "krylov", color=BLUE, mec="white", mew=0.5)
            dots("krylov", [r for r in part if not r["accepted"]], "krylov, not accepted", color="none", mec=BLUE, mew=0.9)
            ax.set_xscale("symlog", linthresh=1e-3)
            ax.set_yscale("symlog", linthresh=1e-3)
            ax.set(xlabel="true, at step 1,000", title={"full": "full batch", "mini": "batches of 32"}[group])
        fig.axes[0].set_ylabel("∂ validation loss / ∂ log lr, predicted")
        fig.axes[0].legend(loc="upper left")
        fig.savefig(path, dpi=200)


def main() -> None:
    on_one_thread()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).parent
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[g for g in GROUPS if g not in NEEDS_DATA])
    parser.add_argument("--data", type=pathlib.Path, help="folder with the test sets of KMNIST (.npz) and MNIST (.gz)")
    parser.add_argument("--output", type=pathlib.Path, default=here / "results" / "krylov.json")
    parser.add_argument("--image", type=pathlib.Path, help="where to draw the figure of docs/krylov.md")
    parser.add_argument("--add", action="store_true", help="keep what the output has of other groups")
    parser.add_argument("--seeds", type=int, default=len(MANY), help="at most so many, for a quick look")
    parser.add_argument("--orders", type=int, default=0, help="other orders of the batches, for what can be expected")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each measurement of the cost")
    arguments = parser.parse_args()
    if arguments.add and not arguments.output.is_file():
        parser.error(f"--add needs {arguments.output}, to keep what it has: leave it out the first time")
    if arguments.data is None and NEEDS_DATA & set(arguments.groups):
        parser.error(f"{' and '.join(sorted(NEEDS_DATA))} need --data")
    rows: list[dict[str, Any]] = []
    if arguments.add:
        kept = json.loads(arguments.output.read_text())["rows"]
        rows += [row for row in kept if row["group"] not in arguments.groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in arguments.groups:
            for run in plan(group):
                if run.seed in MANY[: arguments.seeds]:
                    rows += windows(group, run, arguments.data, arguments.rounds, arguments.orders)
    found = table(rows)
    show(found)
    record = {"cpu": cpu(), "versions": versions(), "window": WINDOW, "horizon": HORIZON, "table": found, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record) + "\n")
    if arguments.image:
        draw(rows, arguments.image)


if __name__ == "__main__":
    main()
