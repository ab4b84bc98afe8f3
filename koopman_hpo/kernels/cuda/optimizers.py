"""One inner step: theta, slots and every tangent of both, in one pass over memory; see `kernels.cpu.optimizers`.

A thread takes one parameter and all its tangents: neighbours read neighbouring addresses, and what the tangents share stays
in registers, so that `work` is not needed (None will do).  A block of threads takes one run of `blocks` after another: the
hyperparameters are the same for all of it.  Each kernel is compiled for each kind of `storage` it meets.

What keeps registers few, and so the card full (40 to 56 in float32 on sm_90, 60 to 88 without): indices without a sign,
which Numba need not wrap; `while`, as a `for` with a step divides for its count; coefficients read where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ..arrays import Coefficients, Grads, TangentState
from ..rules import (
    adagrad_direction,
    adagrad_tangent,
    adam_direction,
    adam_tangent,
    lion_direction,
    lion_tangent,
    rmsprop_direction,
    rmsprop_tangent,
    sgd_direction,
    sgd_tangent,
)
from . import launch as run
from .launch import device_array, device_arrays, launch
from .storage import storage


def sgd(grads, coefficients, blocks, nesterov, work, state, *, stream=0):
    """Slots: momentum buffer.  Rows: lr, momentum, 1 - dampening, weight_decay."""
    _step(_sgd, grads, coefficients, blocks, nesterov, state, stream)


def adam(grads, coefficients, blocks, decoupled, work, state, *, stream=0):
    """Slots: both moments.  Rows: lr, b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1^t), 1 / (1 - b2^t), eps, weight_decay, one."""
    _step(_adam, grads, coefficients, blocks, decoupled, state, stream)


def rmsprop(grads, coefficients, blocks, centered, work, state, *, stream=0):
    """Slots: square average, mean, momentum buffer.  Rows: lr, alpha, 1 - alpha, momentum, eps, weight_decay, one."""
    _step(_rmsprop, grads, coefficients, blocks, centered, state, stream)


def adagrad(grads, coefficients, blocks, flag, work, state, *, stream=0):
    """Slots: sum of squares.  Rows: decayed lr, eps, weight_decay, one.  `flag` is unused."""
    _step(_adagrad, grads, coefficients, blocks, flag, state, stream)


def lion(grads, coefficients, blocks, flag, work, state, *, stream=0):
    """Slots: momentum.  Rows: lr, b1, 1 - b1, b2, 1 - b2, weight_decay, one.  `flag` is unused."""
    _step(_lion, grads, coefficients, blocks, flag, state, stream)


def _step(
    compiled: Callable[..., Any],
    grads: Grads,
    coefficients: Coefficients,
    blocks: Any,
    flag: bool,
    state: TangentState,
    stream: Any,
) -> None:
    theta, slots, Z, dslots = device_arrays(state)
    (g, dG), (c, dc) = device_arrays(grads), device_arrays(coefficients)
    load, store = storage(Z.dtype, theta.dtype)
    kernel = compiled(load, store, storage(dG.dtype, theta.dtype).load)
    blocks = device_array(blocks)
    grid, arrays = (min(len(blocks), run.BLOCKS), 1), (theta, slots, Z, dslots, g, dG, c, dc, blocks)
    launch(kernel, grid, stream, *arrays, bool(flag), parts=2)  # on an H100 3 % faster than in one part


@cache
def _sgd(load, store, load_dg):
    @cuda.jit
    def kernel(theta, slots, Z, dslots, g, dG, c, dc, blocks, nesterov):
        for b in range(cuda.blockIdx.x, blocks.shape[0], cuda.gridDim.x):
            k, at = np.uint64(blocks[b, 0]), blocks[b, 1] + cuda.threadIdx.x
            while at < blocks[b, 2]:
                i = np.uint64(at)
                cs = (c[0, k], c[1, k], c[2, k], c[3, k])
                old = (theta[i], slots[0, i])
                new = sgd_direction(old[0], old[1], g[i], cs, nesterov)
                for j in range(np.uint64(Z.shape[0])):
                    dcs = (dc[0, j, k], dc[1, j, k], dc[2, j, k], dc[3, j, k])
                    z, dm, dg = load(Z[j, i]), load(dslots[0, j, i]), load_dg(dG[j, i])
                    z, dm = sgd_tangent(z, dm, dg, old, new, cs, dcs, nesterov)
                    Z[j, i], dslots[0, j, i] = store(z), store(dm)
                _, m1, u = new
                theta[i], slots[0, i] = old[0] - cs[0] * u, m1
                at += cuda.blockDim.x

    return kernel


@cache
def _adam(load, store, load_dg):
    @cuda.jit
    def kernel(theta, slots, Z, dslots, g, dG, c, dc, blocks, decoupled):
        for b in range(cuda.blockIdx.x, blocks.shape[0], cuda.gridDim.x):
            k, at = np.uint64(blocks[b, 0]), blocks[b, 1] + cuda.threadIdx.x
            while at < blocks[b, 2]:
                i = np.uint64(at)
                cs = (c[0, k], c[1, k], c[2, k], c[3, k], c[4, k], c[5, k], c[6, k], c[7, k], c[8, k], c[9, k])
                old = (theta[i], slots[0, i], slots[1, i])
                new = adam_direction(old[0], old[1], old[2], g[i], cs, decoupled)
                for j in range(np.uint64(Z.shape[0])):
                    first = (dc[0, j, k], dc[1, j, k], dc[2, j, k], dc[3, j, k], dc[4, j, k])
                    dcs = (*first, dc[5, j, k], dc[6, j, k], dc[7, j, k], dc[8, j, k], dc[9, j, k])
                    z, dm, dv, dg = load(Z[j, i]), load(dslots[0, j, i]), load(dslots[1, j, i]), load_dg(dG[j, i])
                    z, dm, dv = adam_tangent(z, dm, dv, dg, old, new, cs, dcs, decoupled)
                    Z[j, i], dslots[0, j, i], dslots[1, j, i] = store(z), store(dm), store(dv)
                _, m1, v1, u, _, _ = new
                step = u + cs[8] * old[0] if decoupled else u
                theta[i], slots[0, i], slots[1, i] = old[0] - cs[0] * step, m1, v1
                at += cuda.blockDim.x

    return kernel


@cache
def _rmsprop(load, store, load_dg):
    @cuda.jit
    def kernel(theta, slots, Z, dslots, g, dG, c, dc, blocks, centered):
        for b in range(cuda.blockIdx.x, blocks.shape[0], cuda.gridDim.x):
            k, at = np.uint64(blocks[b, 0]), blocks[b, 1] + cuda.threadIdx.x
            while at < blocks[b, 2]:
                i = np.uint64(at)
                cs = (c[0, k], c[1, k], c[2, k], c[3, k], c[4, k], c[5, k], c[6, k])
                old = (theta[i], slots[0, i], slots[1, i], slots[2, i])
                new = rmsprop_direction(old[0], (old[1], old[2], old[3]), g[i], cs, centered)
                for j in range(np.uint64(Z.shape[0])):
                    dcs = (dc[0, j, k], dc[1, j, k], dc[2, j, k], dc[3, j, k], dc[4, j, k], dc[5, j, k], dc[6, j, k])
                    dstate = (load(dslots[0, j, i]), load(dslots[1, j, i]), load(dslots[2, j, i]))
                    z, dg = load(Z[j, i]), load_dg(dG[j, i])
                    z, dv, da, dm = rmsprop_tangent(z, dstate, dg, old, new, cs, dcs, centered)
                    Z[j, i], dslots[0, j, i], dslots[1, j, i], dslots[2, j, i] = store(z), store(dv), store(da), store(dm)
                _, v1, a1, m1, _, _, _ = new
                theta[i], slots[0, i], slots[1, i], slots[2, i] = old[0] - cs[0] * m1, v1, a1, m1
                at += cuda.blockDim.x

    return kernel


@cache
def _adagrad(load, store, load_dg):
    @cuda.jit
    def kernel(theta, slots, Z, dslots, g, dG, c, dc, blocks, flag):
        for b in range(cuda.blockIdx.x, blocks.shape[0], cuda.gridDim.x):
            k, at = np.uint64(blocks[b, 0]), blocks[b, 1] + cuda.threadIdx.x
            while at < blocks[b, 2]:
                i = np.uint64(at)
                cs = (c[0, k], c[1, k], c[2, k], c[3, k])
                old = theta[i]
                new = adagrad_direction(old, slots[0, i], g[i], cs)
                for j in range(np.uint64(Z.shape[0])):
                    dcs = (dc[0, j, k], dc[1, j, k], dc[2, j, k], dc[3, j, k])
                    z, dv, dg = load(Z[j, i]), load(dslots[0, j, i]), load_dg(dG[j, i])
                    z, dv = adagrad_tangent(z, dv, dg, old, new, cs, dcs)
                    Z[j, i], dslots[0, j, i] = store(z), store(dv)
                _, v1, u, _, _ = new
                theta[i], slots[0, i] = old - cs[0] * u, v1
                at += cuda.blockDim.x

    return kernel


@cache
def _lion(load, store, load_dg):
    @cuda.jit
    def kernel(theta, slots, Z, dslots, g, dG, c, dc, blocks, flag):
        for b in range(cuda.blockIdx.x, blocks.shape[0], cuda.gridDim.x):
            k, at = np.uint64(blocks[b, 0]), blocks[b, 1] + cuda.threadIdx.x
            while at < blocks[b, 2]:
                i = np.uint64(at)
                cs = (c[0, k], c[1, k], c[2, k], c[3, k], c[4, k], c[5, k], c[6, k])
                old = (theta[i], slots[0, i], g[i])
                new = lion_direction(old[0], old[1], old[2], cs)
                for j in range(np.uint64(Z.shape[0])):
                    dcs = (dc[0, j, k], dc[1, j, k], dc[2, j, k], dc[3, j, k], dc[4, j, k], dc[5, j, k], dc[6, j, k])
                    z, dm, dg = load(Z[j, i]), load(dslots[0, j, i]), load_dg(dG[j, i])
                    z, dm = lion_tangent(z, dm, dg, old, new[1], cs, dcs)
                    Z[j, i], dslots[0, j, i] = store(z), store(dm)
                m1, u = new
                theta[i], slots[0, i] = old[0] - cs[0] * u, m1
                at += cuda.blockDim.x

    return kernel
