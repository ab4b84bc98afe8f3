"""Two JAX models whose training loss has ten hyperparameters of its own: strengths of augmentation, weights of losses.

Images are 14x14; what is validated and tested is the cross entropy of the images as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .networks import classifier, convolved, cross_entropy, normal
from .tasks import CLASSES

SIDE, WIDTH = 14, 32
# what strength 1 is: pixels of shift (2), radians, logarithms of the scale (2), shear, brightness, logarithm of the
# contrast, noise a pixel, and blur; images have variance 1
UNITS = np.array([2.0, 2.0, 0.4, 0.3, 0.3, 0.4, 1.0, 0.5, 1.0, 1.0], np.float32)
TERMS = ("image", "coarse", "across", "down", "noise", "wrong", "l2", "l1", "activity", "confidence")


def warped(X: jax.Array, shift: jax.Array, angle: jax.Array, scale: jax.Array, shear: jax.Array) -> jax.Array:
    """Images (n, 14, 14) moved, turned about their middle, stretched and sheared, each by its own (n,) or (n, 2), linearly
    between pixels, zeros beyond."""
    n, middle = len(X), (SIDE - 1) / 2
    at = jnp.stack(jnp.meshgrid(jnp.arange(SIDE), jnp.arange(SIDE), indexing="ij")) - middle
    y, x = at.reshape(2, -1)
    c, s = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    y, x = c * y - s * x, s * y + c * x
    x = x + shear[:, None] * y
    y = y * jnp.exp(scale[:, :1]) + shift[:, :1] + middle
    x = x * jnp.exp(scale[:, 1:]) + shift[:, 1:] + middle
    y0, x0 = jnp.floor(y), jnp.floor(x)
    padded = jnp.pad(X, ((0, 0), (1, 1), (1, 1))).reshape(n, -1)

    def pixel(i: jax.Array, j: jax.Array) -> jax.Array:
        inside = (i >= -1) & (i <= SIDE) & (j >= -1) & (j <= SIDE)
        where = (jnp.clip(i, -1, SIDE) + 1) * (SIDE + 2) + jnp.clip(j, -1, SIDE) + 1
        return jnp.where(inside, jnp.take_along_axis(padded, where.astype(int), axis=1), 0.0)

    v, u = y - y0, x - x0
    above = (1 - u) * pixel(y0, x0) + u * pixel(y0, x0 + 1)
    below = (1 - u) * pixel(y0 + 1, x0) + u * pixel(y0 + 1, x0 + 1)
    return ((1 - v) * above + v * below).reshape(X.shape)


def blurred(X: jax.Array) -> jax.Array:
    """Means over 3x3 pixels, zeros around."""
    return convolved(X[..., None], jnp.full((3, 3, 1, 1), 1 / 9, X.dtype))[..., 0]


def augmented(X: jax.Array, strengths: jax.Array, draws: jax.Array, noise: jax.Array) -> jax.Array:
    """Images (n, 14, 14), each changed in ten ways by strengths (10,) times its normal draws (n, 10); noise (n, 14, 14)."""
    a = jnp.asarray(UNITS) * strengths * draws
    blur = 1 - jnp.exp(-jnp.abs(a[:, 9]))[:, None, None]
    X = warped(X, a[:, :2], a[:, 2], a[:, 3:5], a[:, 5])
    X = X + blur * (blurred(X) - X)
    return X * jnp.exp(a[:, 7])[:, None, None] + a[:, 6][:, None, None] + UNITS[8] * strengths[8] * noise


def augmentation(seed: int) -> Any:
    """An MLP 196-32-10 whose training images (X, y, draws, noise) are augmented by `strengths` (10,)."""
    rng = np.random.default_rng(seed)
    params = {"in": normal(rng, SIDE**2, WIDTH), "out": normal(rng, WIDTH, CLASSES)}
    logits = lambda params, X: jnp.tanh(X.reshape(len(X), -1) @ params["in"]) @ params["out"]

    def train(params: Any, hyper: Any, batch: Any) -> jax.Array:
        X, y, draws, noise = batch
        return cross_entropy(logits(params, augmented(X, hyper["strengths"], draws, noise)), y)

    return classifier(logits, params, train, ("strengths",))


def weighted(seed: int) -> Any:
    """An MLP 196-32-10 whose training loss has ten terms more, by `weights` (10,).

    Its hidden units also predict the image, a coarse one, its differences across and down, targets (49) that mean nothing
    and labels that are wrong; the others are penalties of the first layer, of the units and of confidence.  A batch is
    (X, y, meaningless targets, wrong labels).
    """
    rng = np.random.default_rng(seed)
    heads = {"image": SIDE**2, "coarse": 49, "across": 49, "down": 49, "noise": 49, "wrong": CLASSES, "out": CLASSES}
    params = {"in": normal(rng, SIDE**2, WIDTH)} | {name: normal(rng, WIDTH, n) for name, n in heads.items()}
    units = lambda params, X: jnp.tanh(X.reshape(len(X), -1) @ params["in"])

    def train(params: Any, hyper: Any, batch: Any) -> jax.Array:
        X, y, meaningless, wrong = batch
        n, h = len(X), units(params, X)
        coarse = X.reshape(n, 7, 2, 7, 2).mean(axis=(2, 4))
        targets = {
            "image": X,
            "coarse": coarse,
            "across": coarse - jnp.roll(coarse, 1, axis=2),
            "down": coarse - jnp.roll(coarse, 1, axis=1),
            "noise": meaningless,
        }
        out = h @ params["out"]
        terms = {name: jnp.mean((h @ params[name] - target.reshape(n, -1)) ** 2) for name, target in targets.items()}
        terms["wrong"] = cross_entropy(h @ params["wrong"], wrong)
        terms["l2"], terms["l1"] = jnp.sum(params["in"] ** 2) / 2, jnp.abs(params["in"]).sum() / 10
        terms["activity"] = jnp.mean(h**2)
        sure = jax.nn.log_softmax(out)
        terms["confidence"] = jnp.sum(jnp.exp(sure) * sure, axis=-1).mean()
        return cross_entropy(out, y) + hyper["weights"] @ jnp.stack([terms[name] for name in TERMS])

    return classifier(lambda params, X: units(params, X) @ params["out"], params, train, ("weights",))
