"""A stage: some steps of training frozen at one point, forward for the parameters, backward for the adjoint.

The parameters are rolled forward in the Krylov space of the gradient and the momentum.  The outer gradient at the horizon
then goes back through the same stages, each space grown by the adjoint: `h_j = sum_t lambda_{t+1} . dstep/dphi_j`, so that
the cost does not depend on q.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..problem import Array
from . import basis as krylov
from . import frozen
from .basis import Basis
from .frozen import Piece, Small
from .model import Model

GROWTH = 1.0  # exponent that negative curvature may add to a stage
SAFETY = 0.999  # of the curvature at which the step would grow


class State(NamedTuple):
    """The run, as far as it is rolled."""

    theta: Array  # (p,)
    momentum: Array  # (p,)
    square: Array | None  # (p,) of adam and rmsprop
    mean: Array | None  # (p,) of centered rmsprop
    t: int


class Stage(NamedTuple):
    """What a stage stands on."""

    start: State
    steps: int
    pieces: list[Piece]
    gradient: Array  # (p,) at the start
    centre: Array  # (p,) where the Hessian is taken
    middle: int  # step whose loss hyperparameters it has
    preconditioner: Array  # (p,) ones for sgd
    scale: Array  # (p,) root of rate times preconditioner
    unit: Array  # (p,) of the momentum's coordinates
    rate: Array  # (n,) reference rate
    basis: Basis


class Path(NamedTuple):
    """A stage's way in its basis."""

    small: Small
    spectrum: Array  # (m,) eigenvalues of the step, `rate (H + wd)`, before they were clipped
    edge: float  # largest curvature, as a share of that at which the step would grow
    starts: list[Array]  # (2m + 1,) coordinates (x, w, 1) before each piece
    end: Array  # (2m + 1,)


class Adjoint(NamedTuple):
    """Derivative of the outer loss at the horizon with respect to the state."""

    theta: Array  # (p,)
    momentum: Array  # (p,)


def spread(c: Array, model: Model) -> Array:
    """(p,) values of the groups (n,) over their segments."""
    return np.repeat(c, model.dynamics.groups)


def operator(stage: Stage, model: Model) -> Callable[[Array], Array]:
    """V (n, p) -> (n, p): the step's curvature `scale (H + wd) scale` at the stage's centre."""
    c = stage.pieces[0].at.c
    decay = spread(c[frozen.WD], model) * stage.scale**2
    return lambda V: stage.scale * model.hvp(stage.centre, stage.scale * V, stage.middle) + decay * V


def _masked(Q: Array, weights: Array, groups: tuple[int, ...]) -> Array:
    """(n, m, m): `Q diag(weights) Q'` of each group."""
    cuts = np.cumsum([0, *groups])
    return np.array([(Q[:, a:b] * weights[a:b]) @ Q[:, a:b].T for a, b in pairwise(cuts)])


def _summed(Q: Array, v: Array, groups: tuple[int, ...]) -> Array:
    """(n, m): `Q v` of each group."""
    return np.add.reduceat(Q * v, np.cumsum([0, *groups[:-1]]), axis=1).T


def path(stage: Stage, model: Model, basis: Basis) -> Path:
    """The stage in a basis: its small system with the curvature clipped against growth, and the way through its pieces."""
    rule, groups, Q, start = model.dynamics.rule, model.dynamics.groups, basis.Q, stage.start
    G = _masked(Q, np.ones(Q.shape[1]), groups)
    plain = rule.name == "sgd"
    small = Small(
        T=krylov.projected(basis),
        b=Q @ (stage.scale * stage.gradient),
        G=G,
        D=G if plain else _masked(Q, stage.preconditioner, groups),
        P=_summed(Q, stage.scale * start.theta, groups),
        Y=_summed(Q, start.theta / stage.scale, groups),
        rate=stage.rate,
        nesterov=plain and rule.flag,
        inside=rule.name == "rmsprop",
    )
    ceiling = min(frozen.ceiling(piece.at, small) for piece in stage.pieces)
    decay = np.einsum("g,gab->ab", stage.pieces[0].at.c[frozen.WD] * stage.rate, small.D)
    low = -max(frozen.floor(piece.at, small, GROWTH / stage.steps) for piece in stage.pieces)
    total, spectrum = krylov.clipped(small.T, low, SAFETY * ceiling)
    small = small._replace(T=total - decay)
    y = np.concatenate([np.zeros(len(Q)), Q @ (start.momentum / stage.unit), [1.0]])
    starts = []
    for piece in stage.pieces:
        starts.append(y)
        A = frozen.step(small, piece.at.c)[0]
        y = A @ y if piece.steps == 1 else np.linalg.matrix_power(A, piece.steps) @ y
    return Path(small, spectrum, float(spectrum[-1]) / ceiling, starts, y)


