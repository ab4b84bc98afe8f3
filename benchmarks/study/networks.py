"""Two networks in JAX: a small LeNet, and a recurrent model of characters.  Optional: their problems need JAX."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from koopman_hpo_adapters.jax import TreeProblem, problem

LENGTH, CHARACTERS, SEEN = 16, 40, 400_000  # characters a sequence, those told apart, and where the text is cut


@dataclass(frozen=True)
class Classifier(TreeProblem):
    """A `Problem` that also predicts: `logits(params, X)`, params a pytree."""

    logits: Any = None

    def accuracy(self, theta: Any, X: Any, y: Any) -> float:
        """The fraction of the labels y that the largest logits hit, with parameters theta (p,)."""
        return float((self.logits(self.unravel(theta), X).argmax(axis=-1) == y).mean())


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    """float32 weights of variance 1 / inputs; the last axis is the outputs."""
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1).mean()


def classifier(logits: Any, params: Any, train: Any = None, hyper: tuple[str, ...] = ()) -> Any:
    """The losses are the cross entropy of `logits(params, X)`; that of training may be another, with hyperparameters."""
    loss = lambda params, hyper, batch: cross_entropy(logits(params, batch[0]), batch[1])
    made = problem(loss if train is None else train, loss, params, hyper=hyper)
    return Classifier(**{f.name: getattr(made, f.name) for f in fields(made)}, logits=jax.jit(logits))


def convolved(X: jax.Array, weights: jax.Array) -> jax.Array:
    """X (n, h, w, c) by weights (k, k, c, d), zeros around: one matrix product, on a CPU twice as fast as XLA's own."""
    k, (_, h, w, _) = len(weights), X.shape
    X = jnp.pad(X, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    shifted = [X[:, i : i + h, j : j + w] for i in range(k) for j in range(k)]
    return jnp.concatenate(shifted, axis=-1) @ weights.reshape(-1, weights.shape[-1])


def lenet(seed: int, channels: tuple[int, int] = (4, 8), width: int = 32) -> Any:
    """Two 5x5 and 3x3 convolutions with average pooling, two dense layers, tanh, as LeCun's; images 14x14."""
    rng = np.random.default_rng(seed)
    a, b = channels
    params = {
        "first": normal(rng, 5, 5, 1, a),
        "second": normal(rng, 3, 3, a, b),
        "dense": normal(rng, 9 * b, width),
        "out": normal(rng, width, 10),
    }

    def logits(params: Any, X: Any) -> jax.Array:
        for name in ("first", "second"):
            X = jnp.tanh(convolved(X, params[name]))
            n, h, w, c = X.shape
            X = X[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        return jnp.tanh(X.reshape(len(X), -1) @ params["dense"]) @ params["out"]

    return classifier(logits, params)


@cache
def _codes() -> np.ndarray:
    """Python's help texts as numbers of characters, the most frequent first and the rare ones alike."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    kinds = sorted(set(text), key=lambda c: (-text.count(c), c))[: CHARACTERS - 1]
    number = {c: i for i, c in enumerate(kinds)}
    return np.array([number.get(c, CHARACTERS - 1) for c in text], np.int32)


def _pieces(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (n, 16) from there on, and the characters that follow each."""
    pieces = _codes()[starts[:, None] + np.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def unseen(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n sequences of the text's end, of which `characters` shows nothing."""
    return _pieces(np.random.default_rng((seed, n)).integers(SEEN, len(_codes()) - 20, n))


def characters(seed: int, width: int = 32) -> tuple[Any, Any]:
    """An Elman network that predicts the next character of Python's help texts, and its data.

    600 training and 200 validation sequences.
    """
    rng = np.random.default_rng(seed)
    cut = SEEN * 9 // 10
    starts = np.concatenate([rng.integers(0, cut - 20, 600), rng.integers(cut, SEEN - 20, 200)])
    params = {
        "embed": normal(rng, CHARACTERS, width) * np.float32(np.sqrt(CHARACTERS / width)),
        "recur": normal(rng, width, width),
        "bias": jnp.zeros(width, jnp.float32),
        "out": normal(rng, width, CHARACTERS),
    }

    def logits(params: Any, X: Any) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = jnp.tanh(x + state @ params["recur"] + params["bias"])
            return state, state

        inputs = jnp.swapaxes(params["embed"][X], 0, 1)
        states = jax.lax.scan(step, jnp.zeros_like(inputs[0]), inputs)[1]
        return jnp.swapaxes(states, 0, 1) @ params["out"]

    return classifier(logits, params), (_pieces(starts[:600]), _pieces(starts[600:]))
