"""A stage: some steps of training frozen at one point, forward for the parameters, backward for the adjoint.

The parameters are rolled forward in the Krylov space of the gradient and the momentum.  The outer gradient at the horizon
then goes back through the same stages, each space grown by the adjoint: `h_j = sum_t lambda_{t+1} . dstep/dphi_j`, so that
the cost does not depend on q.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..optimizers import Rule
from ..problem import Array
from . import basis as krylov
from . import frozen, modal
from .basis import Basis
from .frozen import Piece, Small
from .model import Model

GROWTH = 1.0  # exponent that negative curvature may add to a stage
SAFETY = 0.999  # of the curvature at which the step would grow
STILL = 1e-30  # speed of a step that stands


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
    speed: float  # largest `frozen.speed` of its pieces
    travel: float  # the sum over its steps
    ceiling: float  # the least of its pieces
    curvature: Callable[[Array], Array]  # V (n, p) -> (n, p) Hessian products at the centre
    basis: Basis


class Path(NamedTuple):
    """A stage's way in its basis: r columns that move together, or several such systems (...) that do not meet."""

    whole: Small  # of all columns, before they are told apart and the curvature is clipped
    momentum: Array  # (m,) at the start, in the basis
    small: Small
    kit: Any  # `frozen` or `modal`: the functions of such systems
    U: Array  # (m, r) their columns, in the basis
    spectrum: Array  # (m,) eigenvalues of the step, `rate (H + wd)`, before they were clipped
    edge: float  # largest curvature, as a share of that at which the step would grow
    maps: list[tuple[Array, Array]]  # of each piece: `frozen.step`
    starts: list[Array]  # (..., 2r + 1) coordinates (x, w, 1) before each piece
    end: Array  # (..., 2r + 1)


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
    return lambda V: stage.scale * stage.curvature(stage.scale * V) + decay * V


def _masked(Q: Array, weights: Array, groups: tuple[int, ...]) -> Array:
    """(n, m, m): `Q diag(weights) Q'` of each group."""
    cuts = np.cumsum([0, *groups])
    return np.array([(Q[:, a:b] * weights[a:b]) @ Q[:, a:b].T for a, b in pairwise(cuts)])


def _summed(Q: Array, v: Array, groups: tuple[int, ...]) -> Array:
    """(n, m): `Q v` of each group."""
    if len(groups) == 1:
        return (Q @ v)[None]
    return np.add.reduceat(Q * v, np.cumsum([0, *groups[:-1]]), axis=1).T


def small(stage: Stage, model: Model, basis: Basis) -> Small:
    """The frozen run in a basis, its curvature as it is."""
    rule, groups, Q, start = model.dynamics.rule, model.dynamics.groups, basis.Q, stage.start
    plain, one = rule.name == "sgd", len(groups) == 1
    G = np.eye(len(Q))[None] if one else _masked(Q, np.ones(Q.shape[1]), groups)
    return Small(
        T=basis.T,
        b=Q @ (stage.scale * stage.gradient),
        G=G,
        D=G if plain else _masked(Q, stage.preconditioner, groups),
        P=_summed(Q, stage.scale * start.theta, groups),
        Y=_summed(Q, start.theta / stage.scale, groups),
        rate=stage.rate,
        nesterov=plain and rule.flag,
        inside=rule.name == "rmsprop",
    )


def path(stage: Stage, model: Model, basis: Basis) -> Path:
    """The stage in a basis: its small system with the curvature clipped against growth, and the way through its pieces."""
    whole = small(stage, model, basis)
    return _path(stage, model, whole, basis.Q @ (stage.start.momentum / stage.unit))


def thinned(stage: Stage, model: Model, way: Path, keep: Array) -> Path:
    """The same way with those columns of the basis alone, by their positions (r,)."""
    return _path(stage, model, frozen.selected(way.whole, keep), way.momentum, keep)


def _path(stage: Stage, model: Model, whole: Small, momentum: Array, keep: Array | None = None) -> Path:
    """The way of a small system whose columns are all of the basis, or those to keep; momentum: (m,) in the basis."""
    ceiling = stage.ceiling
    total, spectrum, V = krylov.clipped(whole.T, -GROWTH / stage.travel, SAFETY * ceiling)
    decay = stage.pieces[0].at.c[frozen.WD] * stage.rate
    apart = model.dynamics.rule.name == "sgd" and len(stage.rate) == 1 and not model.dynamics.loss_names
    if apart:
        each = frozen.apart(whole, total - decay, V)
    else:
        each = whole._replace(T=(V * total) @ V.T - np.einsum("g,gab->ab", decay, whole.D))
        V = np.eye(len(total))
    U = V
    if keep is not None:
        U = np.zeros((len(momentum), len(keep)))
        U[keep] = V
    kit = modal if apart else frozen
    y = _coordinates(each, U, np.zeros(len(U)), momentum, 1.0)
    maps, starts = [kit.step(each, piece.at.c) for piece in stage.pieces], []
    for (A, _), piece in zip(maps, stage.pieces, strict=True):
        starts.append(y)
        y = kit.moved(A, y, piece.steps)
    return Path(whole, momentum, each, kit, U, spectrum, float(spectrum.max(initial=0.0)) / ceiling, maps, starts, y)


