"""A multilayer perceptron whose gradient is pushed along q tangents at once: forward over reverse, by hand.

Letters: n examples, q tangents, L layers.  Layer l maps `A_l = H_l W_l`, `H_{l+1} = act(A_l)`; H_l carries a last
column of ones, so that W_l holds the bias as its last row and is one contiguous piece of theta.  Backwards,
`G_l = H_l' D_l`, `T = D_l W_l'`, `D_{l-1} = act'(A_{l-1}) T`.  A value and its q tangents share one array: entry 0 is
the value, entry 1 + j the tangent along direction j.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from . import _fused
from ._losses import Residual
from ._products import empty, product, spare_size
from ._terms import Terms

CHUNK = 12  # tangents at once: wide enough for BLAS, few enough for the cache
ROWS = 256  # examples at once, which bounds memory on large batches


class Layer(NamedTuple):
    """Where a layer lives in theta: (inputs + bias, outputs), row-major, the bias last."""

    inputs: int
    outputs: int
    where: slice
    shape: tuple[int, int]

    def of(self, theta):
        """The layer's view of theta (p,)."""
        return theta[self.where].reshape(self.shape)

    def of_each(self, Z):
        """The layer's view of each row of Z (q, p)."""
        return Z[:, self.where].reshape((len(Z), *self.shape))


class Level(NamedTuple):
    """A layer's memory for n examples and q tangents, with the views that its products take."""

    H: Any  # (n, inputs + bias)
    A: Any  # (1 + q, n, outputs)
    dH: Any  # (q, n, outputs): of a hidden layer; the memory of A's tangents where these need not be kept
    slope: Any  # (n, outputs): act'(A) of a hidden layer
    D: Any  # (1 + q, n, outputs): gradient at A; of the last layer the memory of A
    left: Any  # (q, n, 2 * outputs): [dD, D], so that `dD W' + D dW'` is one product with `right`
    right: Any  # (q, inputs, 2 * outputs): [W, dW]
    forward: Any  # products H [W, dW]
    backward: Any  # products H' [D, dD]


class Workspace(threading.local):
    """The memory of the last few sizes, one set a thread; a copy or a pickle of it starts empty."""

    def __init__(self):
        self.sets = {}

    def get(self, n, q, make):
        levels = self.sets.get((n, q))
        if levels is None:
            if len(self.sets) >= 8:
                self.sets.clear()
            levels = self.sets[n, q] = make(n, q)
        return levels

    def __reduce__(self):
        return Workspace, ()

    def __deepcopy__(self, memo):
        return Workspace()


