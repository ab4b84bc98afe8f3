"""The fused updates of SGD and Adam written with torch's own operations: what the CUDA kernels have to beat.

`eager` is what one would write first, and what `torch.compile` gets; `foreach` is what torch's own optimizers do with lists
of tensors.  Each takes `(state, grads, c, dc)`, `c` the rows of the kernel as floats and `dc` (rows, q), and moves the
state in place.
"""

from __future__ import annotations

import torch


def sgd_eager(state, grads, c, dc):
    theta, slots, Z, dslots = state
    g, dG = grads
    (lr, mu, keep, wd), (dlr, dmu, dkeep, dwd) = c, dc[:, :, None]
    m, dm = slots[0], dslots[0]
    d, dd = g + wd * theta, dG + wd * Z + dwd * theta
    m1 = mu * m + keep * d
    dm1 = mu * dm + dmu * m + keep * dd + dkeep * d
    Z.copy_(Z - lr * dm1 - dlr * m1)
    dm.copy_(dm1)
    theta.copy_(theta - lr * m1)
    m.copy_(m1)


def adam_eager(state, grads, c, dc):
    theta, slots, Z, dslots = state
    g, dG = grads
    lr, b1, a1, b2, a2, i1, i2, eps, wd, _ = c
    dlr, db1, da1, db2, da2, di1, di2, deps, dwd, _ = dc[:, :, None]
    (m, v), (dm, dv) = slots, dslots
    d, dd = g + wd * theta, dG + wd * Z + dwd * theta
    m1, v1 = b1 * m + a1 * d, b2 * v + a2 * d * d
    dm1 = b1 * dm + db1 * m + a1 * dd + da1 * d
    dv1 = b2 * dv + db2 * v + 2 * a2 * d * dd + da2 * d * d
    root = torch.sqrt(i2 * v1)
    u = i1 * m1 / (root + eps)
    droot = (i2 * dv1 + di2 * v1) / (2 * root)
    du = (i1 * dm1 + di1 * m1 - u * (droot + deps)) / (root + eps)
    Z.copy_(Z - lr * du - dlr * u)
    dm.copy_(dm1)
    dv.copy_(dv1)
    theta.copy_(theta - lr * u)
    m.copy_(m1)
    v.copy_(v1)


def _sum(*terms):
    """Sums of lists of tensors, each term (tensors, factors)."""
    total = torch._foreach_mul(*terms[0])
    for tensors, factors in terms[1:]:
        torch._foreach_add_(total, torch._foreach_mul(tensors, factors))
    return total


def sgd_foreach(state, grads, c, dc):
    theta, slots, Z, dslots = state
    q = len(Z)
    (lr, mu, keep, wd), (dlr, dmu, dkeep, dwd) = c, dc.tolist()
    m, z, dm, dg = slots[0], list(Z), list(dslots[0]), list(grads.dG)
    d = grads.g + wd * theta
    m1 = mu * m + keep * d
    dd = _sum((dg, 1.0), (z, wd), ([theta] * q, dwd))
    torch._foreach_mul_(dm, mu)
    torch._foreach_add_(dm, _sum(([m] * q, dmu), (dd, keep), ([d] * q, dkeep)))
    torch._foreach_sub_(z, _sum((dm, lr), ([m1] * q, dlr)))
    theta.sub_(m1, alpha=lr)
    m.copy_(m1)


def adam_foreach(state, grads, c, dc):
    theta, slots, Z, dslots = state
    q = len(Z)
    lr, b1, a1, b2, a2, i1, i2, eps, wd, _ = c
    dlr, db1, da1, db2, da2, di1, di2, deps, dwd, _ = dc.tolist()
    (m, v), z, dg = slots, list(Z), list(grads.dG)
    dm, dv = list(dslots[0]), list(dslots[1])
    d = grads.g + wd * theta
    dd = _sum((dg, 1.0), (z, wd), ([theta] * q, dwd))
    square, twice = d * d, 2 * a2 * d
    torch._foreach_mul_(dm, b1)
    torch._foreach_add_(dm, _sum(([m] * q, db1), (dd, a1), ([d] * q, da1)))
    torch._foreach_mul_(dd, [twice] * q)
    torch._foreach_mul_(dv, b2)
    torch._foreach_add_(dv, _sum(([v] * q, db2), (dd, 1.0), ([square] * q, da2)))
    m.mul_(b1).add_(d, alpha=a1)
    v.mul_(b2).add_(square, alpha=a2)
    root = torch.sqrt(i2 * v)
    inverse = 1 / (root + eps)
    u = i1 * m * inverse
    droot = _sum((dv, i2), ([v] * q, di2))
    torch._foreach_mul_(droot, [0.5 / root] * q)
    torch._foreach_add_(droot, deps)
    torch._foreach_mul_(droot, [u] * q)
    du = _sum((dm, i1), ([m] * q, di1))
    torch._foreach_sub_(du, droot)
    torch._foreach_mul_(du, [inverse] * q)
    torch._foreach_sub_(z, _sum((du, lr), ([u] * q, dlr)))
    theta.sub_(u, alpha=lr)


UPDATES = {"sgd": (sgd_eager, sgd_foreach), "adam": (adam_eager, adam_foreach)}


def opponents(name, backend):
    """(label, update) of all three; the compiled one wants a compiler."""
    eager, foreach = UPDATES[name]
    return ("eager", eager), ("foreach", foreach), ("compiled", torch.compile(eager, backend=backend))
