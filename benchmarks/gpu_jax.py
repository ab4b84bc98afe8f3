"""The JAX adapter's window, one scan of steps with tangents, on a GPU: right first, then against plain training."""

from __future__ import annotations

import os
import statistics
import time
from itertools import pairwise

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card is shared with torch here

import jax
import jax.numpy as jnp
import optax
from koopman_hpo_adapters import jax as adapter

from koopman_hpo import Space, log, logit

SPACE = Space(lr=log(0.05), momentum=logit(0.9), l2=log(1e-3))


def loss(params, hyper, batch):
    X, y = batch
    for W in params[:-1]:
        X = jnp.tanh(X @ W)
    errors = optax.softmax_cross_entropy_with_integer_labels(X @ params[-1], y).mean()
    return errors + hyper["l2"] * sum((W**2).sum() for W in params)


def data(widths, n, steps, seed=0):
    """(weights, batches, validation batch) on JAX's default device."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights = [draw(a, b) / np.sqrt(a) for a, b in pairwise(widths)]
    batches = [(draw(n, widths[0]), rng.integers(widths[-1], size=n)) for _ in range(steps + 1)]
    weights, batches = jax.device_put((weights, batches))
    return weights, batches[:-1], batches[-1]


def wrapped(weights):
    step = adapter.train_step(loss, lambda h: optax.sgd(h["lr"], h["momentum"]))
    return adapter.inner(step, lambda s, h, b: loss(s.params, h, b), step.init(weights, SPACE), SPACE), step


def prove(place):
    """The trajectory of a small run on `place` is the CPU's."""
    found = []
    for device in (jax.devices("cpu")[0], place):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            weights, batches, val = data((8, 16, 4), 32, 20)
            found.append(wrapped(weights)[0].run(SPACE.phi0, batches, val, every=5)[1])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-3 * np.abs(found[0]).max())


def window(widths, n, steps, repeats, platform):
    """{name: ms a step, of plain training and with three tangents} in windows of one scan."""
    place = jax.devices(platform)[0]
    prove(place)
    with jax.default_device(place):
        weights, batches, val = data(widths, n, steps)
        run, step = wrapped(weights)
        hyper, start = jax.device_put(SPACE.natural(SPACE.phi0)), step.init(weights, SPACE)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
        plain = jax.jit(lambda s, xs: jax.lax.scan(lambda s, b: step(s, hyper, b), s, xs)[1])
        ms_plain = _ms(lambda: plain(start, stacked).block_until_ready(), steps, repeats)
        ms_step = _ms(lambda: run.run(SPACE.phi0, batches, val, every=steps), steps, repeats)
    p = sum(W.size for W in weights)
    row = {"ms_plain": ms_plain, "ms_step": ms_step, "step_to_floor": ms_step / (7 * ms_plain), "p": p}
    return {f"MLP {widths}, batch {n}, {steps} steps": row}


def _ms(call, steps, repeats):
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return statistics.median(times)
