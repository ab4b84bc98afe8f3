"""One training step with curvature and preconditioner frozen: a small affine map, and what it is made of.

In coordinates in which the preconditioned step is plain gradient descent (`theta = theta_0 + scale * (x Q)`), every rule
that can be frozen is the same map with other coefficients:

    d  = b + (T + W) x              gradient and coupled weight decay
    w' = mu w + keep d              momentum
    u  = w', or d + mu w' (nesterov)
    x' = x - rate u - decay (x + y)  `decay`: decoupled weight decay

`T` is the curvature in the basis Q.  Values of n groups are diagonal in the full space, so `sum_g value_g G_g` in the
basis, with `G_g` the group's mask.  Letters: m columns of the basis, n groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..engine import Dynamics
from ..errors import NotFrozenError
from ..optimizers import Dual, Rule
from ..problem import Array
from ..space import Point, Space

MU, KEEP, RATE, WD, DECAY, SHRINK = range(6)
COMPLEX_STEP = 1e-30
MOST_PIECES = 4096  # steps at which a schedule is read, at most


class Coefficients(NamedTuple):
    """Coefficients of the frozen step: mu, keep, rate, coupled and decoupled decay, and minus the change of eps."""

    c: Array  # (6, n)
    dc: Array  # (6, q, n)


class Piece(NamedTuple):
    """Steps during which the coefficients stand."""

    at: Coefficients
    steps: int


def _zero(like: Dual) -> Dual:
    return Dual(np.zeros_like(like.x), np.zeros_like(like.dx))


def _times(a: Dual, b: Dual) -> Dual:
    return Dual(a.x * b.x, a.dx * b.x + a.x * b.dx)


def _shrink(eps: Dual) -> Dual:
    """log D moves by -D deps, where D = 1 / (root + eps): zero here, for D stands at its value."""
    return Dual(np.zeros_like(eps.x), -eps.dx)


def _sgd(lr: Dual, mu: Dual, keep: Dual, wd: Dual) -> tuple[Dual, ...]:
    return mu, keep, lr, wd, _zero(lr), _zero(lr)


def _adam(decoupled: bool, *rows: Dual) -> tuple[Dual, ...]:
    lr, b1, a1, _, _, i1, _, eps, wd, _ = rows
    if decoupled:
        return b1, a1, _times(lr, i1), _zero(wd), _times(lr, wd), _shrink(eps)
    return b1, a1, _times(lr, i1), wd, _zero(wd), _shrink(eps)


def _rmsprop(*rows: Dual) -> tuple[Dual, ...]:
    lr, _, _, mu, eps, wd, one = rows
    return mu, one, lr, wd, _zero(lr), _shrink(eps)


_CANONICAL: Mapping[str, Callable[..., tuple[Dual, ...]]] = {
    "sgd": _sgd,
    "adam": lambda *rows: _adam(False, *rows),
    "adamw": lambda *rows: _adam(True, *rows),
    "rmsprop": _rmsprop,
}


def check(call: str, rule: Rule) -> None:
    if rule.name not in _CANONICAL:
        raise NotFrozenError(
            f"{call}: {rule.name} has no frozen step; {sorted(_CANONICAL)} do. Extrapolate the trajectory instead: "
            f"koopman.extrapolate(H, ahead)."
        )


def duals(dynamics: Dynamics, point: Point) -> dict[str, Dual]:
    """{hyperparameter of the optimizer: value (n,) and derivative (q, n) along the coordinates of phi}."""
    n, q = len(dynamics.groups), dynamics.phi.size
    out = {}
    for name in dynamics.rule.defaults:
        if name in point.values:
            seed = point.seeds[name]
            seed = seed if seed.ndim == 2 else seed[:, None]
            out[name] = Dual(np.broadcast_to(point.values[name], (n,)), np.broadcast_to(seed, (q, n)))
        else:
            out[name] = Dual(dynamics.fixed[name], np.zeros((q, n)))
    return out


def alike(dynamics: Dynamics, point: Point) -> Dynamics:
    """The same with one group in place of several that never differ."""
    tuned = [point.values[name] for name in dynamics.rule.defaults if name in point.values]
    if any(np.ndim(x) for x in tuned) or any(np.ptp(x) for x in dynamics.fixed.values()):
        return dynamics
    fixed = {name: x[:1] for name, x in dynamics.fixed.items()}
    return dynamics._replace(groups=(sum(dynamics.groups),), fixed=fixed)


def coefficients(dynamics: Dynamics, point: Point, t: int) -> Coefficients:
    """Of step t, counting from 0."""
    rule = dynamics.rule
    values = duals(dynamics, point)
    rows = _CANONICAL[rule.name](*(rule.row(i, values, t + 1) for i in range(len(rule.rows))))
    return Coefficients(np.array([r.x for r in rows]), np.array([r.dx for r in rows]))


def _between(a: Coefficients, b: Coefficients) -> Coefficients:
    return Coefficients((a.c + b.c) / 2, (a.dc + b.dc) / 2)


def pieces(at: Callable[[int], Coefficients], space: Space, rule: Rule, t: int, steps: int) -> list[Piece]:
    """Steps t to t + steps in runs of equal coefficients `at` a step: every step of a schedule is read (of a long one,
    evenly spaced ones), Adam's bias corrections at distances of a sixteenth of the steps taken."""
    if not space.scheduled and not rule.timed:
        return [Piece(at(t), steps)]
    if space.scheduled:
        cuts = np.unique(np.linspace(0, steps, min(steps, MOST_PIECES) + 1).astype(np.int64))
    else:
        marks = [0, min(1, steps)]
        while rule.timed and rule.settled is None and marks[-1] < steps:
            marks.append(min(steps, marks[-1] + max(1, (t + marks[-1]) // 16)))
        cuts = np.unique([*marks, steps])
    out: list[Piece] = []
    for a, b in pairwise(cuts):
        between = _between(at(t + int(a)), at(t + int(b) - 1))
        if out and all(map(np.array_equal, between, out[-1].at)):
            out[-1] = Piece(between, out[-1].steps + int(b - a))
        else:
            out.append(Piece(between, int(b - a)))
    return out


class Small(NamedTuple):
    """The frozen run in the basis: leading dimensions (...) are independent runs."""

    T: Array  # (..., m, m) curvature
    b: Array  # (..., m) gradient at the start
    G: Array  # (..., n, m, m) masks of the groups
    D: Array  # (..., n, m, m) masks times the preconditioner
    P: Array  # (..., n, m) scaled parameters of each group: what coupled decay adds
    Y: Array  # (..., n, m) parameters over the scale: what decoupled decay takes
    rate: Array  # (n,) reference rate, which the scale holds
    nesterov: bool
    inside: bool  # whether the preconditioner acts before the momentum (rmsprop)


def selected(small: Small, keep: Array) -> Small:
    """The same in some of its columns, by their positions."""
    square = lambda G: G[..., keep[:, None], keep]
    T, G, D = map(square, (small.T, small.G, small.D))
    return small._replace(T=T, b=small.b[keep], G=G, D=D, P=small.P[..., keep], Y=small.Y[..., keep])


def apart(small: Small, spectrum: Array, U: Array) -> Small:
    """The same as m runs of one column each, where one group and no preconditioner leave eigenvectors U to themselves."""
    along = lambda v: (v @ U).T[..., None]
    one = np.ones((len(U), 1, 1, 1))
    return small._replace(T=spectrum[:, None, None], b=along(small.b), G=one, D=one, P=along(small.P), Y=along(small.Y))


def _mix(c: Array, G: Array) -> Array:
    """sum_g c_g G_g."""
    if c.shape[-1] == 1:
        return c[..., None] * G[..., 0, :, :]
    if c.ndim == 1 and G.ndim == 3:
        return np.tensordot(c, G, 1)
    return np.einsum("...g,...gab->...ab", c, G)


def step(small: Small, c: Array) -> tuple[Array, Array]:
    """The step as a matrix A (..., 2m+1, 2m+1) on (x, w, 1), and J (..., 2m, m), what it makes of a change of d.

    c: (6, ..., n), whose leading dimensions go with those of `small`.
    """
    m = small.T.shape[-1]
    eye = np.eye(m)
    mu, keep, rate = _mix(c[MU], small.G), _mix(c[KEEP], small.G), _mix(c[RATE] / small.rate, small.G)
    turn = eye + _mix(c[SHRINK], small.D)
    if small.inside:
        keep, out = turn @ keep, rate
    else:
        out = rate @ turn
    total = small.T + _mix(c[WD] * small.rate, small.D)
    b = small.b + np.sum(c[WD][..., None] * small.P, axis=-2)
    down = -out @ (eye + mu @ keep if small.nesterov else keep)
    J = np.concatenate(np.broadcast_arrays(down, keep), axis=-2)
    A = np.zeros((*np.broadcast_shapes(J.shape[:-2], total.shape[:-2]), 2 * m + 1, 2 * m + 1), J.dtype)
    A[..., : 2 * m, :m] = J @ total
    A[..., :m, :m] += eye - _mix(c[DECAY], small.G)
    A[..., :m, m : 2 * m] = -out @ (mu @ mu if small.nesterov else mu)
    A[..., m : 2 * m, m : 2 * m] = mu
    A[..., : 2 * m, 2 * m] = (J @ b[..., None])[..., 0]
    A[..., :m, 2 * m] -= np.sum(c[DECAY][..., None] * small.Y, axis=-2)
    A[..., 2 * m, 2 * m] = 1
    return A, J


def sensitivity(small: Small, at: Coefficients, weights: Array) -> Array:
    """(q,) `sum weights * dA / dphi_j` over all of A, `step`'s: differentiated backward, so that q costs nothing."""
    m, c, G, D = small.T.shape[-1], at.c, small.G, small.D
    to = lambda X, Y: X.swapaxes(-1, -2) @ Y
    by = lambda X, Y: X @ Y.swapaxes(-1, -2)
    mu, given, rate = _mix(c[MU], G), _mix(c[KEEP], G), _mix(c[RATE] / small.rate, G)
    eye = np.eye(m)
    turn = eye + _mix(c[SHRINK], D)
    keep, out = (turn @ given, rate) if small.inside else (given, rate @ turn)
    total = small.T + _mix(c[WD] * small.rate, D)
    b = small.b + np.sum(c[WD][..., None] * small.P, axis=-2)
    forced = eye + mu @ keep if small.nesterov else keep
    J = np.concatenate([-out @ forced, keep], axis=-2)
    x, w, one = weights[..., : 2 * m, :m], weights[..., :m, m : 2 * m], weights[..., : 2 * m, 2 * m :]
    J_ = by(x, total) + one * b[..., None, :]
    forced_, carried_ = -to(out, J_[..., :m, :]), -to(out, w)
    out_ = -by(J_[..., :m, :], forced) - by(w, mu @ mu if small.nesterov else mu)
    mu_, keep_ = weights[..., m : 2 * m, m : 2 * m].copy(), J_[..., m:, :]
    if small.nesterov:
        mu_ += by(carried_, mu) + to(mu, carried_) + by(forced_, keep)
        keep_ = keep_ + to(mu, forced_)
    else:
        mu_ += carried_
        keep_ = keep_ + forced_
    if small.inside:
        given_, rate_, turn_ = to(turn, keep_), out_, by(keep_, given)
    else:
        given_, rate_, turn_ = keep_, by(out_, turn), to(rate, out_)
    each = lambda G, X: np.sum(G * X[..., None, :, :], axis=(*range(X.ndim - 2), -2, -1))
    summed = lambda P, v: np.sum(P * v.swapaxes(-1, -2), axis=(*range(P.ndim - 2), -1))
    c_ = [
        each(G, mu_),
        each(G, given_),
        each(G, rate_) / small.rate,
        small.rate * each(D, to(J, x)) + summed(small.P, to(J, one)),
        -each(G, x[..., :m, :]) - summed(small.Y, one[..., :m, :]),
        each(D, turn_),
    ]
    return np.einsum("iqn,in->q", at.dc, np.array(c_))


def moved(A: Array, y: Array, steps: int) -> Array:
    """`A^steps y`."""
    power = A if steps == 1 else np.linalg.matrix_power(A, steps)
    return (power @ y[..., None])[..., 0]


def swept(A: Array, lam: Array, y: Array, steps: int) -> tuple[Array, Array]:
    """`sum_i lambda_{i+1} y_i'` over the steps of a piece, and lambda at its start: one power of a block matrix."""
    back, first = A.swapaxes(-1, -2), lam[..., :, None] * y[..., None, :]
    if steps == 1:
        return first, (back @ lam[..., None])[..., 0]
    n = A.shape[-1]
    block = np.zeros((*A.shape[:-2], 2 * n, 2 * n))
    block[..., :n, :n] = block[..., n:, n:] = back
    block[..., :n, n:] = first
    power = np.linalg.matrix_power(block, steps)
    return power[..., :n, n:], (power[..., :n, :n] @ lam[..., None])[..., 0]


def along(f: Callable[..., Array], *at: Coefficients, batch: int = 0) -> Array:
    """(q, ...) df / dphi_j of an analytic function of coefficients, by complex steps: exact to rounding.

    f takes c (6, q, 1, ..., n) of each, with `batch` ones, and gives (q, ...).
    """
    steps = (a.c[:, None] + 1j * COMPLEX_STEP * a.dc for a in at)  # (6, q, n)
    return f(*(c.reshape(*c.shape[:2], *(1,) * batch, c.shape[2]) for c in steps)).imag / COMPLEX_STEP


def merged(parts: list[Piece], length: int) -> list[Piece]:
    """Pieces of so many steps each, the last of what is left, with the means of the coefficients over their steps."""
    ends = np.cumsum([piece.steps for piece in parts])
    starts, total, out = np.array([0, *ends[:-1]]), int(ends[-1]), []
    c, dc = (np.array(a) for a in zip(*(piece.at for piece in parts), strict=True))
    for a in range(0, total, length):
        b = min(a + length, total)
        share = np.clip(np.minimum(ends, b) - np.maximum(starts, a), 0, None) / (b - a)
        out.append(Piece(Coefficients(np.tensordot(share, c, 1), np.tensordot(share, dc, 1)), b - a))
    return out


def reference(pieces: list[Piece], nesterov: bool) -> Array:
    """(n,) rate of each group that a stage's coordinates hold: that of the first piece, where the groups' steps keep to one
    proportion; else such that no group is nearer to its ceiling than another when its steps are longest.  Never zero."""
    first = pieces[0].at.c[RATE]
    reach = np.max([_gain(piece.at, nesterov) for piece in pieces], axis=0)
    if (first > 0).all() and np.ptp(reach / first) <= 1e-12 * (reach / first).max():
        return first
    most = first.max() / reach.max() if first.any() and reach.any() else 1.0
    return np.where(reach > 0, reach, reach.max() or 1.0) * most


def _gain(at: Coefficients, nesterov: bool) -> Array:
    """(n,) of each group, two over the curvature at which its step grows."""
    mu = at.c[MU]
    return at.c[RATE] * at.c[KEEP] * (1 + 2 * mu if nesterov else 1.0) / (1 + mu)


def speed(at: Coefficients, rate: Array) -> float:
    """Distance, in steps of size one, that a step goes down a constant gradient once momentum has built up."""
    return float((at.c[RATE] / rate * at.c[KEEP] / (1 - at.c[MU])).max())


def ceiling(at: Coefficients, rate: Array, nesterov: bool) -> float:
    """Largest eigenvalue of `T + W` at which the frozen step does not grow."""
    most = float((_gain(at, nesterov) / rate).max())
    return 2 / most if most else np.inf
