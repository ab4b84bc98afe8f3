"""Tune learning rate, momentum and L2 of a network on digits in JAX, the optimizer being optax's.

Data: MNIST by its two idx files, images and labels, plain or gzipped: the last 2,000 validate and test.  Without them,
scikit-learn's digits (1,797 images of 8 x 8), and the output says so.  Trains three times from the learning rate given:
untuned, with local hypergradients, and glocally.  Prints what was gained and draws the glocal run.

    python examples/jax_mnist.py [IMAGES LABELS] [--full] [--lr 1e-4] [--optimizer sgd | adam] [--out jax_mnist.png]
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from koopman_hpo_adapters.jax import inner, train_step
from koopman_hpo_adapters.plot import figure
from koopman_hpo_adapters.progress import Progress

from koopman_hpo import Glocal, Local, Space, Tuner, log, logit

BATCH, HIDDEN = 128, 128


def idx(path):
    """The array of one idx file, plain or gzipped."""
    raw = Path(path).read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"jax_mnist: {path} is not an idx file of bytes, such as train-images-idx3-ubyte.")
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def data(files, size):
    """Training, validation and test sets (X (n, f) float32 in [0, 1], y (n,)), and what they are."""
    if files:
        images, labels = map(idx, files)
        X, y = images.reshape(len(images), -1) / 255, labels
        what, held = "MNIST", 1000
    else:
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        X, what, held = X / 16, "scikit-learn's digits (no MNIST files were given)", 300
    X, y = X.astype(np.float32), y.astype(np.int32)
    parts = [slice(min(size, len(y) - 2 * held)), slice(-2 * held, -held), slice(-held, None)]
    sets = [(X[part], y[part]) for part in parts]
    sizes = ", ".join(f"{len(y)} {name}" for (_, y), name in zip(sets, ("training", "validation", "test"), strict=True))
    return sets, f"{what}: {sizes} images"


def logits(params, X):
    return jnp.tanh(X @ params["W"] + params["b"]) @ params["V"] + params["c"]


def cross_entropy(params, batch):
    X, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, X), y).mean()


def train_loss(params, hyper, batch):
    return cross_entropy(params, batch) + 0.5 * hyper["l2"] * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))


def val_loss(state, hyper, batch):
    return cross_entropy(state.params, batch)


OPTIMIZERS = {
    "sgd": lambda hyper: optax.sgd(hyper["lr"], hyper["momentum"]),
    "adam": lambda hyper: optax.adam(hyper["lr"], b1=hyper["momentum"]),
}
STEPS = {name: train_step(train_loss, optimizer) for name, optimizer in OPTIMIZERS.items()}


def start(optimizer, lr, features, seed):
    """A run at its start."""
    space = Space(lr=log(lr, bounds=(1e-7, 10)), momentum=logit(0.9), l2=log(1e-5))
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "W": jax.random.normal(first, (features, HIDDEN)) / np.sqrt(features),
        "b": jnp.zeros(HIDDEN),
        "V": jax.random.normal(second, (HIDDEN, 10)) / np.sqrt(HIDDEN),
        "c": jnp.zeros(10),
    }
    step = STEPS[optimizer]
    return inner(step, val_loss, step.init(params, space), space, params=lambda state: state.params)


def train(strategy, steps, optimizer, lr, sets, label):
    """(test accuracy in %, result) of one run; strategy None holds every hyperparameter where it starts."""
    (X, y), val, test = sets
    run = start(optimizer, lr, X.shape[1], seed=0)

    def batch(t):
        i = np.random.default_rng(t).choice(len(y), BATCH, replace=False)
        return X[i], y[i]

    if strategy is None:
        for t in range(steps):
            run.step(run.space.phi0, batch(t), tangents=False)
        params, result = run.params, None
    else:
        result = Tuner(run, strategy, steps=steps, callbacks=[Progress(label)]).fit(batch, [val])
        params = result.params
    hits = logits(run.unravel(params), test[0]).argmax(axis=1) == test[1]
    return 100 * float(hits.mean()), result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="MNIST's images and labels, idx files; default: scikit-learn's digits")
    parser.add_argument("--full", action="store_true", help="2,000 steps and 8,000 images in place of 300 and 2,000")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate to start from")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="sgd")
    parser.add_argument("--out", default="jax_mnist.png", help="figure to write")
    args = parser.parse_args(argv)
    if len(args.files) not in (0, 2):
        parser.error("give two files, images and labels, or none")
    steps, size = (2000, 8000) if args.full else (300, 2000)
    sets, what = data(args.files, size)
    print(f"{what}; {args.optimizer} from lr {args.lr:g}, {steps} steps")
    accuracy = {}
    for name, strategy in (("untuned", None), ("local", Local()), ("glocal", Glocal())):
        accuracy[name], result = train(strategy, steps, args.optimizer, args.lr, sets, name)
        print(f"{name:8s} test accuracy {accuracy[name]:.2f} %")
    figure(result.history).savefig(args.out, dpi=200)
    over = {name: accuracy["glocal"] - accuracy[name] for name in ("untuned", "local")}
    print(f"gained by glocal: {over['untuned']:+.2f} points over the untuned run, {over['local']:+.2f} over local")
    print(f"it ended at {', '.join(f'{name} {x:.3g}' for name, x in result.hyper.items())}; figure: {args.out}")


if __name__ == "__main__":
    main()
