"""Sums over a block of threads, in a fixed order: the same bits at every run, without atomics."""

from __future__ import annotations

from numba import cuda, float64

ROWS = 4  # sums that one thread takes at once: what they share is read once for all of them


@cuda.jit(device=True)
def block_sum(s, shared):
    """The sum of s over the block's threads, for all of them.  shared: a float64 for each thread."""
    lane, half = cuda.threadIdx.x, cuda.blockDim.x // 2
    shared[lane] = s
    cuda.syncthreads()
    while half > 0:
        if lane < half:
            shared[lane] += shared[lane + half]
        cuda.syncthreads()
        half //= 2
    total = shared[0]
    cuda.syncthreads()  # before the next sum overwrites it
    return total


@cuda.jit
def total(work, n, out):
    """out[j] <- the sum of the first n shares of sum j."""
    j, s = cuda.blockIdx.x, float64(0)
    for y in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        s += work[y, j]
    s = block_sum(s, cuda.shared.array(0, float64))
    if cuda.threadIdx.x == 0:
        out[j] = s
