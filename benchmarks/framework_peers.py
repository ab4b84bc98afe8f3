"""The contenders of frameworks.py: one function a method, each from the case's start through all its batches.

A method takes a `Case` and returns the hypergradient (3,) of the validation loss by lr, momentum and weight decay in
natural values; `plain` ones train and return None.  Ours sees the model as a user writes it, a torch module or a pure
JAX step; the peers get the leanest form that they accept.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from koopman_hpo_adapters import jax as ours
from koopman_hpo_adapters.torch import HyperOptimizer
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, linear, max_pool2d

from koopman_hpo import Local, Space, log, logit

TUNED = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
PIECE = 200  # steps of one JAX scan: their batches are stacked, and memory should not grow with the run


class Case(NamedTuple):
    """A model, the same for every framework, and what it is trained on."""

    module: Callable[[], nn.Module]
    forward: Callable[[list[Any], Any], Any]  # logits in torch from a list of parameters
    logits: Callable[[list[Any], Any], Any]  # the same in JAX
    arrays: tuple[np.ndarray, ...]  # initial parameters, in the module's order
    batches: list[Any]  # (x, y) NumPy
    val: Any

    def torch(self) -> tuple[list[Any], Any]:
        """Batches and validation batch as tensors, the memory shared."""
        tensors = lambda batch: tuple(map(torch.from_numpy, batch))
        seen: dict[int, Any] = {}
        return [seen.setdefault(id(b), tensors(b)) for b in self.batches], tensors(self.val)

    def params(self) -> list[Any]:
        return [torch.tensor(a).requires_grad_() for a in self.arrays]

    def model(self) -> nn.Module:
        model = self.module().to(torch.float64)
        with torch.no_grad():
            for p, a in zip(model.parameters(), self.arrays, strict=True):
                p.copy_(torch.from_numpy(a))
        return model


# -- two models --------------------------------------------------------------------------------------------------------


def mlp_module() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))


def mlp_forward(params, x):
    W1, b1, W2, b2 = params
    return linear(torch.tanh(linear(x, W1, b1)), W2, b2)


def mlp_logits(params, x):
    W1, b1, W2, b2 = params
    return jnp.tanh(x @ W1.T + b1) @ W2.T + b2


def lenet_module() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def lenet_forward(params, x):
    K1, c1, K2, c2, W1, b1, W2, b2, W3, b3 = params
    x = max_pool2d(torch.relu(conv2d(x, K1, c1, padding=2)), 2)
    x = max_pool2d(torch.relu(conv2d(x, K2, c2)), 2).flatten(1)
    return linear(torch.relu(linear(torch.relu(linear(x, W1, b1)), W2, b2)), W3, b3)


def lenet_logits(params, x):
    K1, c1, K2, c2, W1, b1, W2, b2, W3, b3 = params
    conv = lambda x, K, c, pad: jax.lax.conv(x, K, (1, 1), pad) + c[:, None, None]
    pool = lambda x: x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max(axis=(3, 5))
    x = pool(jax.nn.relu(conv(x, K1, c1, "SAME")))
    x = pool(jax.nn.relu(conv(x, K2, c2, "VALID"))).reshape(len(x), -1)
    return jax.nn.relu(jax.nn.relu(x @ W1.T + b1) @ W2.T + b2) @ W3.T + b3


# -- torch -------------------------------------------------------------------------------------------------------------


def torch_plain(case):
    batches, _ = case.torch()
    model = case.model()
    opt = torch.optim.SGD(model.parameters(), **TUNED)
    for x, y in batches:
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()


def torch_ours(case):
    batches, (xv, yv) = case.torch()
    model, steps = case.model(), len(case.batches) + 1  # the window stays open: what is timed is the hypergradient alone
    hopt = HyperOptimizer(
        torch.optim.SGD(model.parameters(), **TUNED),
        tune=tuple(TUNED),
        val_loss=lambda: cross_entropy(model(xv), yv),
        strategy=Local(),
        steps=steps,
        window=steps,
    )
    for x, y in batches:
        hopt.step(cross_entropy(model(x), y))
    return np.array([float(hopt.hypergradient().natural[name]) for name in TUNED])


def torch_forward(case, batched):
    """Forward mode by hand, as in FDS (Micaelli & Storkey 2021): tangents Z of parameters, V of velocities."""
    batches, (xv, yv) = case.torch()
    lr, mu, wd = TUNED.values()
    params = case.params()
    velocity = [torch.zeros_like(p) for p in params]
    Z, V = ([p.new_zeros((3, *p.shape)) for p in params] for _ in range(2))
    for x, y in batches:
        grads = torch.autograd.grad(cross_entropy(case.forward(params, x), y), params, create_graph=True)
        if batched:
            HZ = torch.autograd.grad(grads, params, Z, is_grads_batched=True)
        else:
            rows = [torch.autograd.grad(grads, params, [z[j] for z in Z], retain_graph=j < 2) for j in range(3)]
            HZ = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        with torch.no_grad():
            for p, g, v, z, dv, hz in zip(params, grads, velocity, Z, V, HZ, strict=True):
                dv.mul_(mu).add_(hz).add_(z, alpha=wd)
                dv[1].add_(v)
                dv[2].add_(p)
                v.mul_(mu).add_(g).add_(p, alpha=wd)
                z.sub_(dv, alpha=lr)
                z[0].sub_(v)
                p.sub_(v, alpha=lr)
    dE = torch.autograd.grad(cross_entropy(case.forward(params, xv), yv), params)
    return sum((z.flatten(1) @ d.flatten() for z, d in zip(Z, dE, strict=True)), torch.zeros(3, dtype=dE[0].dtype)).numpy()


def tuned():
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in TUNED.values()]


def penalty(wd, params):
    """Weight decay as a loss, for libraries that do not take a tensor for it."""
    return wd / 2 * sum((p * p).sum() for p in params)


def torch_reverse(case):
    """Reverse mode through the unrolled run, by hand."""
    batches, (xv, yv) = case.torch()
    lr, mu, wd = hyper = tuned()
    params = case.params()
    velocity = [torch.zeros_like(p) for p in params]
    for x, y in batches:
        grads = torch.autograd.grad(cross_entropy(case.forward(params, x), y), params, create_graph=True)
        velocity = [mu * v + g + wd * p for v, g, p in zip(velocity, grads, params, strict=True)]
        params = [p - lr * v for p, v in zip(params, velocity, strict=True)]
    return np.array(torch.autograd.grad(cross_entropy(case.forward(params, xv), yv), hyper))


def torch_higher(case):
    import higher

    batches, (xv, yv) = case.torch()
    hyper, model = tuned(), case.model()
    opt = torch.optim.SGD(model.parameters(), **TUNED)
    override = {name: [x] for name, x in zip(TUNED, hyper, strict=True)}
    with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
        for x, y in batches:
            diffopt.step(cross_entropy(fmodel(x), y))
        return np.array(torch.autograd.grad(cross_entropy(fmodel(xv), yv), hyper))


def torch_torchopt(case):
    import torchopt

    batches, (xv, yv) = case.torch()
    lr, mu, wd = hyper = tuned()
    params = tuple(case.params())
    opt = torchopt.sgd(lr, momentum=mu)
    state = opt.init(params)
    for x, y in batches:
        loss = cross_entropy(case.forward(params, x), y) + penalty(wd, params)
        updates, state = opt.update(torch.autograd.grad(loss, params, create_graph=True), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return np.array(torch.autograd.grad(cross_entropy(case.forward(params, xv), yv), hyper))


def torch_hypertorch(case):
    from hypergrad import diff_optimizers, hypergradients

    batches, (xv, yv) = case.torch()
    hyper, n = tuned(), len(case.arrays)
    loss = lambda params, hyper, batch: cross_entropy(case.forward(params, batch[0]), batch[1]) + penalty(hyper[2], params)
    step = diff_optimizers.Momentum(loss, lambda h: h[0], lambda h: h[1], iter(batches))
    params = step.get_opt_params(case.params())
    for _ in batches:
        params = step(params, hyper, create_graph=True)
    outer = lambda params, hyper: cross_entropy(case.forward(params[:n], xv), yv)
    return np.array(hypergradients.reverse_unroll(params, hyper, outer, set_grad=False))


# -- JAX ---------------------------------------------------------------------------------------------------------------


@lru_cache
def jax_functions(logits):
    """(step, loss, plain, forward) of a model; the last two jitted, a scan of stacked batches."""

    def loss(params, batch):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits(params, batch[0])), batch[1][:, None], 1))

    def step(state, hyper, batch):
        params, velocity = state
        value, g = jax.value_and_grad(loss)(params, batch)
        velocity = [
            hyper["momentum"] * v + g + hyper["weight_decay"] * w for v, g, w in zip(velocity, g, params, strict=True)
        ]
        return ([w - hyper["lr"] * v for w, v in zip(params, velocity, strict=True)], velocity), value

    @jax.jit
    def plain(state, hyper, batches):
        return jax.lax.scan(lambda state, batch: step(state, hyper, batch), state, batches)[0]

    @jax.jit
    def forward(state, tangents, hyper, batches):
        seeds = {name: jnp.eye(3)[j] for j, name in enumerate(hyper)}

        def body(carry, batch):
            state, tangents = carry
            push = lambda dstate, dhyper: jax.jvp(lambda s, h: step(s, h, batch)[0], (state, hyper), (dstate, dhyper))
            return jax.vmap(push, out_axes=(None, 0))(tangents, seeds), None

        return jax.lax.scan(body, (state, tangents), batches)[0]

    return step, loss, plain, forward


def jax_start(case):
    arrays = [jnp.asarray(a) for a in case.arrays]
    return arrays, [jnp.zeros_like(a) for a in arrays]


def stacked(batches, steps) -> Iterator[Any]:
    """Pieces of so many batches in one array each, as a user would hand them to a scan."""
    for i in range(0, len(batches), steps):
        yield tuple(np.stack(part) for part in zip(*batches[i : i + steps], strict=True))


def jax_plain(case, steps=PIECE):
    plain, state = jax_functions(case.logits)[2], jax_start(case)
    for piece in stacked(case.batches, steps):
        state = jax.block_until_ready(plain(state, TUNED, piece))


def jax_forward(case, steps=PIECE):
    """`vmap(jvp(step))` in a scan, written by hand."""
    _, loss, _, forward = jax_functions(case.logits)
    state = jax_start(case)
    tangents = jax.tree.map(lambda a: jnp.zeros((3, *a.shape)), state)
    for piece in stacked(case.batches, steps):
        state, tangents = jax.block_until_ready(forward(state, tangents, TUNED, piece))
    dE = jax.grad(loss)(state[0], case.val)
    return np.asarray(sum(z.reshape(3, -1) @ d.ravel() for z, d in zip(tangents[0], dE, strict=True)))


@lru_cache
def jax_val(logits):
    loss = jax_functions(logits)[1]
    return lambda state, hyper, batch: loss(state[0], batch)


def jax_run(case):
    space = Space(**{name: (logit if name == "momentum" else log)(x) for name, x in TUNED.items()})
    return ours.inner(jax_functions(case.logits)[0], jax_val(case.logits), jax_start(case), space)


def jax_ours(case):
    """A window as one scan."""
    run = jax_run(case)
    _, H = run.run(run.space.phi0, case.batches, case.val, every=min(PIECE, len(case.batches)))
    natural = run.space.gradient(run.phi, H[-1])
    return np.array([float(natural[name]) for name in TUNED])


def jax_ours_steps(case):
    """Step by step, as the tuner goes."""
    run = jax_run(case)
    for batch in case.batches:
        run.step(run.space.phi0, batch)
    return np.array([float(run.hypergradient(case.val).natural[name]) for name in TUNED])


# -- all of them -------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A contender."""

    framework: str
    kind: str  # "plain", "forward" (carried along, so there is a trajectory) or "reverse" (the end's value only)
    run: Callable[[Case], Any]
    get: tuple[str, str] = ("", "")  # module that it needs, and how to get it


