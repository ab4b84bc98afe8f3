"""The network's way forward and back with a value and its q tangents at once, compiled whole.

A step of a small network is a dozen small products: called from Python one by one they cost as much again as a tenth of
the arithmetic.  Everything lies in one flat memory, whose layout `Network` decides (`Layout`); letters and formulas are
those of `_mlp`.  A classifier's ten outputs are too narrow for BLAS: narrow matrices are laid side by side and multiplied
as one (`gather`, `scatter`); wide ones are multiplied where they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from . import _fused

NARROW = 32  # columns below which matrices are laid side by side
THIN = 16  # columns up to which a loop of our own beats BLAS at `H' D`
TANH, RELU, GELU = 0, 1, 2


class Layout(NamedTuple):
    """Where things lie.  L layers; offsets are into theta (`where`) and into the flat memory (the rest)."""

    sizes: NDArray  # (L + 1,) widths, input first
    bias: int  # 1 if each layer's last row is a bias, else 0
    activation: int  # TANH, RELU or GELU
    where: NDArray  # (L,) of a layer in theta
    H: NDArray  # (L,) inputs (n, inputs + bias), the last column ones
    A: NDArray  # (L,) pre-activations and their tangents (1 + q, n, outputs)
    dH: NDArray  # (L,) tangents of a hidden layer's output (q, n, outputs); A's own where these need not be kept
    slope: NDArray  # (L,) act'(A) of a hidden layer (n, outputs)
    D: NDArray  # (L,) gradients at A and their tangents (1 + q, n, outputs); of the last layer A's own
    spare: int  # scratch


@njit(cache=True, error_model="numpy")
def _matrix(memory, start, a, b):
    return memory[start : start + a * b].reshape((a, b))


@njit(cache=True, error_model="numpy")
def _cube(memory, start, a, b, c):
    return memory[start : start + a * b * c].reshape((a, b, c))


@njit(cache=True, error_model="numpy")
def _wide(A, B, memory, spare, add, out):
    """out <- A B, or out + A B if `add`."""
    if add:
        product = _matrix(memory, spare, out.shape[0], out.shape[1])
        np.dot(A, B, product)
        for i in range(out.shape[0]):
            for k in range(out.shape[1]):
                out[i, k] += product[i, k]
    else:
        np.dot(A, B, out)


@njit(cache=True, error_model="numpy")
def forward(theta, Z, n, layout, memory):
    """A_l = H_l W_l, dA_l = H_l dW_l + dH_l W_l; H = act(A), dH = act'(A) dA.  theta: (p,); Z: (q, p).

    The first H holds the inputs; leaves the outputs and their tangents in the last A.
    """
    q, L = len(Z), len(layout.where)
    for l in range(L):
        ins, out, at = layout.sizes[l], layout.sizes[l + 1], layout.where[l]
        rows, spare = ins + layout.bias, layout.spare
        W = theta[at : at + rows * out].reshape((rows, out))
        H = _matrix(memory, layout.H[l], n, rows)
        A = _cube(memory, layout.A[l], 1 + q, n, out)
        if q > 0 and l > 0:
            dH = _matrix(memory, layout.dH[l - 1], q * n, ins)
            np.dot(dH, W[:ins], _matrix(memory, layout.A[l] + n * out, q * n, out))
        if q > 0 and out < NARROW:
            k = 1 + q
            side = _cube(memory, spare, rows, k, out)
            for i in range(rows):
                for c in range(out):
                    side[i, 0, c] = W[i, c]
                for j in range(q):
                    for c in range(out):
                        side[i, 1 + j, c] = Z[j, at + i * out + c]
            product = _matrix(memory, spare + rows * k * out, n, k * out)
            np.dot(H, _matrix(memory, spare, rows, k * out), product)
            _fused.scatter(product.reshape((n, k, out)), l > 0, A[0], A[1:])
        else:
            np.dot(H, W, A[0])
            for j in range(q):
                _wide(H, Z[j, at : at + rows * out].reshape((rows, out)), memory, spare, l > 0, A[1 + j])
        if l < L - 1:
            _activate(l, n, layout, memory, A, q)


@njit(cache=True, error_model="numpy")
def _activate(l, n, layout, memory, A, q):
    """H of the next layer <- act(A), slope <- act'(A), dH <- slope dA."""
    out = A.shape[2]
    H = _matrix(memory, layout.H[l + 1], n, out + layout.bias)
    slope = _matrix(memory, layout.slope[l], n, out)
    dH = _cube(memory, layout.dH[l], q, n, out)
    if layout.activation == TANH:
        _fused.tanh(A[0], H, slope)
    elif layout.activation == RELU:
        _fused.relu(A[0], H, slope)
    else:
        _fused.gelu(A[0], H, slope)
        dH[:] = A[1:]
    _fused.scale_tangents(slope, dH)


