"""The same hypergradient without anything frozen: sgd's run in full, and its adjoint back through every step.

It costs a gradient, a linearisation and a Hessian-vector product a step, however many hyperparameters there are, and keeps
all states.  Where training is so far from quadratic that a prediction needs hundreds of products, it is the cheaper way.

Source: Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization".
"""

from __future__ import annotations

import numpy as np

from ..problem import Array
from . import roll
from .frozen import KEEP, MU, RATE, WD
from .model import Model
from .stage import Adjoint, spread

MOST_KEPT = 2**24  # numbers that the states of a run may take
PRICE = 3  # gradients that a step is worth


def can(model: Model, steps: int) -> bool:
    """Whether so many steps can be reversed: sgd, no hyperparameters in the loss, and states that can be kept."""
    dynamics = model.dynamics
    kept = 4 * steps * dynamics.state.theta.size
    return dynamics.rule.name == "sgd" and not dynamics.loss_names and kept <= MOST_KEPT


def hypergradient(model: Model, steps: int) -> tuple[Array, Array]:
    """(q,) the exact hypergradient so many steps ahead, and (p,) the parameters there; of a model that `can`."""
    here, way = roll.state(model), []
    theta, w = here.theta, here.momentum
    for t in range(here.t, here.t + steps):
        c = [spread(row, model) for row in model.coefficients(t).c]
        d = model.gradient(theta, t) + c[WD] * theta
        after = c[MU] * w + c[KEEP] * d
        way.append((theta, w, d, after))
        theta, w = theta - c[RATE] * (d + c[MU] * after if model.dynamics.rule.flag else after), after
    dE, h = model.outer(theta, here.t + steps)
    adjoint = Adjoint(dE, np.zeros_like(dE))
    for t in reversed(range(here.t, here.t + steps)):
        adjoint, part = _back(model, t, adjoint, *way.pop())
        h = h + part
    return h + roll.past(model, adjoint), theta


def _back(model: Model, t: int, adjoint: Adjoint, theta: Array, w: Array, d: Array, after: Array) -> tuple[Adjoint, Array]:
    """The adjoint before step t, and (q,) what the step's coefficients add to h; d is its gradient with decay, w and
    `after` the momentum before and after."""
    at, nesterov = model.coefficients(t), model.dynamics.rule.flag
    c = [spread(row, model) for row in at.c]
    u_ = -c[RATE] * adjoint.theta
    after_ = adjoint.momentum + (c[MU] * u_ if nesterov else u_)
    d_ = c[KEEP] * after_ + (u_ if nesterov else 0.0)
    change = np.zeros((len(c), theta.size))
    change[MU] = after_ * w + (u_ * after if nesterov else 0.0)
    change[KEEP], change[WD] = after_ * d, d_ * theta
    change[RATE] = -adjoint.theta * (d + c[MU] * after if nesterov else after)
    groups = np.add.reduceat(change, np.cumsum([0, *model.dynamics.groups[:-1]]), axis=1)
    curved = model.curvature(theta, t, False)(d_[None])[0]
    return Adjoint(adjoint.theta + c[WD] * d_ + curved, c[MU] * after_), np.einsum("iqn,in->q", at.dc, groups)
