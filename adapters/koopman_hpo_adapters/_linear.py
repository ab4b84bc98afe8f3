"""A ready model linearised at one point: what a gradient leaves behind, so that many tangents can be pushed through it.

Letters and formulas are those of `_mlp`: n examples, q tangents, `A_l = H_l W_l`, `H_{l+1} = act(A_l)`.  Per hidden layer
are kept the slope `act'(A)`, the gradient D at A, and the bend, by which D moves with dA: `act''(A)` times the gradient at
act(A).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _fused
from ._losses import Residual
from ._passes import GELU, RELU, TANH


class Kept(NamedTuple):
    """What is kept of L layers; hidden ones have a slope and a bend."""

    W: list[Any]  # (inputs + bias, outputs)
    H: list[Any]  # (n, inputs + bias)
    D: list[Any]  # (n, outputs)
    slope: list[Any]  # (n, outputs) of hidden layers
    bend: list[Any]  # (n, outputs) of hidden layers
    residual: Residual
    dA: list[Any]  # (n, outputs) work space of `push`, as the rest
    dH: list[Any]  # (n, outputs) of hidden layers
    spare: list[Any]  # (n, outputs)
    square: list[Any]  # (inputs, outputs)


_ACTIVATE = {TANH: _fused.tanh, RELU: _fused.relu, GELU: _fused.gelu}


def size(network: Any, n: int) -> int:
    """Numbers that are kept for n examples."""
    return n * (network.layers[0].shape[0] + 7 * sum(layer.outputs for layer in network.layers))


def linearise(network: Any, theta: Any, X: Any, y: Any, terms: Any) -> tuple[int, Any, Kept]:
    """-1 or the first label that is no class; of the first layer's gradient one column (inputs + bias,), which is finite
    where the batch is; and what `push` needs, in theta's dtype."""
    n, layers, dtype = len(X), network.layers, theta.dtype
    H, A, slope = [_inputs(n, layers[0], dtype)], [], []
    H[0][:, : layers[0].inputs] = X
    W = [layer.of(theta).copy() for layer in layers]
    for l, w in enumerate(W):
        A.append(H[l] @ w)
        if l + 1 < len(W):
            H.append(_inputs(n, layers[l + 1], dtype))
            slope.append(np.empty_like(A[l]))
            _ACTIVATE[network.activation](A[l], H[l + 1], slope[l])
    residual = Residual(*(np.empty_like(A[-1]) for _ in range(3)))
    _, bad = network.loss.value(A[-1], y, terms.smoothing, terms.weight, residual)
    D: list[Any] = [residual.D]
    bend: list[Any] = []
    for l in range(len(W) - 1, 0, -1):
        above = D[0] @ W[l][: layers[l].inputs].T
        bend.insert(0, _bend(network.activation, A[l - 1], H[l], slope[l - 1], above))
        D.insert(0, slope[l - 1] * above)
    square = [np.empty((layer.inputs, layer.outputs), dtype) for layer in layers]
    return bad, H[0].T @ D[0][:, 0], Kept(W, H, D, slope, bend, residual, _like(A), _like(A[:-1]), _like(A), square)


def _like(arrays: list[Any]) -> list[Any]:
    return [np.empty_like(a) for a in arrays]


def _inputs(n: int, layer: Any, dtype: Any) -> Any:
    """(n, inputs + bias) whose last column is ones."""
    return np.ones((n, layer.shape[0]), dtype)


def _bend(activation: int, A: Any, H: Any, slope: Any, above: Any) -> Any:
    if activation == TANH:
        return -2 * H[:, : A.shape[1]] * slope * above
    curve = np.zeros_like(A)
    if activation == GELU:
        _fused.gelu_curve(A, curve)
    return curve * above


def push(network: Any, kept: Kept, z: Any, y: Any, terms: Any, out: Any) -> None:
    """out (p,) <- the tangent of the gradient along z (p,) and the terms' own, those of one direction."""
    layers, W, H, dA, dH = network.layers, kept.W, kept.H, kept.dA, kept.dH
    dW = [layer.of(z) for layer in layers]
    np.dot(H[0], dW[0], out=dA[0])
    for l in range(1, len(layers)):
        np.multiply(kept.slope[l - 1], dA[l - 1], out=dH[l - 1])
        np.dot(H[l], dW[l], out=dA[l])
        dA[l] += np.dot(dH[l - 1], W[l][: layers[l].inputs], out=kept.spare[l])
    dD = dA[-1]
    network.loss.tangents(kept.residual, terms.weight, dD[None])
    terms.push(kept.residual, y, dD[None])
    for l in range(len(layers) - 1, -1, -1):
        ins, G = layers[l].inputs, layers[l].of(out)
        np.dot(H[l].T, dD, out=G)
        if l > 0:
            G[:ins] += np.dot(dH[l - 1].T, kept.D[l], out=kept.square[l])
            below, spare = dH[l - 1], kept.spare[l - 1]  # dH has served
            np.dot(dD, W[l][:ins].T, out=below)
            below += np.dot(kept.D[l], dW[l][:ins].T, out=spare)
            below *= kept.slope[l - 1]
            below += np.multiply(kept.bend[l - 1], dA[l - 1], out=spare)
            dD = below
