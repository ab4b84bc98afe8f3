"""How the noise of mini-batches moves the mean of training.

Around its mean m the run has a covariance Sigma, so that the mean goes down `E L(m + delta)`, delta of that covariance, and
not down L: its gradient has `1/2 grad tr(H Sigma)` more, which pulls to where the loss is flat.  Sigma depends on the
optimizer's hyperparameters; through it they act on the gradient of every step as a hyperparameter of the loss does.
"""

from __future__ import annotations

import numpy as np

from ..problem import Array
from . import frozen
from .frozen import Piece
from .model import Model
from .noise import Noise, left, signs, way
from .stage import Stage

NOTHING = 1e-9  # beside the largest of a root
NEGLECTED = 0.02  # share of the pull, with a covariance that grows with time, below which a stage is left out


def deviations(noise: Noise, pieces: list[Piece], count: int) -> tuple[Array, Array]:
    """(k, p) deviations, k = count, whose mean square is Sigma after these pieces, and (q, k, p) their derivatives along
    phi: mixtures of the columns of each sample's root."""
    n, r, p = noise.Q.shape
    Sigma, at = left(noise, pieces), [piece.at for piece in pieces]
    root, change = root_along(Sigma(*(a.c[:, None] for a in at)), frozen.along(Sigma, *at, batch=1))
    mix = signs(count, n * r, noise.seed) / np.sqrt(n)
    mixed = lambda U: mix @ (noise.scale * (U.swapaxes(-1, -2) @ noise.Q)).reshape(*U.shape[:-3], n * r, p)
    return mixed(root), mixed(change)


def root_along(S: Array, dS: Array) -> tuple[Array, Array]:
    """(..., r, r) a root U of S = U U', symmetric and not negative, and (q, ..., r, r) its derivatives where S has dS."""
    half = lambda X: (X + X.swapaxes(-1, -2)) / 2
    s, E = np.linalg.eigh(half(S))
    s = np.sqrt(np.clip(s, 0.0, None))
    pairs = s[..., :, None] + s[..., None, :]
    change = E.swapaxes(-1, -2) @ half(dS) @ E
    known = np.broadcast_to(pairs > NOTHING * pairs.max(axis=(-2, -1), keepdims=True), change.shape)
    return E * s[..., None, :], E @ np.divide(change, pairs, out=np.zeros_like(change), where=known)


def pull(model: Model, noise: Noise, stages: list[tuple[Stage, Array]]) -> Array:
    """(q,) derivative of the outer loss at the horizon along phi, through the covariance that pulls the mean.

    stages: each with (p,) the sum over its steps of the adjoint of the gradient.  Every batch has deviations of its own,
    to both sides.
    """
    h, begun = np.zeros(model.space.q), stages[0][0].start.t
    share = 1 if model.space.scheduled else 2  # of a schedule a stage's end counts: what came before it is half forgotten
    times = [stage.start.t - begun + max(1, stage.steps // share) for stage, _ in stages]
    weights = np.array([np.linalg.norm(adjoint) * t for (_, adjoint), t in zip(stages, times, strict=True)])
    for (stage, adjoint), t, weight in zip(stages, times, weights, strict=True):
        if weight < NEGLECTED * weights.sum():
            continue
        D, dD = deviations(noise, way(model, noise, stage.pieces[-1].at, begun, t), len(noise.batches))
        for k, batch in enumerate(noise.batches):
            ahead, behind = (model.hvp(stage.centre + d, adjoint, stage.middle, batch) for d in (D[k], -D[k]))
            h += dD[:, k] @ (ahead - behind) / (2 * len(D))
    return h
