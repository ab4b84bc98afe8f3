"""The slow, obvious oracle of the ready models: textbook NumPy, one example at a time, nothing shared with the library.

Everything works in complex arithmetic too, so that derivatives come from complex steps: `f(x + i h).imag / h` has no
cancellation, and with h = 1e-30 it is exact to rounding.
"""

from itertools import pairwise
from math import pi

import numpy as np
from scipy.special import erf

STEP = 1e-30

cdf = lambda a: 0.5 * (1 + erf(a / np.sqrt(2)))
density = lambda a: np.exp(-(a**2) / 2) / np.sqrt(2 * pi)
ACTIVATION = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "relu": (lambda a: np.where(a.real > 0, a, 0), lambda a: np.where(a.real > 0, 1.0, 0.0)),
    "gelu": (lambda a: a * cdf(a), lambda a: cdf(a) + a * density(a)),
}


def unflatten(theta, sizes, bias=True):
    """[(W (inputs, outputs), b (outputs,)), ...] from theta laid out W.ravel(), b, W.ravel(), b, ..."""
    layers, at = [], 0
    for inputs, outputs in pairwise(sizes):
        W = theta[at : at + inputs * outputs].reshape(inputs, outputs)
        at += inputs * outputs
        b = theta[at : at + outputs] if bias else np.zeros(outputs)
        at += outputs * bias
        layers.append((W, b))
    assert at == len(theta)
    return layers


def log_softmax(a):
    top = a[np.argmax(a.real)]
    return a - top - np.log(np.sum(np.exp(a - top)))


def example_loss(a, y, loss, smoothing):
    """(value, gradient with respect to the outputs a) of one example."""
    if loss == "squared_error":
        return 0.5 * np.sum((a - y) ** 2), a - y
    c = len(a)
    target = np.array([(1 - smoothing) * (k == y) + smoothing / c for k in range(c)])
    return -np.sum(target * log_softmax(a)), np.exp(log_softmax(a)) - target


def gradient(theta, sizes, batch, hyper, *, activation="tanh", loss="cross_entropy", bias=True):
    """(loss, gradient (p,)) of the weighted, penalised inner loss, by back-propagation, example by example."""
    X, y, *index = batch
    act, slope = ACTIVATION[activation]
    layers = unflatten(theta, sizes, bias)
    smoothing = hyper.get("label_smoothing", 0.0)
    total, grads = 0.0, [(np.zeros_like(W, dtype=complex), np.zeros_like(b, dtype=complex)) for W, b in layers]
    for i, x in enumerate(X):
        weight = 1 / len(X)
        if "class_weights" in hyper:
            weight = weight * hyper["class_weights"][y[i]]
        if "example_weights" in hyper:
            weight = weight * hyper["example_weights"][index[0][i]]
        inputs, before = [], []
        h = x
        for W, b in layers:
            inputs.append(h)
            before.append(h @ W + b)
            h = act(before[-1])
        value, d = example_loss(before[-1], y[i], loss, smoothing)
        total = total + weight * value
        for l in reversed(range(len(layers))):
            grads[l][0][...] += weight * np.outer(inputs[l], d)
            grads[l][1][...] += weight * d
            if l > 0:
                d = (layers[l][0] @ d) * slope(before[l - 1])
    g = np.concatenate([part.ravel() for W, b in grads for part in ((W, b) if bias else (W,))])
    return _with_penalty(total, g, theta, [W.size + b.size * bias for W, b in layers], hyper.get("l2", 0.0))


def _with_penalty(total, g, theta, lengths, l2):
    l2 = np.broadcast_to(l2, (len(lengths),))
    for strength, stop, length in zip(l2, np.cumsum(lengths), lengths, strict=True):
        part = slice(stop - length, stop)
        total = total + 0.5 * strength * np.sum(theta[part] ** 2)
        g[part] += strength * theta[part]
    return total, g


def tangent(theta, sizes, batch, hyper, z, dhyper, **model):
    """(p,): derivative of the gradient along (z, dhyper), by one complex step."""
    moved = {name: value + 1j * STEP * np.asarray(dhyper.get(name, 0.0)) for name, value in hyper.items()}
    return gradient(theta + 1j * STEP * z, sizes, batch, moved, **model)[1].imag / STEP


def slope_of_loss(theta, sizes, batch, hyper, z, **model):
    """Scalar: derivative of the loss along z, by one complex step: what the gradient must agree with."""
    return gradient(theta + 1j * STEP * z, sizes, batch, hyper, **model)[0].imag / STEP
