"""The noisy-quadratic correction: what the noise of mini-batches adds to the outer loss at the horizon.

Gradient noise leaves a covariance Sigma in the parameters, which raises the expected outer loss by `1/2 tr(V Sigma)`, V its
Hessian.  Sigma depends on the optimizer's hyperparameters: the derivative is added to h.  A few batches' deviations from
the mean gradient stand for the noise; each is followed in a Krylov space of its own (stochastic Lanczos quadrature), by
doubling, so that any horizon is one closed form.

Sources: Zhang et al. 2019, "Which algorithmic choices matter at which batch sizes? Insights from a noisy quadratic model";
Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ..problem import Array
from . import frozen
from .frozen import Small
from .model import Model
from .stage import SAFETY, Stage, operator


def spaces(starts: Array, product: Callable[[Array], Array], depth: int) -> tuple[Array, Array]:
    """(n, r, p) orthonormal Krylov basis of each start (n, p), r = depth at most, and its images; zero rows where a space
    is invariant."""
    n, p = starts.shape
    Q, images = np.zeros((2, n, min(depth, p), p))
    v = starts
    for i in range(Q.shape[1]):
        size = np.linalg.norm(v, axis=1, keepdims=True)
        for _ in range(2):
            v = v - np.einsum("nr,nrp->np", np.einsum("nrp,np->nr", Q, v), Q)
        rest = np.linalg.norm(v, axis=1, keepdims=True)
        Q[:, i] = np.divide(v, rest, out=np.zeros_like(v), where=rest > 1e-11 * size)
        v = images[:, i] = product(Q[:, i])
    return Q, images


def _small(stage: Stage, model: Model, Q: Array, images: Array) -> Small:
    """The independent runs of the noise samples, curvature clipped as in the stage."""
    T = np.einsum("nap,nbp->nab", Q, images)
    T = (T + T.swapaxes(1, 2)) / 2
    cuts = np.cumsum([0, *model.dynamics.groups])
    part = lambda w, a, b: np.einsum("nap,p,nbp->nab", Q[..., a:b], w[a:b], Q[..., a:b])
    masked = lambda w: np.stack([part(w, a, b) for a, b in pairwise(cuts)], 1)
    G, D = masked(np.ones(Q.shape[-1])), masked(stage.preconditioner)
    zero = np.zeros((*G.shape[:2], Q.shape[1]))
    rule = model.dynamics.rule
    plain = rule.name == "sgd"
    small = Small(T, zero[:, 0], G, D, zero, zero, stage.rate, plain and rule.flag, rule.name == "rmsprop")
    at = stage.pieces[-1].at
    spectrum, U = np.linalg.eigh(T)
    spectrum = np.clip(spectrum, 0.0, SAFETY * frozen.ceiling(at, small.rate, small.nesterov))
    total = (U * spectrum[:, None]) @ U.swapaxes(1, 2)
    return small._replace(T=total - np.einsum("g,ngab->nab", stage.pieces[0].at.c[frozen.WD] * stage.rate, D))


Noise = tuple[Array, Array, Array]  # power of the step, sum of its powers, covariance gathered


def _after(a: Noise, b: Noise) -> Noise:
    """Some steps `a`, then some steps `b`, of independent noise."""
    A, S, C = b
    return A @ a[0], S + A @ a[1], C + A @ a[2] @ A.swapaxes(-1, -2)


def _repeated(one: Noise, times: int) -> Noise:
    """`one`, so many times in a row, by doubling."""
    out = None
    while times:
        if times & 1:
            out = one if out is None else _after(out, one)
        times >>= 1
        if times:
            one = _after(one, one)
    assert out is not None
    return out


def covariance(A: Array, J: Array, C: Array, steps: int, epoch: int | None) -> Array:
    """(..., 2m, 2m) covariance of (x, w) after some steps from none.

    A (..., 2m, 2m) the step, J (..., 2m, m) what it makes of gradient noise of covariance C (..., m, m).  epoch: None for
    independent batches, or the number of batches that are drawn without replacement and sum to no noise at all.
    """
    zero = np.zeros_like(J @ C)
    one = (A, J + zero, J @ C @ J.swapaxes(-1, -2))
    if epoch is None:
        return _repeated(one, steps)[2]

    def drawn(n: int) -> Noise:
        power, S, total = _repeated(one, n)
        return power, zero, (epoch * total - S @ C @ S.swapaxes(-1, -2)) / (epoch - 1)

    whole, rest = divmod(steps, epoch)
    parts = ([_repeated(drawn(epoch), whole)] if whole else []) + ([drawn(rest)] if rest else [])
    return (parts[0] if len(parts) == 1 else _after(*parts))[2]


def correction(
    model: Model, stage: Stage, theta: Array, steps: int, batches: list[Any], epoch: int | None, depth: int, rough: bool
) -> tuple[Array, Array]:
    """(q,) derivative of `1/2 tr(V Sigma)` with respect to phi, through the optimizer's hyperparameters; and its standard
    error over the sampled batches.

    stage: the last; theta: (p,) at the horizon, where training is linearised for the whole way: most noise that is left
    there came last; steps: to it; batches: a sample of them.
    """
    t = stage.start.t + stage.steps
    stage = stage._replace(centre=theta, middle=t, curvature=model.curvature(theta, t, rough))
    mean = model.gradient(theta, t)
    noise = stage.scale * np.array([model.gradient(theta, t, batch) - mean for batch in batches])
    n, p = noise.shape
    product = operator(stage, model)
    Q, images = spaces(noise, product, depth)
    r = Q.shape[1]
    at = stage.pieces[-1].at
    small = _small(stage, model, Q, images)
    curved = model.outer_hvp(theta, (stage.scale * Q).reshape(n * r, p), t).reshape(n, r, p)
    V = np.einsum("nap,nbp->nab", Q, stage.scale * curved)
    C = np.zeros((n, r, r))
    C[:, 0, 0] = np.sum(noise**2, axis=1)

    def raised(c: Array) -> Any:
        A, J = frozen.step(small, c)
        Sigma = covariance(A[..., : 2 * r, : 2 * r], J, C, steps, epoch)
        return 0.5 * np.sum(V * Sigma[..., :r, :r], axis=(-2, -1))

    each = frozen.along(raised, at, batch=1)
    return each.mean(axis=1), each.std(axis=1) / np.sqrt(max(n - 1, 1))
