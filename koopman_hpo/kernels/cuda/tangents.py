"""What else is done with all tangents at once; see `kernels.cpu.tangents`.

`Z dE_dtheta` in two stages, each in a fixed order, so that the same sizes give the same bits: every block sums its share of
the parameters in float64, then one block a tangent sums the shares.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float64

from .launch import covering, device_array, launch
from .storage import storage
from .sums import ROWS, block_sum, total


def project(Z, dE_dtheta, work, out, *, stream=0):
    """out[j] <- Z[j] . dE_dtheta.  Z: (q, p); dE_dtheta: (p,); work: (n, q) float64, for n shares (512 do); out: (q,).

    Either may be kept in half precision.
    """
    Z, dE, work, out = (device_array(x) for x in (Z, dE_dtheta, work, out))
    q, p = Z.shape
    n = min(len(work), covering(p))
    arithmetic = _arithmetic(dE)
    loads = storage(Z.dtype, arithmetic).load, storage(dE.dtype, arithmetic).load
    launch((_share if q == 1 else _shares)(*loads), (-(-q // ROWS), n), stream, Z, dE, work, sums=True)
    launch(total, (q, 1), stream, work, n, out, sums=True)


def scale(tangents, rho, *, stream=0):
    """Multiply a tangent array of any shape by rho, in place; 0 clears it, also where it is not finite."""
    x = device_array(tangents)
    arithmetic = _arithmetic(x)
    load, store = storage(x.dtype, arithmetic)
    launch(_scale(load, store), (covering(-(-x.size // 4)), 1), stream, x.reshape(x.size), arithmetic.type(rho))


def _arithmetic(x):
    return np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype


@cache
def _shares(load, load_e):
    @cuda.jit
    def kernel(Z, dE, work):
        """work[y, j] <- the share y of tangent j, for ROWS tangents j; the last one again where there are fewer."""
        q, p = Z.shape
        j = ROWS * cuda.blockIdx.x
        j1, j2, j3 = min(j + 1, q - 1), min(j + 2, q - 1), min(j + 3, q - 1)
        s0 = s1 = s2 = s3 = float64(0)
        for i in range(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x, p, cuda.gridDim.y * cuda.blockDim.x):
            e = float64(load_e(dE[i]))
            s0 += load(Z[j, i]) * e
            s1 += load(Z[j1, i]) * e
            s2 += load(Z[j2, i]) * e
            s3 += load(Z[j3, i]) * e
        shared = cuda.shared.array(0, float64)
        s0, s1, s2, s3 = block_sum(s0, shared), block_sum(s1, shared), block_sum(s2, shared), block_sum(s3, shared)
        if cuda.threadIdx.x == 0:
            y = cuda.blockIdx.y
            work[y, j], work[y, j1], work[y, j2], work[y, j3] = s0, s1, s2, s3

    return kernel


@cache
def _share(load, load_e):
    @cuda.jit
    def kernel(Z, dE, work):
        """work[y, 0] <- the share y of the only tangent, which keeps the memory busy at four places at once."""
        p, s = Z.shape[1], float64(0)
        i, step = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x, cuda.gridDim.y * cuda.blockDim.x
        while i + 3 * step < p:
            e, ea = float64(load_e(dE[i])), float64(load_e(dE[i + step]))
            eb, ec = float64(load_e(dE[i + 2 * step])), float64(load_e(dE[i + 3 * step]))
            s += load(Z[0, i]) * e + load(Z[0, i + step]) * ea
            s += load(Z[0, i + 2 * step]) * eb + load(Z[0, i + 3 * step]) * ec
            i += 4 * step
        while i < p:
            s += load(Z[0, i]) * float64(load_e(dE[i]))
            i += step
        s = block_sum(s, cuda.shared.array(0, float64))
        if cuda.threadIdx.x == 0:
            work[cuda.blockIdx.y, 0] = s

    return kernel


@cache
def _scale(load, store):
    @cuda.jit
    def kernel(x, rho):
        i, step = cuda.grid(1), cuda.gridsize(1)
        while i + 3 * step < x.size and rho != 0:  # four places at once keep the memory busy
            ia, ib, ic = i + step, i + 2 * step, i + 3 * step
            y, ya, yb, yc = load(x[i]), load(x[ia]), load(x[ib]), load(x[ic])
            x[i], x[ia], x[ib], x[ic] = store(y * rho), store(ya * rho), store(yb * rho), store(yc * rho)
            i += 4 * step
        while i < x.size:
            x[i] = store(load(x[i]) * rho) if rho != 0 else store(rho)
            i += step

    return kernel
