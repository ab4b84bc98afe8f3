"""PyTorch passes the conformance suite: the core's numbers for every optimizer and hyperparameter, and on digits."""

from types import SimpleNamespace

import torch
from koopman_hpo_adapters import torch as kt
from koopman_hpo_adapters.conformance import Conformance

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
    def inner(self, model, optimizer, space, dtype):
        if optimizer.factory not in TORCH:
            return None
        start = {"momentum": 0.9} if optimizer.name == "nesterov" else {}  # torch asks for one; the space's stands
        return make(model, optimizer.factory, space, dtype, **optimizer.flags, **start)
