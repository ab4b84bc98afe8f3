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

from . import _passes
from ._losses import Residual
from ._passes import GELU, NARROW, RELU, TANH, Layout
from ._terms import Terms

CHUNK = 12  # tangents at once: wide enough for BLAS, few enough for the cache
ROWS = 256  # examples at once, which bounds memory on large batches
ACTIVATIONS = {"gelu": GELU, "relu": RELU, "tanh": TANH}


class Layer(NamedTuple):
    """Where a layer lives in theta: (inputs + bias, outputs), row-major, the bias last."""

    inputs: int
    outputs: int
    where: slice
    shape: tuple[int, int]

    def of(self, theta):
        """The layer's view of theta (p,)."""
        return theta[self.where].reshape(self.shape)


class Workspace(NamedTuple):
    """Memory for n examples and q tangents, with the views that Python looks at."""

    layout: Layout
    memory: Any  # flat
    X: Any  # (n, inputs) of the first layer
    A: Any  # (1 + q, n, outputs) of the last layer
    residual: Residual


class Workspaces(threading.local):
    """The memory of the last few sizes, one set a thread; a copy or a pickle of it starts empty."""

    def __init__(self):
        self.sets = {}

    def get(self, n, q, make):
        found = self.sets.get((n, q))
        if found is None:
            if len(self.sets) >= 8:
                self.sets.clear()
            found = self.sets[n, q] = make(n, q)
        return found

    def __reduce__(self):
        return Workspaces, ()

    def __deepcopy__(self, memo):
        return Workspaces()


class Network:
    """Layers, activation and loss; its functions take theta flat and leave their arguments alone."""

    def __init__(self, sizes, activation, loss, bias, dtype):
        self.activation, self.loss, self.bias, self.dtype = activation, loss, int(bool(bias)), np.dtype(dtype)
        self.layers: list[Layer] = []
        self.size = 0
        for inputs, outputs in pairwise(sizes):
            shape = (inputs + self.bias, outputs)
            stop = self.size + shape[0] * outputs
            self.layers.append(Layer(inputs, outputs, slice(self.size, stop), shape))
            self.size = stop
        self.workspaces = Workspaces()

    def outputs(self, theta, X):
        """(n, out): A of the last layer, in memory that the next call overwrites."""
        w = self.workspaces.get(len(X), 0, self._make)
        w.X[:] = X
        theta = _seen(theta)
        _passes.forward(theta, theta.reshape(1, -1)[:0], len(X), w.layout, w.memory)
        return w.A[0]

    def gradient(self, theta, Z, X, y, terms: Terms, g, dG):
        """g (p,), dG (q, p) <- gradient of `sum_i weight_i loss_i` and its tangents along Z (q, p) and the terms' own.

        q is at most `CHUNK`.  Returns (loss, -1), or (0, i) where label i is no class; g and dG are then not written.
        """
        n, q = len(X), len(Z)
        w = self.workspaces.get(n, q, self._make)
        w.X[:] = X
        theta, Z = _seen(theta), _seen(Z)
        _passes.forward(theta, Z, n, w.layout, w.memory)
        loss, bad = self.loss.value(w.A[0], y, terms.smoothing, terms.weight, w.residual)
        if bad >= 0:
            return loss, bad
        if q:
            self.loss.tangents(w.residual, terms.weight, w.A[1:])
            terms.push(w.residual, y, w.A[1:])
        _passes.backward(theta, Z, n, w.layout, w.memory, g, dG)
        return loss, bad

    def _make(self, n, q):
        """A `Workspace`: everything in one flat memory, each piece starting on a cache line."""
        line = 64 // self.dtype.itemsize
        total = 0

        def place(*shape):
            nonlocal total
            start, total = total, total + -(-int(np.prod(shape)) // line) * line
            return start

        L, keeps = len(self.layers), self.activation == GELU
        H = [place(n, layer.shape[0]) for layer in self.layers]
        A = [place(1 + q, n, layer.outputs) for layer in self.layers]
        hidden = self.layers[:-1]
        dH = [place(q, n, layer.outputs) if keeps else A[l] + n * layer.outputs for l, layer in enumerate(hidden)]
        slope = [place(n, layer.outputs) for layer in hidden]
        D = [place(1 + q, n, layer.outputs) for layer in hidden]
        spare = place(max(self._scratch(layer, n, q) for layer in self.layers))
        table = lambda *rows: np.array(rows, np.int64)
        sizes = table(self.layers[0].inputs, *(layer.outputs for layer in self.layers))
        where = table(*(layer.where.start for layer in self.layers))
        layout = Layout(
            *(sizes, self.bias, self.activation, where, table(*H), table(*A)),
            *(table(*dH, 0), table(*slope, 0), table(*D, A[-1]), spare),
        )
        memory = _aligned(total, self.dtype)
        for l, layer in enumerate(self.layers):  # the columns of ones
            memory[H[l] : H[l] + n * layer.shape[0]] = 1
        first, c = self.layers[0], self.layers[-1].outputs
        X = memory[H[0] : H[0] + n * first.shape[0]].reshape(n, -1)[:, : first.inputs]
        A_last = memory[A[L - 1] : A[L - 1] + (1 + q) * n * c].reshape(1 + q, n, c)
        residual = Residual(np.empty((n, c), self.dtype), np.empty((n, c), self.dtype), A_last[0])
        return Workspace(layout, memory, X, A_last, residual)

    def _scratch(self, layer, n, q):
        """How many numbers a layer's products take beside their results."""
        rows, out = layer.shape
        products = (1 + q) * (rows + n) * out if out < NARROW else max(rows, n) * out
        return max(products, 2 * (n + rows) * out, n * out)


def _seen(a):
    """A read-only, contiguous view: kernels are compiled for one kind of array."""
    view = np.ascontiguousarray(a).view()
    view.flags.writeable = False
    return view


def _aligned(size, dtype):
    """Uninitialised flat memory that starts on a cache line: passes over rows then load whole lines, 2 % of a step."""
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)
