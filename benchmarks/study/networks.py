"""Two networks in JAX: a small LeNet, and a recurrent model of characters.  Optional: their problems need JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from koopman_hpo_adapters.jax import problem

LENGTH = 16  # characters a sequence


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    """float32 weights of variance 1 / inputs; the last axis is the outputs."""
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1).mean()


def classifier(logits: Any, params: Any) -> Any:
    """A `Problem` whose losses are the cross entropy of `logits(params, X)`."""
    loss = lambda params, hyper, batch: cross_entropy(logits(params, batch[0]), batch[1])
    return problem(loss, loss, params, hyper=())


def lenet(seed: int, channels: tuple[int, int] = (4, 8), width: int = 32) -> Any:
    """Two 5x5 and 3x3 convolutions with average pooling, two dense layers, tanh, as LeCun's; images 14x14."""
    rng = np.random.default_rng(seed)
    a, b = channels
    params = {
        "first": _normal(rng, 5, 5, 1, a),
        "second": _normal(rng, 3, 3, a, b),
        "dense": _normal(rng, 9 * b, width),
        "out": _normal(rng, width, 10),
    }

    def logits(params: Any, X: Any) -> jax.Array:
        for name in ("first", "second"):
            X = jax.lax.conv_general_dilated(X, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            X = jnp.tanh(X)
            n, h, w, c = X.shape
            X = X[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        return jnp.tanh(X.reshape(len(X), -1) @ params["dense"]) @ params["out"]

    return classifier(logits, params)


def characters(seed: int, width: int = 32) -> tuple[Any, Any]:
    """An Elman network that predicts the next character of Python's help texts, and its data.

    600 training and 200 validation sequences; only the 40 most frequent characters are told apart.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    kinds = sorted(set(text), key=lambda c: (-text.count(c), c))[:39]
    codes = np.array([kinds.index(c) if c in kinds else 39 for c in text[:400_000]], np.int32)
    rng = np.random.default_rng(seed)
    cut = len(codes) * 9 // 10
    starts = np.concatenate([rng.integers(0, cut - 20, 600), rng.integers(cut, len(codes) - 20, 200)])
    pieces = codes[starts[:, None] + np.arange(LENGTH + 1)]
    params = {
        "embed": _normal(rng, 40, width) * np.float32(np.sqrt(40 / width)),
        "recur": _normal(rng, width, width),
        "bias": jnp.zeros(width, jnp.float32),
        "out": _normal(rng, width, 40),
    }

    def logits(params: Any, X: Any) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = jnp.tanh(x + state @ params["recur"] + params["bias"])
            return state, state

        inputs = jnp.swapaxes(params["embed"][X], 0, 1)
        states = jax.lax.scan(step, jnp.zeros_like(inputs[0]), inputs)[1]
        return jnp.swapaxes(states, 0, 1) @ params["out"]

    pairs = pieces[:, :-1], pieces[:, 1:]
    train, val = (tuple(part[rows] for part in pairs) for rows in (slice(600), slice(600, None)))
    return classifier(logits, params), (train, val)
