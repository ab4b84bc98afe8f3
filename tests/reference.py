"""The slow, obvious oracle: textbook NumPy, no Numba, one function a formula.

Every optimizer is written as its paper or torch.optim states it, in arithmetic that also takes complex numbers.  That gives
exact Jacobians of one step (complex step, no cancellation), from which `reverse` accumulates adjoints backwards through
training: a second derivation of the hypergradient that shares nothing with forward mode.
"""

import numpy as np

TINY = 1e-40  # of the complex step: far below rounding, so that its square vanishes


def sgd(s, g, h, t, nesterov=False):
    d = g + h["weight_decay"] * s["theta"]
    buffer = d if t == 1 else h["momentum"] * s["m"] + (1 - h.get("dampening", 0.0)) * d
    step = d + h["momentum"] * buffer if nesterov else buffer
    return {"theta": s["theta"] - h["lr"] * step, "m": buffer}


def adam(s, g, h, t, decoupled=False):
    theta = s["theta"]
    if decoupled:
        theta = theta - h["lr"] * h["weight_decay"] * theta
    else:
        g = g + h["weight_decay"] * theta
    m = h["beta1"] * s["m"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["v"] + (1 - h["beta2"]) * g**2
    m_hat, v_hat = m / (1 - h["beta1"] ** t), v / (1 - h["beta2"] ** t)
    return {"theta": theta - h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"]), "m": m, "v": v}


def adamw(s, g, h, t):
    return adam(s, g, h, t, decoupled=True)


def rmsprop(s, g, h, t, centered=False):
    g = g + h["weight_decay"] * s["theta"]
    v = h["alpha"] * s["v"] + (1 - h["alpha"]) * g**2
    a = h["alpha"] * s["a"] + (1 - h["alpha"]) * g
    variance = v - a**2 if centered else v
    m = h["momentum"] * s["m"] + g / (np.sqrt(variance) + h["eps"])
    return {"theta": s["theta"] - h["lr"] * m, "v": v, "a": a, "m": m}


def adagrad(s, g, h, t):
    g = g + h["weight_decay"] * s["theta"]
    v = s["v"] + g**2
    rate = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return {"theta": s["theta"] - rate * g / (np.sqrt(v) + h["eps"]), "v": v}


def lion(s, g, h, t):
    theta = s["theta"] * (1 - h["lr"] * h["weight_decay"])
    u = np.sign((h["beta1"] * s["m"] + (1 - h["beta1"]) * g).real)  # locally constant: no derivative
    return {"theta": theta - h["lr"] * u, "m": h["beta2"] * s["m"] + (1 - h["beta2"]) * g}


RULES = {
    "sgd": (sgd, ("m",)),
    "adam": (adam, ("m", "v")),
    "adamw": (adamw, ("m", "v")),
    "rmsprop": (rmsprop, ("v", "a", "m")),
    "adagrad": (adagrad, ("v",)),
    "lion": (lion, ("m",)),
}


def train(name, gradient, theta, hyper, batches, **flags):
    """theta after training; `hyper(t)` gives the natural values at step t (from 0), `gradient(theta, hyper, batch)`."""
    rule, slots = RULES[name]
    state = {"theta": theta} | {k: np.zeros_like(theta) for k in slots}
    for t, batch in enumerate(batches):
        state = rule(state, gradient(state["theta"], hyper(t), batch), hyper(t), t + 1, **flags)
    return state["theta"]


def reverse(name, gradient, theta, hyper, phi, batches, outer_gradient, **flags):
    """(q,) dE/dphi by reverse accumulation over training; `hyper(t, phi)` gives the natural values at step t (from 0)."""
    rule, slots = RULES[name]
    keys, p = ("theta", *slots), theta.size

    def step(x, phi, t):
        s = {k: x[i * p : (i + 1) * p] for i, k in enumerate(keys)}
        h = hyper(t, phi)
        out = rule(s, gradient(s["theta"], h, batches[t]), h, t + 1, **flags)
        return np.concatenate([out[k] for k in keys])

    def columns(x, phi, t):
        """Rows are columns of the step's Jacobian: with respect to the state, and to phi."""
        along = lambda dx, dphi: step(x + 1j * TINY * dx, phi + 1j * TINY * dphi, t).imag / TINY
        zero, nothing = np.zeros(x.size), np.zeros(phi.size)
        return [along(e, nothing) for e in np.eye(x.size)], [along(zero, e) for e in np.eye(phi.size)]

    states = [np.concatenate([theta, np.zeros(p * len(slots))])]
    for t in range(len(batches)):
        states.append(step(states[-1], phi, t))
    adjoint = np.zeros(p * len(keys))
    adjoint[:p] = outer_gradient(states[-1][:p])
    total = np.zeros(phi.size)
    for t in reversed(range(len(batches))):
        by_state, by_phi = columns(states[t], phi, t)
        total += np.array(by_phi) @ adjoint
        adjoint = np.array(by_state) @ adjoint
    return total