def back(stage: Stage, model: Model, way: Path, basis: Basis, adjoint: Adjoint) -> tuple[Adjoint, Array, Array]:
    """The adjoint at the stage's start, and what the stage adds to h: (q,) through the optimizer's coefficients, and the
    sum `Gamma_d` (m, 2m + 1) of the adjoint of the gradient times the state, which the loss's hyperparameters need."""
    Q, m = basis.Q, len(basis.Q)
    ends = _ends(stage, basis, adjoint)
    lam, Gammas, D = _swept_back(stage, way, ends)
    h = np.zeros(model.space.q)
    for piece, Gamma in zip(reversed(stage.pieces), Gammas, strict=True):
        h += frozen.along(partial(_contracted, way.small, Gamma), piece.at)
    theta = adjoint.theta + ((lam - ends)[:m] @ Q) / stage.scale
    momentum = adjoint.momentum + ((lam - ends)[m : 2 * m] @ Q) / stage.unit
    return Adjoint(theta, momentum), h, D


def _ends(stage: Stage, basis: Basis, adjoint: Adjoint) -> Array:
    Q = basis.Q
    return np.concatenate([Q @ (stage.scale * adjoint.theta), Q @ (stage.unit * adjoint.momentum), [0.0]])


def _swept_back(stage: Stage, way: Path, lam: Array) -> tuple[Array, list[Array], Array]:
    """lambda at the stage's start, `sum lambda y'` of each piece, the last first, and `Gamma_d` of `back`."""
    m = way.small.T.shape[-1]
    Gammas, D = [], np.zeros((m, 2 * m + 1))
    for piece, y in zip(reversed(stage.pieces), reversed(way.starts), strict=True):
        A, J = frozen.step(way.small, piece.at.c)
        Gamma, lam = _swept(A, lam, y, piece.steps)
        Gammas.append(Gamma)
        D += J.T @ Gamma[: 2 * m]
    return lam, Gammas, D


def _contracted(small: Small, Gamma: Array, c: Array) -> Array:
    return np.sum(frozen.step(small, c)[0] * Gamma)


def _swept(A: Array, lam: Array, y: Array, steps: int) -> tuple[Array, Array]:
    """`sum_i lambda_{i+1} y_i'` over the steps of a piece, and lambda at its start: one power of a block matrix."""
    if steps == 1:
        return np.outer(lam, y), A.T @ lam
    n = len(A)
    block = np.zeros((2 * n, 2 * n))
    block[:n, :n] = block[n:, n:] = A.T
    block[:n, n:] = np.outer(lam, y)
    power = np.linalg.matrix_power(block, steps)
    return power[:n, n:], power[:n, :n] @ lam


def mixed(stage: Stage, model: Model, way: Path, basis: Basis, D: Array, tolerance: float) -> Array:
    """(q,) what the loss's hyperparameters add: `sum_t adjoint_t . M_j(theta_t)`, M the mixed derivative (q, p).

    M is taken where one point serves the whole stage best; what that leaves is a matrix of the adjoint times the state,
    whose leading singular directions are followed by differences until less than `tolerance` of it is left.
    """
    Q, m = basis.Q, len(basis.Q)
    b, Lam = D[:, 2 * m], D[:, :m]
    size = b @ b
    if size == 0:
        return np.zeros(model.space.q)
    x = Lam.T @ b / size
    reach = float(np.linalg.norm(way.end[:m]))
    x *= min(1.0, reach / max(float(np.linalg.norm(x)), 1e-300))
    t = stage.middle
    theta = stage.start.theta + stage.scale * (x @ Q)
    pull = lambda u: stage.scale * (u @ Q)
    h = model.mixed(theta, t) @ pull(b)
    U, sigma, Wt = np.linalg.svd(Lam - np.outer(b, x))
    floor = max(tolerance, 1e-14) * np.sqrt(size) * reach
    for u, s, w in zip(U.T, sigma, Wt, strict=True):
        if s <= floor:
            break
        v = pull(w)
        e = np.cbrt(model.eps) * (1 + np.linalg.norm(theta)) / np.linalg.norm(v)
        slope = (model.mixed(theta + e * v, t) - model.mixed(theta - e * v, t)) / (2 * e)
        h += s * (slope @ pull(u))
    return h