class Network:
    """Layers, activation and loss; its functions take theta flat and leave their arguments alone."""

    def __init__(self, sizes, activation, loss, bias, dtype):
        self.activation, self.loss, self.dtype = activation, loss, np.dtype(dtype)
        self.layers: list[Layer] = []
        self.size = 0
        for inputs, outputs in pairwise(sizes):
            shape = (inputs + bool(bias), outputs)
            stop = self.size + shape[0] * outputs
            self.layers.append(Layer(inputs, outputs, slice(self.size, stop), shape))
            self.size = stop
        self.workspace = Workspace()

    def outputs(self, theta, X):
        """(n, out): A of the last layer, in memory that the next call overwrites."""
        levels, _ = self.workspace.get(len(X), 0, self._make)
        self._forward([layer.of(theta) for layer in self.layers], None, X, levels)
        return levels[-1].A[0]

    def gradient(self, theta, Z, X, y, terms: Terms, g, dG):
        """g (p,), dG (q, p) <- gradient of `sum_i weight_i loss_i` and its tangents along Z (q, p) and the terms' own.

        q is at most `CHUNK`.  Returns (loss, -1), or (0, i) where label i is no class; g and dG are then not written.
        """
        levels, residual = self.workspace.get(len(X), len(Z), self._make)
        W, dW, dG_l = [layer.of(theta) for layer in self.layers], None, None
        if len(Z):
            dW, dG_l = ([layer.of_each(each) for layer in self.layers] for each in (Z, dG))
        self._forward(W, dW, X, levels)
        A = levels[-1].A
        loss, bad = self.loss.value(A[0], y, terms.smoothing, terms.weight, residual)
        if bad >= 0:
            return loss, bad
        if dW:
            self.loss.tangents(residual, terms.weight, A[1:])
            terms.push(residual, y, A[1:])
        self._backward(W, dW, [layer.of(g) for layer in self.layers], dG_l, levels)
        return loss, bad

    def _forward(self, W, dW, X, levels):
        """A_l = H_l W_l, dA_l = H_l dW_l + dH_l W_l; H = act(A), dH = act'(A) dA."""
        levels[0].H[:, : X.shape[1]] = X
        for l, (layer, level) in enumerate(zip(self.layers, levels, strict=True)):
            A = level.A[0]
            if dW:
                if l > 0:
                    _stacked(levels[l - 1].dH, W[l][: layer.inputs], level.A[1:])
                level.forward(level.H, W[l], dW[l], A, level.A[1:])
            else:
                np.matmul(level.H, W[l], out=A)
            if layer is not self.layers[-1]:
                self.activation.value(A, levels[l + 1].H, level.slope)
                if self.activation.keeps_input:
                    np.copyto(level.dH, level.A[1:])
                if dW:
                    _fused.scale_tangents(level.slope, level.dH)

    def _backward(self, W, dW, G, dG, levels):
        """G = H' D, dG = H' dD + dH' D; T = D W', dT = dD W' + D dW'; then D of the layer below."""
        for l in reversed(range(len(levels))):
            level, layer, D = levels[l], self.layers[l], levels[l].D[0]
            inputs = layer.inputs
            if dW:
                if l > 0:
                    np.matmul(levels[l - 1].dH.transpose(0, 2, 1), D, out=dG[l][:, :inputs])
                    dG[l][:, inputs:] = 0  # the column of ones has no tangent
                level.backward(level.H.T, D, level.D[1:], G[l], dG[l])
            else:
                np.matmul(level.H.T, D, out=G[l])
            if l > 0:
                below = levels[l - 1]
                np.matmul(D, W[l][:inputs].T, out=below.D[0])
                if dW:
                    _fused.beside(D, level.D[1:], layer.outputs, level.left)
                    _fused.beside(W[l][:inputs], dW[l][:, :inputs], 0, level.right)
                    np.matmul(level.left, level.right.transpose(0, 2, 1), out=below.D[1:])
                self.activation.chain(below.A, level.H, below.slope, below.dH, below.D)

    def _make(self, n, q):
        """[Level, ...], Residual: memory for n examples and q tangents."""
        new = lambda *shape: empty(shape, self.dtype)
        sizes = [
            max(spare_size(n, *layer.shape, q, l > 0), spare_size(layer.shape[0], n, layer.outputs, q, l > 0))
            for l, layer in enumerate(self.layers)
        ]
        spare = new(max(sizes))
        levels = []
        for l, layer in enumerate(self.layers):
            rows, out = layer.shape
            A, last = new(1 + q, n, out), layer is self.layers[-1]
            level = Level(
                H=np.ones((n, rows), self.dtype),
                A=A,
                dH=new(q, n, out) if self.activation.keeps_input and not last else A[1:],
                slope=None if last else new(n, out),
                D=A if last else new(1 + q, n, out),
                left=new(q, n, 2 * out) if l > 0 else None,
                right=new(q, layer.inputs, 2 * out) if l > 0 else None,
                forward=product(spare, n, rows, out, q, l > 0),
                backward=product(spare, rows, n, out, q, l > 0),
            )
            levels.append(level)
        c = self.layers[-1].outputs
        return levels, Residual(new(n, c), new(n, c), levels[-1].A[0])


def _stacked(A, B, out):
    """out[j] <- A[j] B as one product.  A: (k, m, a), out: (k, m, b), both contiguous; B: (a, b)."""
    np.matmul(A.reshape(-1, A.shape[2]), B, out=out.reshape(-1, out.shape[2]))
