"""Loops over a trajectory in device memory, worth it where q is large; see `kernels.cpu.trajectory`."""

from __future__ import annotations

from numba import cuda, float64

from .launch import covering, device_array, launch
from .sums import ROWS, block_sum, total


def gram_row(H, m, block, work, out, *, stream=0):
    """out[i] <- (H[i] - H[0]) . (H[m-1] - H[0]) for i < m.  `block` is for the CPU's cache.

    H: (>= m, q); work: (n, >= m) float64, for n shares (512 do); out: (>= m,).
    """
    H, work, out = device_array(H), device_array(work), device_array(out)
    n = min(len(work), covering(H.shape[1]))
    launch(_row_shares, (-(-m // ROWS), n), stream, H, m, work, sums=True)
    launch(total, (m, 1), stream, work, n, out, sums=True)


def gram(H, out, *, stream=0):
    """out <- Gram matrix of the snapshots minus the first.  H: (m, q); out: (m, m)."""
    H, out = device_array(H), device_array(out)
    launch(_gram, (len(H), len(H)), stream, H, out, sums=True)


def hankel_gram(G, d, out, *, stream=0):
    """out <- sum of the d shifted diagonal blocks of G: the Gram matrix of d stacked snapshots.

    G: (m, m) symmetric; out: (m - d + 1, m - d + 1).
    """
    G, out = device_array(G), device_array(out)
    launch(_hankel_gram, (covering((len(G) - d + 1) ** 2), 1), stream, G, d, out)


def combine(c, H, out, *, stream=0):
    """out[j] <- sum over snapshots of c[i] H[i, j]: a forecast from its weights.  c: (m,); H: (m, q); out: (q,)."""
    c, H, out = device_array(c), device_array(H), device_array(out)
    launch(_combine, (covering(-(-H.shape[1] // 4)), 1), stream, c, H, out)


@cuda.jit
def _row_shares(H, m, work):
    """work[y, i] <- the share y of product i, for ROWS products i; the last one again where there are fewer."""
    i = ROWS * cuda.blockIdx.x
    i1, i2, i3 = min(i + 1, m - 1), min(i + 2, m - 1), min(i + 3, m - 1)
    s0 = s1 = s2 = s3 = float64(0)
    j, step = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x, cuda.gridDim.y * cuda.blockDim.x
    while j + 3 * step < H.shape[1]:  # four places at once keep the memory busy
        ja, jb, jc = j + step, j + 2 * step, j + 3 * step
        f, fa, fb, fc = H[0, j], H[0, ja], H[0, jb], H[0, jc]
        l, la = float64(H[m - 1, j] - f), float64(H[m - 1, ja] - fa)
        lb, lc = float64(H[m - 1, jb] - fb), float64(H[m - 1, jc] - fc)
        s0 += (H[i, j] - f) * l + (H[i, ja] - fa) * la + (H[i, jb] - fb) * lb + (H[i, jc] - fc) * lc
        s1 += (H[i1, j] - f) * l + (H[i1, ja] - fa) * la + (H[i1, jb] - fb) * lb + (H[i1, jc] - fc) * lc
        s2 += (H[i2, j] - f) * l + (H[i2, ja] - fa) * la + (H[i2, jb] - fb) * lb + (H[i2, jc] - fc) * lc
        s3 += (H[i3, j] - f) * l + (H[i3, ja] - fa) * la + (H[i3, jb] - fb) * lb + (H[i3, jc] - fc) * lc
        j += 4 * step
    while j < H.shape[1]:
        first = H[0, j]
        last = float64(H[m - 1, j] - first)
        s0 += (H[i, j] - first) * last
        s1 += (H[i1, j] - first) * last
        s2 += (H[i2, j] - first) * last
        s3 += (H[i3, j] - first) * last
        j += step
    shared = cuda.shared.array(0, float64)
    s0, s1, s2, s3 = block_sum(s0, shared), block_sum(s1, shared), block_sum(s2, shared), block_sum(s3, shared)
    if cuda.threadIdx.x == 0:
        y = cuda.blockIdx.y
        work[y, i], work[y, i1], work[y, i2], work[y, i3] = s0, s1, s2, s3


@cuda.jit
def _gram(H, out):
    """One block a pair of snapshots."""
    i, k, s = cuda.blockIdx.x, cuda.blockIdx.y, float64(0)
    if k <= i:  # for all of the block
        for j in range(cuda.threadIdx.x, H.shape[1], cuda.blockDim.x):
            s += (H[i, j] - H[0, j]) * (H[k, j] - H[0, j])
        s = block_sum(s, cuda.shared.array(0, float64))
        if cuda.threadIdx.x == 0:
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
    j, step = cuda.grid(1), cuda.gridsize(1)
    while j + 3 * step < H.shape[1]:  # four places at once keep the memory busy
        s = sa = sb = sc = float64(0)
        for i in range(H.shape[0]):
            s += c[i] * H[i, j]
            sa += c[i] * H[i, j + step]
            sb += c[i] * H[i, j + 2 * step]
            sc += c[i] * H[i, j + 3 * step]
        out[j], out[j + step], out[j + 2 * step], out[j + 3 * step] = s, sa, sb, sc
        j += 4 * step
    while j < H.shape[1]:
        s = float64(0)
        for i in range(H.shape[0]):
            s += c[i] * H[i, j]
        out[j] = s
        j += step
