"""Online tuning with the defaults: a small KMNIST classifier from learning rates over five decades.

KMNIST pooled to 7x7, MLP 49-32-10, momentum SGD, q = 3 (lr, momentum, L2), 2,000 steps.  Two settings: clean (2,000
training images, batch 64) and noisy (1,000 images, 30 % of the labels random, batch 32).  Beside the strategies: the same
run untuned, and the best of random full runs chosen by validation loss.

    python benchmarks/online.py --data DIR [--seeds 3] [--random 20] [--out benchmarks/results/online.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import Glocal, Local, Space, Tuner, inner, log, logit

STARTS = (1e-4, 1e-2, 1.0, 10.0)
STEPS = 2000
SETTINGS = {"clean": (2000, 64, 0.0), "noisy": (1000, 32, 0.3)}


def load(folder):
    """X (10000, 49) in [0, 1], pooled by 4, and y (10000,)."""
    files = [Path(folder) / f"kmnist-test-{k}.npz" for k in ("imgs", "labels")]
    missing = [str(f) for f in files if not f.exists()]
    if missing:
        sys.exit(f"online.py: KMNIST is not there: {missing}. Pass its folder with --data.")
    X, y = (np.load(f)["arr_0"] for f in files)
    return X.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49) / 255.0, y.astype(int)


def split(X, y, setting, seed):
    """Training, validation (500) and test (5,000) sets; noisy labels in training only."""
    n, _, noise = SETTINGS[setting]
    order = np.random.default_rng(seed).permutation(len(X))
    rng = np.random.default_rng(1000 + seed)
    train, val, test = order[:n], order[2000:2500], order[5000:]
    labels = y[train].copy()
    wrong = rng.random(n) < noise
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    mean, std = X[train].mean(), X[train].std()
    scale = lambda i: (X[i] - mean) / std
    return (scale(train), labels), (scale(val), y[val]), (scale(test), y[test])


def batches(train, size, seed):
    """A function of the step: the same step gives the same batch, whoever asks."""
    X, y = train
    n = len(X)

    def batch(t):
        epoch, k = divmod(t, n // size)
        order = np.random.default_rng((seed, epoch)).permutation(n)[k * size : (k + 1) * size]
        return X[order], y[order]

    return batch


def run(setting, seed, data, lr, strategy, momentum=0.9, l2=1e-4):
    """(test loss, wall seconds, rollbacks, final hyperparameters) of one run; strategy None is untuned."""
    train, val, test = data
    model = mlp((49, 32, 10), seed=seed)
    space = Space(lr=log(lr), momentum=logit(momentum), l2=log(l2))
    r = inner.sgd(model, space)
    batch = batches(train, SETTINGS[setting][1], seed)
    start = time.perf_counter()
    events, hyper = 0, {"lr": lr, "momentum": momentum, "l2": l2}
    if strategy is None:
        with np.errstate(all="ignore"):
            for t in range(STEPS):
                r.step(space.phi0, batch(t), tangents=False)
        params = r.params
    else:
        result = Tuner(r, strategy, steps=STEPS).fit(batch, [val])
        params, hyper = result.params, result.hyper
        events = int((result.history.event != "").sum())
    wall = time.perf_counter() - start
    with np.errstate(all="ignore"):
        value = lambda d: float(model.outer(params, {}, d)[0])
        return value(test), value(val), wall, events, hyper


def random_search(setting, seed, data, n):
    """Test loss of the run with the best validation loss among n random full runs."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        lr, momentum, l2 = 10 ** rng.uniform(-4, 1), rng.uniform(0, 0.99), 10 ** rng.uniform(-6, -1)
        test, val, *_ = run(setting, seed, data, lr, None, momentum, l2)
        found.append((val if np.isfinite(val) else np.inf, test))
    return min(found)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the KMNIST test set (.npz)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    X, y = load(args.data)
    table = {}
    for setting in args.settings:
        for seed in range(args.seeds):
            data = split(X, y, setting, seed)
            for name, strategy in (("glocal", Glocal()), ("local", Local()), ("untuned", None)):
                for lr in STARTS:
                    test, _, wall, events, hyper = run(setting, seed, data, lr, strategy)
                    table.setdefault(setting, {}).setdefault(name, []).append(test)
                    end = " ".join(f"{k}={v:.3g}" for k, v in hyper.items())
                    print(f"{setting} seed {seed} {name:8s} lr {lr:g}: {test:.3f}  {wall:.1f} s  {events} events  {end}")
            if args.random:
                best = random_search(setting, seed, data, args.random)
                table[setting].setdefault(f"best of {args.random} random", []).append(best)
    print(f"\n{'setting':8s} {'strategy':20s} {'mean':>7s} {'worst':>7s}")
    for setting, rows in table.items():
        for name, values in rows.items():
            print(f"{setting:8s} {name:20s} {np.mean(values):7.3f} {np.max(values):7.3f}")
    if args.out:
        machine = {"date": time.strftime("%Y-%m-%d"), "cpu": platform.machine(), "numpy": np.__version__}
        Path(args.out).write_text(json.dumps({"machine": machine, "test_loss": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
