"""Each inner optimizer's formulas, once, as scalars: the direction of the step and the tangent of everything it moves.

A rule sees one parameter.  `c` holds the hyperparameters, `dc` their derivatives along one tangent direction, in the
order given by the optimizer's `rows` in `koopman_hpo.optimizers`.  `*_direction` returns what the step needs and what
every tangent shares (so that no root or division is taken once a direction); `*_tangent` is then linear in the
tangents.  Lazy `@njit` without signatures: CUDA kernels call the same functions.  Division follows NumPy (inf and NaN,
no exception), without which no loop that divides is vectorised: Adam's kernel takes two thirds of the time.

No literal floats: `1.0` is float64 and would promote float32 arithmetic, so constants come in as hyperparameters:
`1 - beta` as a row of its own, computed in float64 on the host, and `one`, which is 1 in the arithmetic's own type.
"""

from __future__ import annotations

import math

from numba import njit


@njit(error_model="numpy")
def sgd_direction(theta, m, g, c, nesterov):
    """d, the new momentum buffer, and the direction u of `theta - lr * u`."""
    _, mu, keep, wd = c
    d = g + wd * theta
    m1 = mu * m + keep * d
    u = d + mu * m1 if nesterov else m1
    return d, m1, u


@njit(error_model="numpy")
def sgd_tangent(z, dm, dg, old, new, c, dc, nesterov):
    """Tangents of theta and of the momentum buffer after the step."""
    theta, m = old
    d, m1, u = new
    lr, mu, keep, wd = c
    dlr, dmu, dkeep, dwd = dc
    dd = dg + wd * z + dwd * theta
    dm1 = mu * dm + dmu * m + keep * dd + dkeep * d
    du = dd + mu * dm1 + dmu * m1 if nesterov else dm1
    return z - lr * du - dlr * u, dm1


@njit(error_model="numpy")
def half_inverse(r, one):
    """`1 / (2 r)`, the derivative of the root at r^2; zero at zero, where every squared gradient was zero."""
    return one / (r + r) if r > 0 else r


@njit(error_model="numpy")
def adam_direction(theta, m, v, g, c, decoupled):
    """d, new moments, m_hat / denominator, 1 / denominator, and half the inverse root of v_hat."""
    _, b1, a1, b2, a2, i1, i2, eps, wd, one = c
    d = g if decoupled else g + wd * theta
    m1 = b1 * m + a1 * d
    v1 = b2 * v + a2 * (d * d)
    r = math.sqrt(i2 * v1)
    inverse = one / (r + eps)
    return d, m1, v1, i1 * m1 * inverse, inverse, half_inverse(r, one)


@njit(error_model="numpy")
def adam_tangent(z, dm, dv, dg, old, new, c, dc, decoupled):
    """Tangents of theta and both moments.  `i1 = 1 / (1 - beta1^t)` and `i2` carry the derivative of the bias
    correction with respect to the betas, which a scalar correction drops."""
    theta, m, v = old
    d, m1, v1, u, inverse, half = new
    lr, b1, a1, b2, a2, i1, i2, _, wd, _ = c
    dlr, db1, da1, db2, da2, di1, di2, deps, dwd, _ = dc
    dd = dg if decoupled else dg + wd * z + dwd * theta
    ddd = d * dd
    dm1 = b1 * dm + db1 * m + a1 * dd + da1 * d
    dv1 = b2 * dv + db2 * v + a2 * (ddd + ddd) + da2 * (d * d)
    droot = half * (i2 * dv1 + di2 * v1)
    du = inverse * (i1 * dm1 + di1 * m1 - u * (droot + deps))
    if decoupled:
        return z - lr * (du + wd * z + dwd * theta) - dlr * (u + wd * theta), dm1, dv1
    return z - lr * du - dlr * u, dm1, dv1


@njit(error_model="numpy")
def rmsprop_direction(theta, state, g, c, centered):
    """d, new square average, mean and momentum buffer, d / denominator, 1 / denominator, half the inverse root."""
    v, a, m = state
    _, alpha, keep, mu, eps, wd, one = c
    d = g + wd * theta
    v1 = alpha * v + keep * (d * d)
    a1 = alpha * a + keep * d
    w = v1 - a1 * a1 if centered else v1
    r = math.sqrt(w) if w > 0 else w - w  # rounding can take a variance of zero below zero
    inverse = one / (r + eps)
    u = d * inverse
    return d, v1, a1, mu * m + u, u, inverse, half_inverse(r, one)


@njit(error_model="numpy")
def rmsprop_tangent(z, dstate, dg, old, new, c, dc, centered):
    """Tangents of theta, square average, mean and momentum buffer."""
    theta, v, a, m = old
    d, _, a1, m1, u, inverse, half = new
    lr, alpha, keep, mu, _, wd, _ = c
    dlr, dalpha, dkeep, dmu, deps, dwd, _ = dc
    dv, da, dm = dstate
    dd = dg + wd * z + dwd * theta
    ddd = d * dd
    dv1 = alpha * dv + dalpha * v + keep * (ddd + ddd) + dkeep * (d * d)
    da1 = alpha * da + dalpha * a + keep * dd + dkeep * d
    dw = dv1 - a1 * da1 - a1 * da1 if centered else dv1
    dm1 = mu * dm + dmu * m + inverse * (dd - u * (half * dw + deps))
    return z - lr * dm1 - dlr * m1, dv1, da1, dm1


@njit(error_model="numpy")
def adagrad_direction(theta, v, g, c):
    """d, new sum of squares, d / denominator, 1 / denominator, half the inverse root."""
    _, eps, wd, one = c
    d = g + wd * theta
    v1 = v + d * d
    r = math.sqrt(v1)
    inverse = one / (r + eps)
    return d, v1, d * inverse, inverse, half_inverse(r, one)


@njit(error_model="numpy")
def adagrad_tangent(z, dv, dg, theta, new, c, dc):
    """Tangents of theta and of the sum of squares; `lr` is the decayed rate."""
    d, _, u, inverse, half = new
    lr, _, wd, _ = c
    dlr, deps, dwd, _ = dc
    dd = dg + wd * z + dwd * theta
    ddd = d * dd
    dv1 = dv + ddd + ddd
    du = inverse * (dd - u * (half * dv1 + deps))
    return z - lr * du - dlr * u, dv1


@njit(error_model="numpy")
def lion_direction(theta, m, g, c):
    """New momentum and the signed direction."""
    _, b1, a1, b2, a2, wd, one = c
    s = b1 * m + a1 * g
    sign = one if s > 0 else (-one if s < 0 else s - s)
    return b2 * m + a2 * g, sign + wd * theta


@njit(error_model="numpy")
def lion_tangent(z, dm, dg, old, u, c, dc):
    """Tangents of theta and the momentum.  The derivative of the sign is zero wherever it exists: taken as zero."""
    theta, m, g = old
    lr, _, _, b2, a2, wd, _ = c
    dlr, _, _, db2, da2, dwd, _ = dc
    dm1 = b2 * dm + db2 * m + a2 * dg + da2 * g
    return z - lr * (wd * z + dwd * theta) - dlr * u, dm1