@njit(cache=True, error_model="numpy")
def backward(theta, Z, n, layout, memory, g, dG):
    """G = H' D, dG = H' dD + dH' D; T = D W', dT = dD W' + D dW'; then D of the layer below.  g: (p,); dG: (q, p)."""
    q = len(Z)
    for l in range(len(layout.where) - 1, -1, -1):
        ins, out, at = layout.sizes[l], layout.sizes[l + 1], layout.where[l]
        rows = ins + layout.bias
        H = _matrix(memory, layout.H[l], n, rows)
        D = _cube(memory, layout.D[l], 1 + q, n, out)
        if l > 0:
            dH = _cube(memory, layout.dH[l - 1], q, n, ins)
            for j in range(q):
                G = dG[j, at : at + ins * out].reshape((ins, out))
                if out <= THIN:
                    _fused.thin(dH[j], D[0], _matrix(memory, layout.spare, out, ins), G)
                else:
                    np.dot(dH[j].T, D[0], G)
                dG[j, at + ins * out : at + rows * out] = 0  # the column of ones has no tangent
        _gradients(H, D, at, layout.spare, l > 0, memory, g, dG)
        if l > 0:
            W = theta[at : at + ins * out].reshape((ins, out))
            below = _cube(memory, layout.D[l - 1], 1 + q, n, ins)
            np.dot(D[0], W.T, below[0])
            for j in range(q):
                _beside(D, W, Z[j, at : at + ins * out].reshape((ins, out)), j, memory, layout.spare, below[1 + j])
            _chain(l - 1, n, layout, memory, below, q)


@njit(cache=True, error_model="numpy")
def _gradients(H, D, at, spare, add, memory, g, dG):
    """G <- H' D and dG_j <- H' dD_j, the latter added to what is there if `add`; both lie at `at` in g and dG."""
    q, n, out = D.shape[0] - 1, D.shape[1], D.shape[2]
    rows, k = H.shape[1], D.shape[0]
    G = g[at : at + rows * out].reshape((rows, out))
    if q > 0 and out < NARROW:
        _fused.gather(D[0], D[1:], _cube(memory, spare, n, k, out))
        product = _matrix(memory, spare + n * k * out, rows, k * out)
        np.dot(H.T, _matrix(memory, spare, n, k * out), product)
        for i in range(rows):
            for c in range(out):
                G[i, c] = product[i, c]
            for j in range(q):
                for c in range(out):
                    new = product[i, (1 + j) * out + c]
                    dG[j, at + i * out + c] = dG[j, at + i * out + c] + new if add else new
    else:
        np.dot(H.T, D[0], G)
        for j in range(q):
            _wide(H.T, D[1 + j], memory, spare, add, dG[j, at : at + rows * out].reshape((rows, out)))


@njit(cache=True, error_model="numpy")
def _beside(D, W, dW, j, memory, spare, out):
    """out <- dD_j W' + D dW_j' as one product, `[dD_j, D] [W, dW_j]'`."""
    n, b = D.shape[1], D.shape[2]
    m = W.shape[0]
    left, right = _matrix(memory, spare, n, 2 * b), _matrix(memory, spare + 2 * n * b, m, 2 * b)
    for i in range(n):
        for c in range(b):
            left[i, c] = D[1 + j, i, c]
        for c in range(b):
            left[i, b + c] = D[0, i, c]
    for i in range(m):
        for c in range(b):
            right[i, c] = W[i, c]
        for c in range(b):
            right[i, b + c] = dW[i, c]
    np.dot(left, right.T, out)


@njit(cache=True, error_model="numpy")
def _chain(l, n, layout, memory, D, q):
    """D <- gradient at A of hidden layer l and its tangents, from those at its output, in place."""
    out = D.shape[2]
    slope = _matrix(memory, layout.slope[l], n, out)
    if layout.activation == TANH:
        H = _matrix(memory, layout.H[l + 1], n, out + layout.bias)
        _fused.tanh_chain(H, slope, _cube(memory, layout.dH[l], q, n, out), D)
    elif layout.activation == RELU:
        _fused.relu_chain(slope, D)
    else:
        curve = _matrix(memory, layout.spare, n, out)
        A = _cube(memory, layout.A[l], 1 + q, n, out)
        _fused.gelu_curve(A[0], curve)
        _fused.gelu_chain(curve, slope, A[1:], D)
