"""One inner step: theta, slots and every tangent of both, in one pass over memory.

All kernels share the signature `(grads, coefficients, blocks, flag, work, state)` and update `state` in place.
`blocks` (n, 3) cuts the flat vector into runs `(group, start, stop)` that fit the first-level cache; the hyperparameters
are constant within a run.  Within a run: what all tangents share goes to `work`, then the tangents are pushed with the
old state, then the state moves.
"""

from __future__ import annotations

from numba import njit

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


@njit(cache=True, nogil=True, error_model="numpy")
def sgd(grads, coefficients, blocks, nesterov, work, state):
    """Slots: momentum buffer.  Rows: lr, momentum, 1 - dampening, weight_decay."""
    theta, slots, Z, dslots = state
    c, dc = coefficients
    for group, start, stop in blocks:
        n = stop - start
        th, m, g = theta[start:stop], slots[0, start:stop], grads.g[start:stop]
        d, m1, u = work[0, :n], work[1, :n], work[2, :n]
        cs = (c[0, group], c[1, group], c[2, group], c[3, group])
        for i in range(n):
            d[i], m1[i], u[i] = sgd_direction(th[i], m[i], g[i], cs, nesterov)
        for j in range(Z.shape[0]):
            z, dm, dg = Z[j, start:stop], dslots[0, j, start:stop], grads.dG[j, start:stop]
            dcs = (dc[0, j, group], dc[1, j, group], dc[2, j, group], dc[3, j, group])
            for i in range(n):
                new = (d[i], m1[i], u[i])
                z[i], dm[i] = sgd_tangent(z[i], dm[i], dg[i], (th[i], m[i]), new, cs, dcs, nesterov)
        for i in range(n):
            th[i], m[i] = th[i] - cs[0] * u[i], m1[i]


@njit(cache=True, nogil=True, error_model="numpy")
def adam(grads, coefficients, blocks, decoupled, work, state):
    """Slots: both moments.  Rows: lr, b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1^t), 1 / (1 - b2^t), eps, weight_decay, one."""
    theta, slots, Z, dslots = state
    c, dc = coefficients
    for group, start, stop in blocks:
        n = stop - start
        th, m, v, g = theta[start:stop], slots[0, start:stop], slots[1, start:stop], grads.g[start:stop]
        d, m1, v1, u, inv, half = work[0, :n], work[1, :n], work[2, :n], work[3, :n], work[4, :n], work[5, :n]
        k = group
        cs = (c[0, k], c[1, k], c[2, k], c[3, k], c[4, k], c[5, k], c[6, k], c[7, k], c[8, k], c[9, k])
        for i in range(n):
            d[i], m1[i], v1[i], u[i], inv[i], half[i] = adam_direction(th[i], m[i], v[i], g[i], cs, decoupled)
        for j in range(Z.shape[0]):
            z, dg = Z[j, start:stop], grads.dG[j, start:stop]
            dm, dv = dslots[0, j, start:stop], dslots[1, j, start:stop]
            e = dc[:, j, k]
            dcs = (e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], e[8], e[9])
            for i in range(n):
                old, new = (th[i], m[i], v[i]), (d[i], m1[i], v1[i], u[i], inv[i], half[i])
                z[i], dm[i], dv[i] = adam_tangent(z[i], dm[i], dv[i], dg[i], old, new, cs, dcs, decoupled)
        lr, wd = cs[0], cs[8]
        for i in range(n):
            step = u[i] + wd * th[i] if decoupled else u[i]
            th[i], m[i], v[i] = th[i] - lr * step, m1[i], v1[i]


