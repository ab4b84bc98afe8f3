"""Sums over a block of threads, in a fixed order: the same bits at every run, without atomics."""

from __future__ import annotations

from numba import cuda


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