def _coordinates(small: Small, U: Array, x: Array, w: Array, one: float) -> Array:
    """(..., 2r + 1) of x and w (m,) in the basis."""
    shape, r = small.b.shape, small.b.shape[-1]
    y = np.empty((*shape[:-1], 2 * r + 1))
    y[..., :r], y[..., r : 2 * r], y[..., 2 * r] = (x @ U).reshape(shape), (w @ U).reshape(shape), one
    return y


def _in_basis(way: Path, y: Array) -> Array:
    """x and w (2, m) in the basis, of coordinates (..., 2r + 1)."""
    r = way.small.b.shape[-1]
    xw = np.empty((2, way.U.shape[1]))
    xw[0], xw[1] = y[..., :r].ravel(), y[..., r : 2 * r].ravel()
    return xw @ way.U.T


def back(stage: Stage, model: Model, way: Path, basis: Basis, adjoint: Adjoint) -> tuple[Adjoint, Array, Array]:
    """The adjoint at the stage's start, and what the stage adds to h: (q,) through the optimizer's coefficients, and the
    sum `Gamma_d` (..., r, 2r + 1) of the adjoint of the gradient times the state, which the loss's hyperparameters need."""
    Q, small = basis.Q, way.small
    r = small.b.shape[-1]
    ends = _coordinates(small, way.U, Q @ (stage.scale * adjoint.theta), Q @ (stage.unit * adjoint.momentum), 0.0)
    lam, h, D = ends, np.zeros(model.space.q), np.zeros((*small.b.shape, 2 * r + 1))
    for piece, (A, J), y in zip(reversed(stage.pieces), reversed(way.maps), reversed(way.starts), strict=True):
        Gamma, lam = way.kit.swept(A, lam, y, piece.steps)
        h += way.kit.sensitivity(small, piece.at, Gamma)
        D += J.swapaxes(-1, -2) @ Gamma[..., : 2 * r, :]
    theta, momentum = _in_basis(way, lam - ends) @ Q
    return Adjoint(adjoint.theta + theta / stage.scale, adjoint.momentum + momentum / stage.unit), h, D


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


def begin(start: State, steps: int, model: Model, gradient: Array, centre: Array, columns: int, tolerance: float) -> Stage:
    """A stage from a state: its preconditioner, and the Krylov space of the gradient, as far as the tolerance asks."""
    dynamics = model.dynamics
    parts = model.pieces(start.t, steps)
    D = preconditioner(_warmed(start, steps, model, gradient), model)
    rate = frozen.reference(_lasting(parts, dynamics.rule, start.t), dynamics.rule.name == "sgd" and dynamics.rule.flag)
    scale = np.sqrt(spread(rate, model) * D)
    unit = D / scale if dynamics.rule.name == "rmsprop" else 1 / scale
    middle = start.t + steps // 2
    curvature, nothing = model.curvature(centre, middle, tolerance > 0), krylov.empty(start.theta.size)
    limits = _limits(parts, rate, dynamics.rule, start.t)
    stage = Stage(start, steps, parts, gradient, centre, middle, D, scale, unit, rate, *limits, curvature, nothing)
    force = scale * (gradient + spread(parts[0].at.c[frozen.WD], model) * start.theta)
    starts = [force, start.theta / scale] if parts[0].at.c[frozen.DECAY].any() else [force]
    return stage._replace(basis=_grown(stage, model, np.array(starts), start.momentum / unit, columns, tolerance))


def shorter(stage: Stage, model: Model, steps: int) -> Stage:
    """The same stage, ended earlier."""
    parts = model.pieces(stage.start.t, steps)
    speed, travel, ceiling = _limits(parts, stage.rate, model.dynamics.rule, stage.start.t)
    return stage._replace(steps=steps, pieces=parts, speed=speed, travel=travel, ceiling=ceiling)


def _limits(parts: list[Piece], rate: Array, rule: Rule, t: int) -> tuple[float, float, float]:
    """A stage's `speed`, `travel` and `ceiling`."""
    speeds = [max(frozen.speed(piece.at, rate), STILL) for piece in parts]
    travel = sum(speed * piece.steps for speed, piece in zip(speeds, parts, strict=True))
    nesterov = rule.name == "sgd" and rule.flag
    ceilings = [frozen.ceiling(piece.at, rate, nesterov) for piece in _lasting(parts, rule, t)]
    return max(speeds), travel, min(ceilings)


def _lasting(parts: list[Piece], rule: Rule, t: int) -> list[Piece]:
    """The pieces by which training may grow: sgd's first step, which is not damped, has no momentum to do so."""
    return parts[1:] if rule.name == "sgd" and t == 0 and len(parts) > 1 and parts[0].steps == 1 else parts