@njit(cache=True, nogil=True, error_model="numpy")
def rmsprop(grads, coefficients, blocks, centered, work, state):
    """Slots: square average, mean, momentum buffer.  Rows: lr, alpha, 1 - alpha, momentum, eps, weight_decay, one."""
    theta, slots, Z, dslots = state
    c, dc = coefficients
    for group, start, stop in blocks:
        n = stop - start
        th, g = theta[start:stop], grads.g[start:stop]
        v, a, m = slots[0, start:stop], slots[1, start:stop], slots[2, start:stop]
        d, v1, a1, m1 = work[0, :n], work[1, :n], work[2, :n], work[3, :n]
        u, inv, half = work[4, :n], work[5, :n], work[6, :n]
        k = group
        cs = (c[0, k], c[1, k], c[2, k], c[3, k], c[4, k], c[5, k], c[6, k])
        for i in range(n):
            d[i], v1[i], a1[i], m1[i], u[i], inv[i], half[i] = rmsprop_direction(
                th[i], (v[i], a[i], m[i]), g[i], cs, centered
            )
        for j in range(Z.shape[0]):
            z, dg = Z[j, start:stop], grads.dG[j, start:stop]
            dv, da, dm = dslots[0, j, start:stop], dslots[1, j, start:stop], dslots[2, j, start:stop]
            e = dc[:, j, group]
            dcs = (e[0], e[1], e[2], e[3], e[4], e[5], e[6])
            for i in range(n):
                old = (th[i], v[i], a[i], m[i])
                new = (d[i], v1[i], a1[i], m1[i], u[i], inv[i], half[i])
                z[i], dv[i], da[i], dm[i] = rmsprop_tangent(z[i], (dv[i], da[i], dm[i]), dg[i], old, new, cs, dcs, centered)
        for i in range(n):
            th[i], v[i], a[i], m[i] = th[i] - cs[0] * m1[i], v1[i], a1[i], m1[i]


@njit(cache=True, nogil=True, error_model="numpy")
def adagrad(grads, coefficients, blocks, flag, work, state):
    """Slots: sum of squares.  Rows: decayed lr, eps, weight_decay, one.  `flag` is unused."""
    theta, slots, Z, dslots = state
    c, dc = coefficients
    for group, start, stop in blocks:
        n = stop - start
        th, v, g = theta[start:stop], slots[0, start:stop], grads.g[start:stop]
        d, v1, u, inv, half = work[0, :n], work[1, :n], work[2, :n], work[3, :n], work[4, :n]
        cs = (c[0, group], c[1, group], c[2, group], c[3, group])
        for i in range(n):
            d[i], v1[i], u[i], inv[i], half[i] = adagrad_direction(th[i], v[i], g[i], cs)
        for j in range(Z.shape[0]):
            z, dv, dg = Z[j, start:stop], dslots[0, j, start:stop], grads.dG[j, start:stop]
            dcs = (dc[0, j, group], dc[1, j, group], dc[2, j, group], dc[3, j, group])
            for i in range(n):
                new = (d[i], v1[i], u[i], inv[i], half[i])
                z[i], dv[i] = adagrad_tangent(z[i], dv[i], dg[i], th[i], new, cs, dcs)
        for i in range(n):
            th[i], v[i] = th[i] - cs[0] * u[i], v1[i]


@njit(cache=True, nogil=True, error_model="numpy")
def lion(grads, coefficients, blocks, flag, work, state):
    """Slots: momentum.  Rows: lr, b1, 1 - b1, b2, 1 - b2, weight_decay, one.  `flag` is unused."""
    theta, slots, Z, dslots = state
    c, dc = coefficients
    for group, start, stop in blocks:
        n = stop - start
        th, m, g = theta[start:stop], slots[0, start:stop], grads.g[start:stop]
        m1, u = work[0, :n], work[1, :n]
        cs = (c[0, group], c[1, group], c[2, group], c[3, group], c[4, group], c[5, group], c[6, group])
        for i in range(n):
            m1[i], u[i] = lion_direction(th[i], m[i], g[i], cs)
        for j in range(Z.shape[0]):
            z, dm, dg = Z[j, start:stop], dslots[0, j, start:stop], grads.dG[j, start:stop]
            e = dc[:, j, group]
            dcs = (e[0], e[1], e[2], e[3], e[4], e[5], e[6])
            for i in range(n):
                z[i], dm[i] = lion_tangent(z[i], dm[i], dg[i], (th[i], m[i], g[i]), u[i], cs, dcs)
        for i in range(n):
            th[i], m[i] = th[i] - cs[0] * u[i], m1[i]