METHODS = {
    "plain, torch": Method("torch", "plain", torch_plain),
    "plain, JAX scan": Method("JAX", "plain", jax_plain),
    "plain, JAX by steps": Method("JAX", "plain", lambda case: jax_plain(case, 1)),
    "ours, torch": Method("torch", "forward", torch_ours),
    "by hand, batched": Method("torch", "forward", lambda case: torch_forward(case, True)),
    "by hand, FDS-style loop": Method("torch", "forward", lambda case: torch_forward(case, False)),
    "by hand, reverse": Method("torch", "reverse", torch_reverse),
    "higher": Method("torch", "reverse", torch_higher, ("higher", "pip install higher")),
    "torchopt": Method("torch", "reverse", torch_torchopt, ("torchopt", "pip install torchopt")),
    "hypertorch": Method(
        "torch",
        "reverse",
        torch_hypertorch,
        ("hypergrad.diff_optimizers", "its repository is prolearner/hypertorch on GitHub"),
    ),
    "ours, JAX scan": Method("JAX", "forward", jax_ours),
    "ours, JAX by steps": Method("JAX", "forward", jax_ours_steps),
    "by hand, JAX scan": Method("JAX", "forward", jax_forward),
    "by hand, JAX by steps": Method("JAX", "forward", lambda case: jax_forward(case, 1)),
}


def missing() -> dict[str, str]:
    """{method: how to get it} of the peers that are not installed."""
    return {name: how for name, (*_, (module, how)) in METHODS.items() if module and not _found(module)}


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
