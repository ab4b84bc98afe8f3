"""PyTorch passes the conformance suite: the core's numbers for every optimizer and hyperparameter, and on digits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from koopman_hpo_adapters import torch as kt
from koopman_hpo_adapters.conformance import Conformance, digits

from koopman_hpo import Space, hypergradient, inner, log, logit

torch.set_num_threads(1)
XP = SimpleNamespace(exp=torch.exp, log=torch.log, tanh=torch.tanh, sum=torch.sum, mean=torch.mean)
TORCH = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}


def make(model, factory, space, dtype, **flags):
    """A run of one flat parameter under torch's optimizer of that name."""
    theta = torch.nn.Parameter(torch.tensor(model.params(dtype)))
    opt = getattr(torch.optim, TORCH[factory])([theta], lr=0.01, **flags)
    train, val = model.losses(XP)
    hyper = {}
    run = kt.inner(opt, *(lambda b, f=f: f(theta, hyper, tuple(map(torch.as_tensor, b))) for f in (train, val)), space)
    hyper |= run.losses.hyper
    return run


class TestTorch(Conformance):
    on_digits = False  # below, for every hyperparameter

    def inner(self, model, optimizer, space, dtype):
        if optimizer.factory not in TORCH:
            return None
        start = {"momentum": 0.9} if optimizer.name == "nesterov" else {}  # torch asks for one; the space's stands
        return make(model, optimizer.factory, space, dtype, **optimizer.flags, **start)


CORES = {
    "sgd": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 1e-3},
    "nesterov": {"momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 1e-3},
    "adamw": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 1e-2},
    "rmsprop": {"alpha": 0.95, "momentum": 0.5, "eps": 1e-2, "weight_decay": 1e-3},
    "centered": {"alpha": 0.95, "momentum": 0.5, "eps": 1e-1, "weight_decay": 1e-3},
    "adagrad": {"lr_decay": 1e-2, "eps": 1e-2, "weight_decay": 1e-3},
}
LR = {"sgd": 0.1, "nesterov": 0.1, "adagrad": 0.05}
TRANSFORMS = dict.fromkeys(("momentum", "dampening", "beta1", "beta2", "alpha"), logit)
CASES = [(case, name) for case, names in CORES.items() for name in names]


def digits_pair(case, name, dtype):
    """Hypergradients of lr, one hyperparameter and the loss's l2 after 200 steps: ours, and the core's."""
    factory = {"nesterov": "sgd", "centered": "rmsprop"}.get(case, case)
    flags = {"nesterov": {"nesterov": True}, "centered": {"centered": True}}.get(case, {})
    start = {"initial_accumulator": 0.1} if case == "adagrad" else {}
    own = {"initial_accumulator_value": 0.1} if start else {}
    value = CORES[case][name]
    fixed = {n: v for n, v in CORES[case].items() if n != name}
    space = Space(lr=log(LR.get(case, 1e-3)), **{name: TRANSFORMS.get(name, log)(value)}, l2=log(1e-3))
    kept = {n: v for n, v in fixed.items() if not n.startswith("beta")}
    if factory in ("adam", "adamw"):
        kept["betas"] = (fixed.get("beta1", 0.9), fixed.get("beta2", 0.99))
    if case == "nesterov":
        kept["momentum"] = 0.9
    model = digits()
    run = make(model, factory, space, dtype, **kept, **flags, **own)
    core = getattr(inner, factory)(model.reference, space, **fixed, **flags, **start)
    found = hypergradient(run, model.batches(dtype), model.val_batch(dtype)).grad
    return found, hypergradient(core, model.batches(), model.val_batch()).grad


@pytest.mark.parametrize(("case", "name"), CASES)
def test_digits_agree_with_the_core(case, name):
    found, want = digits_pair(case, name, np.dtype(np.float64))
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("case", ["sgd", "adam", "rmsprop", "adagrad"])
def test_digits_agree_with_the_core_in_single_precision(case):
    found, want = digits_pair(case, next(iter(CORES[case])), np.dtype(np.float32))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
