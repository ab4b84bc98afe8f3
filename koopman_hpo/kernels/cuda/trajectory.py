"""Loops over a trajectory in device memory, worth it where q is large; see `kernels.cpu.trajectory`."""

from __future__ import annotations

from numba import cuda, float64

from .launch import covering, device_array, launch
from .sums import block_sum


def gram_row(H, m, block, out, *, stream=0):
    """out[i] <- (H[i] - H[0]) . (H[m-1] - H[0]) for i < m.  H: (>= m, q); out: (>= m,).  `block` is for the CPU's cache."""
    launch(_gram_row, (m, 1), stream, device_array(H), m, device_array(out), sums=True)


def gram(H, out, *, stream=0):
    """out <- Gram matrix of the snapshots minus the first.  H: (m, q); out: (m, m)."""
    H, out = device_array(H), device_array(out)
    launch(_gram, (covering(len(H) ** 2), 1), stream, H, out)


def hankel_gram(G, d, out, *, stream=0):
    """out <- sum of the d shifted diagonal blocks of G: the Gram matrix of d stacked snapshots.

    G: (m, m) symmetric; out: (m - d + 1, m - d + 1).
    """
    G, out = device_array(G), device_array(out)
    launch(_hankel_gram, (covering((len(G) - d + 1) ** 2), 1), stream, G, d, out)


def combine(c, H, out, *, stream=0):
    """out[j] <- sum over snapshots of c[i] H[i, j]: a forecast from its weights.  c: (m,); H: (m, q); out: (q,)."""
    c, H, out = device_array(c), device_array(H), device_array(out)
    launch(_combine, (covering(H.shape[1]), 1), stream, c, H, out)


@cuda.jit
def _gram_row(H, m, out):
    i, s = cuda.blockIdx.x, float64(0)
    for j in range(cuda.threadIdx.x, H.shape[1], cuda.blockDim.x):
        s += (H[i, j] - H[0, j]) * (H[m - 1, j] - H[0, j])
    s = block_sum(s, cuda.shared.array(0, float64))
    if cuda.threadIdx.x == 0:
        out[i] = s


@cuda.jit
def _gram(H, out):
    m = H.shape[0]
    for n in range(cuda.grid(1), m * m, cuda.gridsize(1)):
        i, k = n // m, n % m
        if k <= i:
            s = float64(0)
            for j in range(H.shape[1]):
                s += (H[i, j] - H[0, j]) * (H[k, j] - H[0, j])
            out[i, k] = s
            out[k, i] = s


@cuda.jit
def _hankel_gram(G, d, out):
    m = G.shape[0] - d + 1
    for n in range(cuda.grid(1), m * m, cuda.gridsize(1)):
        i, j = n // m, n % m
        s = G[i, j]
        for k in range(1, d):
            s += G[i + k, j + k]
        out[i, j] = s


@cuda.jit
def _combine(c, H, out):
    for j in range(cuda.grid(1), H.shape[1], cuda.gridsize(1)):
        s = float64(0)
        for i in range(H.shape[0]):
            s += c[i] * H[i, j]
        out[j] = s
