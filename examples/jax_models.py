"""Tune a Flax NNX or an Equinox model as it is, with optax, in JAX: learning rate, momentum, L2 and label smoothing.

Data: scikit-learn's digits (1,797 images of 8 x 8).  Trains three times from the learning rate given: untuned, with local
hypergradients, and glocally.  Prints what was gained and draws the glocal run.

    python examples/jax_models.py [equinox | nnx] [--full] [--lr 1e-3] [--out jax_models.png]
"""

from __future__ import annotations

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from koopman_hpo_adapters.jax import inner, train_step
from koopman_hpo_adapters.plot import figure
from koopman_hpo_adapters.progress import Progress
from sklearn.datasets import load_digits

from koopman_hpo import Glocal, Local, Space, Tuner, log, logit

BATCH, WIDTH, CLASSES, KEEP = 64, 64, 10, 0.8


# -- two models: each function gives what is trained, and its logits (model, X, key) with dropout where a key is given -----


def equinox_model(features):
    """The model itself is the pytree; its activation function is a leaf that stays as it is."""

    def logits(model, X, key):
        first, second = model.layers
        hidden = model.activation(jax.vmap(first)(X))
        return jax.vmap(second)(dropped(hidden, key))

    return eqx.nn.MLP(features, CLASSES, WIDTH, 1, activation=jnp.tanh, key=jax.random.key(0)), logits


class Network(nnx.Module):
    def __init__(self, features, rngs):
        self.first, self.norm = nnx.Linear(features, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, X, key):
        return self.second(dropped(nnx.relu(self.norm(self.first(X))), key))


def nnx_model(features):
    """The model is split: its parameters are trained, its graph is a constant of the loss."""
    graph, params = nnx.split(Network(features, nnx.Rngs(0)))
    return params, lambda params, X, key: nnx.merge(graph, params)(X, key)


def dropped(hidden, key):
    """Dropout in training, nothing without a key."""
    return hidden if key is None else hidden * jax.random.bernoulli(key, KEEP, hidden.shape) / KEEP


MODELS = {"equinox": equinox_model, "nnx": nnx_model}


# -- one training for both -----------------------------------------------------------------------------------------------


def functions(logits):
    """The training step with its dropout key, and the outer loss."""

    def train_loss(model, hyper, batch, key):
        X, y = batch
        target = optax.smooth_labels(jax.nn.one_hot(y, CLASSES), hyper["smoothing"])
        penalty = sum(jnp.sum(w**2) for w in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
        return optax.softmax_cross_entropy(logits(model, X, key), target).mean() + hyper["l2"] * penalty / 2

    def val_loss(state, hyper, batch):
        X, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits(state.params, X, None), y).mean()

    return train_step(train_loss, lambda hyper: optax.sgd(hyper["lr"], hyper["momentum"])), val_loss


def data():
    """Training, validation and test sets (X (n, 64) float32 in [0, 1], y (n,))."""
    X, y = load_digits(return_X_y=True)
    X, y = (X / 16).astype(np.float32), y.astype(np.int32)
    return [(X[part], y[part]) for part in (slice(1197), slice(1197, 1497), slice(1497, None))]


def train(strategy, steps, lr, model, logits, step, val_loss, label):
    """(test accuracy in %, result) of one run; strategy None holds every hyperparameter where it starts."""
    (X, y), val, test = data()
    space = Space(lr=log(lr, bounds=(1e-6, 10)), momentum=logit(0.9), l2=log(1e-5), smoothing=logit(0.01))
    state = step.init(model, space, key=jax.random.key(1))
    run = inner(step, val_loss, state, space, params=lambda state: state.params)

    def batch(t):
        i = np.random.default_rng(t).choice(len(y), BATCH, replace=False)
        return X[i], y[i]

    if strategy is None:
        for t in range(steps):
            run.step(space.phi0, batch(t), tangents=False)
        params, result = run.params, None
    else:
        result = Tuner(run, strategy, steps=steps, callbacks=[Progress(label)]).fit(batch, [val])
        params = result.params
    hits = logits(run.unravel(params), test[0], None).argmax(axis=1) == test[1]
    return 100 * float(hits.mean()), result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), default="equinox")
    parser.add_argument("--full", action="store_true", help="3,000 steps in place of 200")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate to start from")
    parser.add_argument("--out", default="jax_models.png", help="figure to write")
    args = parser.parse_args(argv)
    steps = 3000 if args.full else 200
    model, logits = MODELS[args.model](features=64)
    step, val_loss = functions(logits)
    print(f"{args.model} on scikit-learn's digits, SGD from lr {args.lr:g}, {steps} steps")
    accuracy = {}
    for name, strategy in (("untuned", None), ("local", Local()), ("glocal", Glocal())):
        accuracy[name], result = train(strategy, steps, args.lr, model, logits, step, val_loss, name)
        print(f"{name:8s} test accuracy {accuracy[name]:.2f} %")
    figure(result.history).savefig(args.out, dpi=200)
    over = {name: accuracy["glocal"] - accuracy[name] for name in ("untuned", "local")}
    print(f"gained by glocal: {over['untuned']:+.2f} points over the untuned run, {over['local']:+.2f} over local")
    print(f"it ended at {', '.join(f'{name} {x:.3g}' for name, x in result.hyper.items())}; figure: {args.out}")


if __name__ == "__main__":
    main()
