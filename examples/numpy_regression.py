"""Tune lr, momentum and one L2 a layer of a regression network whose gradient is written by hand in NumPy.

Data: scikit-learn's diabetes set (442 patients, 10 features).  From the learning rate that it is given the network
learns next to nothing in time.  Prints what was gained over the untuned run and over local, and draws the run.

    python examples/numpy_regression.py [--full] [--lr 1e-5] [--out numpy_regression.png]
"""

from __future__ import annotations

import argparse

import numpy as np
from koopman_hpo_adapters.numpy import problem
from koopman_hpo_adapters.plot import figure
from koopman_hpo_adapters.progress import Progress
from sklearn.datasets import load_diabetes

from koopman_hpo import Glocal, Local, Space, Tuner, inner, log, logit

FEATURES, HIDDEN = 10, 32
FIRST = FEATURES * HIDDEN + HIDDEN  # parameters of the hidden layer; the output layer has HIDDEN + 1
SIZE = FIRST + HIDDEN + 1
BATCH = 64


def unpack(theta):
    """W1 (10, 32), b1 (32,), w2 (32,), b2 () of the flat theta (p,)."""
    W1 = theta[: FEATURES * HIDDEN].reshape(FEATURES, HIDDEN)
    return W1, theta[FEATURES * HIDDEN : FIRST], theta[FIRST:-1], theta[-1]


def squared_error(theta, batch):
    """Half the mean squared error, and its gradient (p,), by hand."""
    X, y = batch
    W1, b1, w2, b2 = unpack(theta)
    A = np.tanh(X @ W1 + b1)  # (n, 32)
    r = (A @ w2 + b2 - y) / len(y)  # (n,)
    D = np.outer(r, w2) * (1 - A * A)  # (n, 32) back through tanh
    g = np.concatenate([(X.T @ D).ravel(), D.sum(axis=0), A.T @ r, [r.sum()]])
    return len(y) * (r @ r) / 2, g


def grad(theta, hyper, batch):
    """The training loss: squared error and an L2 penalty with one strength a layer."""
    loss, g = squared_error(theta, batch)
    strength = np.repeat(hyper["l2"], [FIRST, SIZE - FIRST])
    return loss + (strength * theta) @ theta / 2, g + strength * theta


def outer(theta, hyper, batch):
    """The validation loss knows no penalty: no direct derivative by l2."""
    return *squared_error(theta, batch), {}


def data(seed):
    """Training (220), validation (111) and test (111) sets, inputs and target scaled by the training set."""
    X, y = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(seed).permutation(len(y))
    train, val, test = np.split(order, [220, 331])
    X = (X - X[train].mean(axis=0)) / X[train].std(axis=0)
    y = (y - y[train].mean()) / y[train].std()
    return [(X[i], y[i]) for i in (train, val, test)]


def run(strategy, steps, lr, seed, label):
    """(test loss, result) of one run; strategy None holds every hyperparameter where it starts."""
    train, val, test = data(seed)
    rng = np.random.default_rng(seed)
    scale = np.repeat([FEATURES**-0.5, 0, HIDDEN**-0.5, 0], [FEATURES * HIDDEN, HIDDEN, HIDDEN, 1])
    model = problem(scale * rng.normal(size=SIZE), grad=grad, outer=outer)
    space = Space(lr=log(lr), momentum=logit(0.9), l2=log([1e-3, 1e-3]))
    training = inner.sgd(model, space)

    def batch(t):
        chosen = np.random.default_rng((seed, t)).choice(len(train[1]), BATCH, replace=False)
        return train[0][chosen], train[1][chosen]

    if strategy is None:
        for t in range(steps):
            training.step(space.phi0, batch(t), tangents=False)
        return outer(training.params, {}, test)[0], None
    result = Tuner(training, strategy, steps=steps, callbacks=[Progress(label)]).fit(batch, [val])
    return outer(result.params, {}, test)[0], result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="2,000 steps and 3 seeds in place of 400 and 1")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate to start from")
    parser.add_argument("--out", default="numpy_regression.png", help="figure to write")
    args = parser.parse_args(argv)
    steps, seeds = (2000, range(3)) if args.full else (400, range(1))
    losses = {"untuned": [], "local": [], "glocal": []}
    for seed in seeds:
        for name, strategy in (("untuned", None), ("local", Local()), ("glocal", Glocal())):
            loss, result = run(strategy, steps, args.lr, seed, name)
            losses[name].append(loss)
    figure(result.history).savefig(args.out, dpi=200)
    for name, found in losses.items():
        explained = 100 * (1 - 2 * np.mean(found))  # the target has variance 1
        print(f"{name:8s} test loss {np.mean(found):.4f}  (about {explained:.0f} % of the variance explained)")
    untuned, local, glocal = (np.mean(found) for found in losses.values())
    print(f"gained by glocal: {untuned - glocal:+.4f} over the untuned run, {local - glocal:+.4f} over local")
    print(f"it ended at {', '.join(f'{name} {np.round(x, 5)}' for name, x in result.hyper.items())}; figure: {args.out}")


if __name__ == "__main__":
    main()