def begin(
    start: State, steps: int, model: Model, gradient: Array, centre: Array, recycled: Array, columns: int, tolerance: float
) -> Stage:
    """A stage from a state: its preconditioner, and the Krylov space of the gradient and of `recycled` (n, p) directions,
    until it misses less than `tolerance` of the gradient, if that is above 0.

    The momentum follows the gradient so closely that it joins only where they leave columns: depth is worth more.
    """
    dynamics = model.dynamics
    parts = frozen.pieces(dynamics, model.space, start.t, steps)
    D = preconditioner(start, model)
    rate = parts[0].at.c[frozen.RATE]
    scale = np.sqrt(spread(rate, model) * D)
    unit = D / scale if dynamics.rule.name == "rmsprop" else 1 / scale
    stage = Stage(
        start, steps, parts, gradient, centre, start.t + steps // 2, D, scale, unit, rate, krylov.empty(start.theta.size)
    )
    force = gradient + spread(parts[0].at.c[frozen.WD], model) * start.theta
    starts = [scale * force, *(recycled / scale)]
    if parts[0].at.c[frozen.DECAY].any():
        starts.append(start.theta / scale)
    most = tolerance * float(np.linalg.norm(scale * gradient))

    def enough(basis: Basis) -> bool:
        x = path(stage, model, basis).end[: len(basis.Q)]
        return float(np.linalg.norm(krylov.outside(basis, x @ basis.image))) <= most

    return stage._replace(basis=_grown(stage, model, starts, start.momentum / unit, columns, enough if tolerance else None))


def shorter(stage: Stage, model: Model, steps: int) -> Stage:
    """The same stage, ended earlier."""
    parts = frozen.pieces(model.dynamics, model.space, stage.start.t, steps)
    return stage._replace(steps=steps, pieces=parts)


def _grown(
    stage: Stage, model: Model, starts: list[Array], momentum: Array, columns: int, enough: Callable[[Basis], bool] | None
) -> Basis:
    product = operator(stage, model)
    if enough is not None:
        return krylov.grow(stage.basis, np.array([*starts, momentum]), product, columns, enough)
    basis = krylov.grow(stage.basis, np.array(starts), product, columns)
    left = columns - (len(basis.Q) - len(stage.basis.Q))
    return krylov.grow(basis, momentum[None], product, left)


def grown(stage: Stage, model: Model, adjoint: Adjoint, columns: int, tolerance: float) -> Basis:
    """The stage's basis and the Krylov space of the adjoint at its end, until it misses less than `tolerance` of that, if
    that is above 0."""
    end = stage.scale * adjoint.theta
    most = tolerance * float(np.linalg.norm(end))

    def enough(basis: Basis) -> bool:
        b = _swept_back(stage, path(stage, model, basis), _ends(stage, basis, adjoint))[2][:, -1]
        return float(np.linalg.norm(krylov.outside(basis, end - b @ basis.image))) <= most

    return _grown(stage, model, [end], stage.unit * adjoint.momentum, columns, enough if tolerance else None)


def mismatch(stage: Stage, model: Model, way: Path, gradient: Array) -> tuple[Array, float]:
    """(p,) how far the frozen gradient at the stage's end is from the true one (p,) there, in the stage's coordinates, and
    its size relative to the gradient at the start."""
    m, Q = len(stage.basis.Q), stage.basis.Q
    frozen_gradient = way.small.b + way.small.T @ way.end[:m]
    size = float(np.linalg.norm(way.small.b))
    defect = float(np.linalg.norm(Q @ (stage.scale * gradient) - frozen_gradient) / max(size, 1e-300))
    c = stage.pieces[-1].at.c[frozen.WD]
    decay = np.einsum("g,gab,b->a", c * stage.rate, way.small.D, way.end[:m]) + c @ way.small.P
    theta = stage.start.theta + stage.scale * (way.end[:m] @ Q)
    return stage.scale * (gradient + spread(c, model) * theta) - (frozen_gradient + decay) @ Q, defect


def where(stage: Stage, way: Path, steps: int) -> Array:
    """(p,) the parameters after some steps, also beyond the stage's end, with its last coefficients."""
    A = frozen.step(way.small, stage.pieces[-1].at.c)[0]
    y = np.linalg.matrix_power(A, steps) @ way.starts[0]
    m = len(stage.basis.Q)
    return stage.start.theta + stage.scale * (y[:m] @ stage.basis.Q)


def end(stage: Stage, way: Path) -> State:
    """The state after the stage; the squares follow when the gradient there is known."""
    m, Q = len(stage.basis.Q), stage.basis.Q
    theta = stage.start.theta + stage.scale * (way.end[:m] @ Q)
    momentum = stage.unit * (way.end[m : 2 * m] @ Q)
    return stage.start._replace(theta=theta, momentum=momentum, t=stage.start.t + stage.steps)


def preconditioner(start: State, model: Model) -> Array:
    """(p,) as it stands at the start."""
    dynamics = model.dynamics
    if start.square is None:
        return np.ones_like(start.theta)
    values = frozen.duals(dynamics, model.space.at(dynamics.phi, start.t))
    eps = spread(values["eps"].x, model)
    if dynamics.rule.name == "rmsprop":
        w = start.square if start.mean is None else start.square - start.mean**2
        return 1 / (np.sqrt(np.maximum(w, 0)) + eps)
    beta2 = spread(values["beta2"].x, model)
    return 1 / (np.sqrt(start.square / (1 - beta2 ** max(start.t, 1))) + eps)