def _grown(stage: Stage, model: Model, starts: Array, momentum: Array, columns: int, tolerance: float) -> Basis:
    """The stage's basis and the Krylov space of `starts` (n, p): at most so many columns more, and no more than it takes to
    leave out less than `tolerance` of what the first of them becomes in the stage; then, likewise, of the momentum, where
    the way that it goes by itself is more than that beside the way of the first."""
    speed = stage.speed
    product, own = operator(stage, model), len(stage.basis.Q)
    basis = krylov.grow(stage.basis, starts, product, columns, stage.steps * speed, tolerance)
    way = np.linalg.norm(krylov.flown(basis.T, basis.Q @ starts[0], stage.steps * speed))
    if speed * krylov.outside(basis, momentum) <= tolerance * way:
        return basis
    return krylov.grow(basis, momentum[None], product, columns - (len(basis.Q) - own), speed, tolerance)


def grown(stage: Stage, model: Model, adjoint: Adjoint, columns: int, tolerance: float) -> Basis:
    """The stage's basis and the Krylov space of the adjoint at its end."""
    return _grown(stage, model, (stage.scale * adjoint.theta)[None], stage.unit * adjoint.momentum, columns, tolerance)


def defect(stage: Stage, way: Path, gradient: Array) -> tuple[float, float]:
    """How far the frozen gradient at the stage's end is from the true one (p,) there, relative to that at its start: within
    the basis, what the curvature has changed; and in the whole space, with what the columns leave out."""
    Q, change, force = stage.basis.Q, _unforeseen(stage, way, gradient), stage.scale * stage.gradient
    sizes = max(_length(way.small.b.ravel()), 1e-300), max(_length(force), 1e-300)
    return _length(Q @ change) / sizes[0], _length(change) / sizes[1]


def _length(v: Array) -> float:
    return float(np.sqrt(v @ v))


def _unforeseen(stage: Stage, way: Path, gradient: Array) -> Array:
    """(p,) the change of the gradient along the stage, in its coordinates, without that of the frozen one."""
    Q = stage.basis.Q
    r = way.small.b.shape[-1]
    foreseen = way.U @ (way.small.T @ way.end[..., :r, None]).ravel()
    return stage.scale * (gradient - stage.gradient) - foreseen @ Q


def mismatch(stage: Stage, model: Model, way: Path, gradient: Array) -> Array:
    """(p,) the true gradient (p,) at the stage's end with its decay, without the frozen one, in the stage's coordinates."""
    Q = stage.basis.Q
    decay = spread(stage.pieces[-1].at.c[frozen.WD], model) * stage.scale**2 * (_in_basis(way, way.end)[0] @ Q)
    return _unforeseen(stage, way, gradient) + decay - (Q @ decay) @ Q


def moved(stage: Stage, there: State, model: Model) -> float:
    """How far the preconditioner has moved by the stage's end, on the gradient's coordinates: a quarter of it, for half is
    the mean and the moves of several stages partly cancel."""
    if there.square is None:
        return 0.0
    force = stage.scale * stage.gradient
    change = preconditioner(there, model) / stage.preconditioner - 1
    return 0.25 * float(np.linalg.norm(change * force)) / max(float(np.linalg.norm(force)), 1e-300)


def where(stage: Stage, way: Path, steps: int) -> Array:
    """(p,) the parameters after some steps, also beyond the stage's end, with its last coefficients."""
    y = way.kit.moved(way.maps[-1][0], way.starts[0], steps)
    return stage.start.theta + stage.scale * (_in_basis(way, y)[0] @ stage.basis.Q)


def end(stage: Stage, way: Path) -> State:
    """The state after the stage; the squares follow when the gradient there is known."""
    x, w = _in_basis(way, way.end) @ stage.basis.Q
    theta, momentum = stage.start.theta + stage.scale * x, stage.unit * w
    return stage.start._replace(theta=theta, momentum=momentum, t=stage.start.t + stage.steps)


def _warmed(start: State, steps: int, model: Model, gradient: Array) -> State:
    """A state without averages, as a run's start is, with those that half of the stage would leave, were the gradient (p,)
    to stay: of none, the preconditioner is the inverse of eps."""
    if start.square is None or start.square.any():
        return start
    rule, values = model.dynamics.rule, frozen.duals(model.dynamics, model.point(start.t))
    d = gradient if rule.name == "adamw" else gradient + spread(values["weight_decay"].x, model) * start.theta
    if rule.name != "rmsprop":
        return start._replace(square=(1 - spread(values["beta2"].x, model)) * d**2)  # as corrected, the same all the while
    kept = 1 - spread(values["alpha"].x, model) ** max(1, steps // 2)
    return start._replace(square=kept * d**2, mean=None if start.mean is None else kept * d)


def preconditioner(start: State, model: Model) -> Array:
    """(p,) as it stands at the start."""
    dynamics = model.dynamics
    if start.square is None:
        return np.ones_like(start.theta)
    values = frozen.duals(dynamics, model.point(start.t))
    eps = spread(values["eps"].x, model)
    if dynamics.rule.name == "rmsprop":
        w = start.square if start.mean is None else start.square - start.mean**2
        return 1 / (np.sqrt(np.maximum(w, 0)) + eps)
    beta2 = spread(values["beta2"].x, model)
    return 1 / (np.sqrt(start.square / (1 - beta2 ** max(start.t, 1))) + eps)
