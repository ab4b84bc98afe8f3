"""Learn the weights of a training loss: one a class where classes are rare, one an example where labels are wrong.

Data: KMNIST's 10,000 test images pooled to 7 x 7 (--data: a folder with kmnist-test-imgs.npz and
kmnist-test-labels.npz).  Without it scikit-learn's digits, and the output says so; these are so easy that fifty clean ones
teach more than any weighting of the rest.  Two tasks, an MLP each:

- long tail: the last class has a fiftieth of the first one's training images; ten class weights follow the loss on a
  small balanced validation set.  Beside them the weights that practice knows, the inverse of the frequency.
- wrong labels: 40 % of the training labels are random; every training image has a weight of its own, as many tangents as
  images, and a small clean validation set says which to believe.

Each is trained unweighted, with local hypergradients, and glocally; and, for comparison, on the validation set alone.

    python examples/torch_reweighting.py [--data DIR] [--full] [--seed 0] [--out torch_reweighting.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from koopman_hpo_adapters.plot import BLUE, GREY, RED, STYLE
from koopman_hpo_adapters.progress import Progress
from koopman_hpo_adapters.torch import HyperOptimizer
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from koopman_hpo import Glocal, Local, Space, log, outer

BATCH, LR = 50, 0.1
STRATEGIES = {"local": Local(), "glocal": Glocal(snapshots=10)}


class Task(NamedTuple):
    """Training, validation and test sets, and what the weights belong to."""

    train: tuple  # X (n, f), y (n,)
    val: tuple
    test: tuple
    owner: torch.Tensor  # (n,) which weight each training example has
    count: int  # how many weights
    steps: int


def data(folder):
    """X (n, f) float32 about zero, y (n,), and what they are."""
    if folder is None:
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        what = "scikit-learn's digits (no KMNIST files were given)"
    else:
        files = [Path(folder) / f"kmnist-test-{kind}.npz" for kind in ("imgs", "labels")]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise SystemExit(f"torch_reweighting: {folder} lacks {', '.join(missing)}.")
        X, y = (np.load(file)["arr_0"] for file in files)
        X, what = X.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49), "KMNIST"
    X = ((X - X.mean()) / X.std()).astype(np.float32)
    return torch.from_numpy(X), torch.from_numpy(y.astype(np.int64)), what


def by_class(y, sizes, rng):
    """Places of the first so many examples of each class in a random order, and of all the others."""
    order = torch.from_numpy(rng.permutation(len(y)))
    chosen = torch.cat([order[y[order] == c][: int(n)] for c, n in enumerate(sizes)])
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[chosen] = False
    return chosen, rest.nonzero().ravel()


def held_out(X, y, places, rng):
    """A balanced validation set of five a class from these places; the others test."""
    val, test = by_class(y[places], [5] * 10, rng)
    return (X[places[val]], y[places[val]]), (X[places[test]], y[places[test]])


def long_tail(X, y, most, steps, seed):
    """A task with one weight a class, classes from `most` images down to a fiftieth of that."""
    rng = np.random.default_rng(seed)
    train, rest = by_class(y, most * 50 ** -(np.arange(10) / 9), rng)
    return Task((X[train], y[train]), *held_out(X, y, rest, rng), y[train], 10, steps)


def wrong_labels(X, y, n, steps, seed):
    """A task with one weight an example, and (n,) which of its labels are wrong."""
    rng = np.random.default_rng(seed)
    train, rest = by_class(y, [n // 10] * 10, rng)
    labels, random = y[train].clone(), torch.from_numpy(rng.random(len(train)) < 0.4)
    labels[random] = torch.from_numpy(rng.integers(0, 10, int(random.sum())))
    task = Task((X[train], labels), *held_out(X, y, rest, rng), torch.arange(len(train)), len(train), steps)
    return task, (labels != y[train]).numpy()


def train(task, strategy, seed, weight=None, label=""):
    """(test accuracy in %, mean over classes; weights (count,), mean one) of one run; strategy None holds `weight`."""
    torch.manual_seed(seed)
    (X, y), (X_val, y_val), (X_test, y_test) = task[:3]
    model = nn.Sequential(nn.Linear(X.shape[1], 32), nn.Tanh(), nn.Linear(32, 10))
    opt = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    w = torch.ones(task.count) if weight is None else weight
    if strategy is not None:
        opt = HyperOptimizer(
            opt,
            tune=Space(weight=log([1.0] * task.count, bounds=(1e-3, 1e3))),
            val_loss=lambda: cross_entropy(model(X_val), y_val),
            strategy=strategy,
            steps=task.steps,
            window=20,
            outer=outer.adam(0.2),
            callbacks=[Progress(label)],
        )
        w = opt.hyper["weight"]
    rng = np.random.default_rng(seed)
    for _ in range(task.steps):
        i = torch.from_numpy(rng.integers(0, len(y), BATCH))
        each = w[task.owner[i]]
        loss = (each * cross_entropy(model(X[i]), y[i], reduction="none")).sum() / each.sum()
        if strategy is None:
            opt.zero_grad()
            loss.backward()
            opt.step()
        else:
            opt.step(loss)
    with torch.no_grad():
        hit = model(X_test).argmax(1) == y_test
        w = w.detach().clone()
    return 100 * float(np.mean([hit[y_test == c].double().mean() for c in range(10)])), (w / w.mean()).numpy()


def compare(task, seed, label):
    """{run: (accuracy, weights)} of the runs on the validation set alone, unweighted, local and glocal."""
    alone = task._replace(train=task.val, owner=torch.zeros(len(task.val[1]), dtype=torch.int64), count=1)
    runs = {"validation set alone": train(alone, None, seed), "unweighted": train(task, None, seed)}
    return runs | {name: train(task, s, seed, label=f"{label}, {name}") for name, s in STRATEGIES.items()}


def describe(runs):
    """Accuracies, and what glocal gained."""
    found = {name: accuracy for name, (accuracy, _) in runs.items()}
    line = ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in found.items())
    over = {name: found["glocal"] - found[name] for name in ("unweighted", "local")}
    return f"{line}; glocal {over['unweighted']:+.1f} points over unweighted, {over['local']:+.1f} over local"


def picture(sizes, class_weights, weights, wrong):
    """Class weights over the classes' sizes, and the distribution of right and wrong labels' weights."""
    with rc_context(STYLE):
        fig = Figure(figsize=(9.2, 3.6), layout="constrained")
        left, right = fig.subplots(1, 2)
        inverse = (1 / sizes) / (1 / sizes).mean()
        left.plot(sizes, inverse, "--", color=GREY, label="inverse frequency")
        for (name, w), look in zip(class_weights.items(), ({"ms": 9, "mfc": "none"}, {"ms": 4.5}), strict=True):
            left.plot(sizes, w, "o", color=BLUE, label=name, **look)
        left.set(xscale="log", yscale="log", title="Long tail: class weights", xlabel="training images of the class")
        left.set_ylabel("weight (mean 1)")
        left.legend()
        low, high = weights.min(), weights.max()
        bins = np.geomspace(low / 1.01, high * 1.01, 30)
        for chosen, colour, name in ((~wrong, BLUE, "label right"), (wrong, RED, "label wrong")):
            right.hist(weights[chosen], bins, color=colour, alpha=0.6, label=f"{name} ({chosen.sum()})")
        right.set(xscale="log", title="Wrong labels: example weights, glocal", xlabel="weight (mean 1)", ylabel="images")
        right.legend()
        for ax in (left.xaxis, left.yaxis, right.xaxis):
            ax.set_major_formatter("{x:g}")
    return fig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with KMNIST's test set, .npz; default: scikit-learn's digits")
    parser.add_argument("--full", action="store_true", help="more steps and images: 500 example weights in place of 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="torch_reweighting.png", help="figure to write")
    args = parser.parse_args(argv)
    X, y, what = data(args.data)
    most, n, steps = (400, 500, (1000, 600)) if args.full else (100, 100, (200, 200))
    print(f"{what}; {steps[0]} and {steps[1]} steps of momentum SGD at lr {LR}; accuracy is the mean over classes")

    task = long_tail(X, y, most, steps[0], args.seed)
    sizes = np.bincount(task.train[1].numpy(), minlength=10)
    runs = compare(task, args.seed, "long tail")
    inverse, _ = train(task, None, args.seed, torch.tensor(1 / sizes, dtype=torch.float32))
    print(f"long tail ({sizes.max()} to {sizes.min()} images a class): {describe(runs)}; inverse frequency {inverse:.1f} %")

    noisy, wrong = wrong_labels(X, y, n, steps[1], args.seed)
    noisy_runs = compare(noisy, args.seed, "wrong labels")
    print(f"wrong labels ({wrong.sum()} of {len(wrong)}): {describe(noisy_runs)}")
    weights = noisy_runs["glocal"][1]
    right_first = (weights[~wrong][:, None] > weights[wrong]).mean()
    print(f"a right label weighs more than a wrong one in {100 * right_first:.0f} % of the pairs, glocal")

    learned = {name: runs[name][1] for name in STRATEGIES}
    picture(sizes, learned, weights, wrong).savefig(args.out, dpi=200)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
