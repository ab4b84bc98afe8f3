"""The noisy-quadratic correction: what the noise of mini-batches adds to the outer loss at the horizon.

Gradient noise leaves a covariance Sigma in the parameters, which raises the expected outer loss by `1/2 tr(V Sigma)`, V its
Hessian.  Sigma depends on the optimizer's hyperparameters: the derivative is added to h.  A few mixtures of the batches'
deviations from the mean gradient stand for the noise; each is followed in a Krylov space of its own (stochastic Lanczos
quadrature), by doubling, so that any horizon is one closed form.  `drift` has what else the noise does.

Sources: Zhang et al. 2019, "Which algorithmic choices matter at which batch sizes? Insights from a noisy quadratic model";
Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..problem import Array
from . import frozen
from .frozen import Coefficients, Piece, Small
from .model import Model
from .roll import Rolled
from .stage import SAFETY, Stage, operator

PIECES = 64  # of a schedule, at most


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


class Noise(NamedTuple):
    """The noise of mini-batches around a point: n samples of it, each in a Krylov space of its own of r columns."""

    theta: Array  # (p,) the point
    t: int  # its step
    at: Coefficients  # of the last steps before it
    scale: Array  # (p,) of the coordinates
    decay: Array  # (groups,) that the curvature has in it
    Q: Array  # (n, r, p) orthonormal columns
    small: Small  # the samples' runs, curvature as it is
    C: Array  # (n, r, r) covariance of the gradient noise
    batches: list[Any]  # that it was measured on
    epoch: int | None  # batches of an epoch, drawn without replacement; None: independent
    seed: int  # of its mixtures


def measured(
    model: Model, rolled: Rolled, batches: list[Any], epoch: int | None, samples: int, depth: int, seed: int, rough: bool
) -> Noise:
    """The batches' noise at the horizon, where training is linearised for the whole way: most that is left there came last.

    More batches than samples are mixed, each sample a sum of all their deviations with random signs: on data that training
    has nearly fitted, a few batches have most of the noise.
    """
    stage, theta, t = rolled.stages[-1][0], rolled.end.theta, rolled.end.t
    stage = stage._replace(centre=theta, middle=t, curvature=model.curvature(theta, t, rough))
    noise = stage.scale * np.array([model.gradient(theta, t, batch) - rolled.gradient for batch in batches])
    if len(batches) > samples:
        noise = signs(samples, len(batches), seed) @ noise / np.sqrt(len(batches))
    Q, images = spaces(noise, operator(stage, model), depth)
    C = np.zeros((*Q.shape[:2], Q.shape[1]))
    C[:, 0, 0] = np.sum(noise**2, axis=1)
    decay = stage.pieces[0].at.c[frozen.WD]
    small = _small(stage, model, Q, images)
    return Noise(theta, t, stage.pieces[-1].at, stage.scale, decay, Q, small, C, batches, epoch, seed)


def signs(n: int, m: int, seed: int) -> Array:
    """(n, m) random signs, rows and columns as orthogonal as those of a part of a Hadamard matrix: what mixtures of vectors
    with independent signs are off in their mean square is twice as much."""
    from scipy.linalg import hadamard

    size, draw = 1 << (max(n, m) - 1).bit_length(), np.random.default_rng(seed)
    rows, columns = draw.permutation(size)[:n], draw.permutation(size)[:m]
    return hadamard(size, np.float64)[np.ix_(rows, columns)] * draw.choice((-1.0, 1.0), m)


def _small(stage: Stage, model: Model, Q: Array, images: Array) -> Small:
    """The independent runs of the noise samples, their curvature as the operator has it."""
    T = np.einsum("nap,nbp->nab", Q, images)
    cuts = np.cumsum([0, *model.dynamics.groups])
    part = lambda w, a, b: np.einsum("nap,p,nbp->nab", Q[..., a:b], w[a:b], Q[..., a:b])
    masked = lambda w: np.stack([part(w, a, b) for a, b in pairwise(cuts)], 1)
    G, D = masked(np.ones(Q.shape[-1])), masked(stage.preconditioner)
    zero = np.zeros((*G.shape[:2], Q.shape[1]))
    rule = model.dynamics.rule
    plain, T = rule.name == "sgd", (T + T.swapaxes(1, 2)) / 2
    return Small(T, zero[:, 0], G, D, zero, zero, stage.rate, plain and rule.flag, rule.name == "rmsprop")


def way(model: Model, noise: Noise, at: Coefficients, t: int, steps: int) -> list[Piece]:
    """The coefficients of so many steps from t on: those of a schedule in pieces of whole epochs; else `at`, those of the
    last one, for the whole way."""
    if not model.space.scheduled:
        return [Piece(at, steps)]
    length, epoch = -(-steps // PIECES), noise.epoch or 1
    return frozen.merged(model.pieces(t, steps), -(-length // epoch) * epoch)


def left(noise: Noise, pieces: list[Piece]) -> Callable[..., Array]:
    """c (6, ..., groups) of each piece -> (..., n, r, r): what their steps leave in the parameters, of each sample in its
    space; the curvature is clipped as in a stage of such coefficients."""
    small, r = noise.small, noise.Q.shape[1]
    spectrum, U = np.linalg.eigh(small.T)
    ceiling = min(frozen.ceiling(piece.at, small.rate, small.nesterov) for piece in pieces)
    spectrum = np.clip(spectrum, 0.0, SAFETY * ceiling)
    total = (U * spectrum[:, None]) @ U.swapaxes(1, 2)
    small = small._replace(T=total - np.einsum("g,ngab->nab", noise.decay * small.rate, small.D))

    def covariant(*c: Array) -> Array:
        out = None
        for each, piece in zip(c, pieces, strict=True):
            A, J = frozen.step(small, each)
            now = gathered(A[..., : 2 * r, : 2 * r], J, noise.C, piece.steps, noise.epoch)
            out = now if out is None else _after(out, now)
        assert out is not None
        return out[2][..., :r, :r]

    return covariant


Gathered = tuple[Array, Array, Array]  # power of the step, sum of its powers, covariance gathered


def _after(a: Gathered, b: Gathered) -> Gathered:
    """Some steps `a`, then some steps `b`, of independent noise."""
    A, S, C = b
    return A @ a[0], S + A @ a[1], C + A @ a[2] @ A.swapaxes(-1, -2)


def _repeated(one: Gathered, times: int) -> Gathered:
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


def gathered(A: Array, J: Array, C: Array, steps: int, epoch: int | None) -> Gathered:
    """What some steps do, and (..., 2m, 2m) the covariance of (x, w) that they leave from none.

    A (..., 2m, 2m) the step, J (..., 2m, m) what it makes of gradient noise of covariance C (..., m, m).  epoch: None for
    independent batches, or the number of batches that are drawn without replacement and sum to no noise at all.
    """
    zero = np.zeros_like(J @ C)
    one = (A, J + zero, J @ C @ J.swapaxes(-1, -2))
    if epoch is None:
        return _repeated(one, steps)

    def drawn(n: int) -> Gathered:
        power, S, total = _repeated(one, n)
        return power, zero, (epoch * total - S @ C @ S.swapaxes(-1, -2)) / (epoch - 1)

    whole, rest = divmod(steps, epoch)
    parts = ([_repeated(drawn(epoch), whole)] if whole else []) + ([drawn(rest)] if rest else [])
    return parts[0] if len(parts) == 1 else _after(*parts)


def correction(model: Model, noise: Noise, steps: int) -> tuple[Array, Array]:
    """(q,) derivative of `1/2 tr(V Sigma)` with respect to phi, through the optimizer's hyperparameters, so many steps from
    now, the horizon; and its standard error over the samples."""
    n, r, p = noise.Q.shape
    curved = model.outer_hvp(noise.theta, (noise.scale * noise.Q).reshape(n * r, p), noise.t).reshape(n, r, p)
    V = np.einsum("nap,nbp->nab", noise.Q, noise.scale * curved)
    pieces = way(model, noise, noise.at, noise.t - steps, steps)
    Sigma = left(noise, pieces)
    each = frozen.along(lambda *c: 0.5 * np.sum(V * Sigma(*c), axis=(-2, -1)), *(piece.at for piece in pieces), batch=1)
    return each.mean(axis=1), each.std(axis=1) / np.sqrt(max(n - 1, 1))
