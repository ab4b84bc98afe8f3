"""PyTorch: exact against reverse mode through the unrolled run, and true to torch's own optimizers."""

import copy

import numpy as np
import pytest
import torch
from koopman_hpo_adapters.torch import HyperOptimizer
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from koopman_hpo import Local, Space, log, outer
from koopman_hpo.errors import KoopmanHPOError

torch.set_num_threads(1)
STILL = outer.sgd(1e-12)


def data(dtype=torch.float64, n=12, d=5):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=rng, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def loss_of(model, params, x, y):
    return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)


def move(kind, p, g, s, h, t):
    """One step of one parameter as torch documents it: new (p, state); h holds tensors."""
    wd = h.get("weight_decay", 0.0)
    if kind == "AdamW":
        p = p - h["lr"] * wd * p
    else:
        g = g + wd * p
    if kind == "SGD":
        m = g if t == 1 else h["momentum"] * s[0] + (1 - h["dampening"]) * g
        return p - h["lr"] * m, (m,)
    if kind in ("Adam", "AdamW"):
        b1, b2 = h["beta1"], h["beta2"]
        m, v = b1 * s[0] + (1 - b1) * g, b2 * s[1] + (1 - b2) * g * g
        return p - h["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + h["eps"]), (m, v)
    if kind == "RMSprop":
        v = h["alpha"] * s[0] + (1 - h["alpha"]) * g * g
        m = h["momentum"] * s[1] + g / (v.sqrt() + h["eps"])
        return p - h["lr"] * m, (v, m)
    v = s[0] + g * g
    return p - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (v.sqrt() + h["eps"]), (v,)


def unrolled(kind, model, hyper, x, y, xv, yv, T):
    """{name: dE / d natural value} by reverse mode through the whole run."""
    h = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in hyper.items()}
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    states = {n: (torch.zeros_like(p),) * 2 for n, p in params.items()}
    for t in range(1, T + 1):
        grads = torch.autograd.grad(loss_of(model, params, x, y), list(params.values()), create_graph=True)
        moved = {n: move(kind, p, g, states[n], h, t) for (n, p), g in zip(params.items(), grads, strict=True)}
        params, states = {n: m[0] for n, m in moved.items()}, {n: m[1] for n, m in moved.items()}
    model.eval()
    grads = torch.autograd.grad(loss_of(model, params, xv, yv), list(h.values()))
    return {n: g.item() for n, g in zip(h, grads, strict=True)}, params


SETS = {
    "SGD": {"lr": 0.1, "momentum": 0.8, "dampening": 0.1, "weight_decay": 1e-2},
    "Adam": {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 1e-2},
    "AdamW": {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 1e-2},
    "RMSprop": {"lr": 1e-2, "alpha": 0.9, "momentum": 0.5, "eps": 1e-3, "weight_decay": 1e-2},
    "Adagrad": {"lr": 1e-1, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 1e-2},
}


def optimizer(kind, params, hyper):
    h = dict(hyper)
    if "beta1" in h:
        h["betas"] = (h.pop("beta1"), h.pop("beta2"))
    return getattr(torch.optim, kind)(params, **h)


def forward(kind, model, hyper, batch, val, T, **settings):
    """(HyperOptimizer, natural hypergradients) after T steps that leave phi where it is."""

    def val_loss():
        model.eval()
        loss = nn.functional.cross_entropy(model(val[0]), val[1])
        model.train()
        return loss

    opt = optimizer(kind, model.parameters(), hyper)
    settings = {"tune": tuple(hyper), "strategy": Local(), "outer": STILL, "forget": 1.0, "window": T} | settings
    hopt = HyperOptimizer(opt, val_loss=val_loss, steps=T + 1, model=model, guard=None, **settings)
    for _ in range(T):
        hopt.step(nn.functional.cross_entropy(model(batch[0]), batch[1]))
    return hopt, hopt.hypergradient().natural


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize(("dtype", "T", "rtol"), [(torch.float64, 50, 1e-10), (torch.float32, 10, 1e-4)])
def test_every_hyperparameter_agrees_with_reverse_mode(kind, dtype, T, rtol):
    x, y = data()
    net = mlp(dtype)
    wide = copy.deepcopy(net).double()
    want, _ = unrolled(kind, wide, SETS[kind], x.to(dtype).double(), y, x.to(dtype).double() + 0.5, y, T)
    hopt, got = forward(kind, net, SETS[kind], (x.to(dtype), y), (x.to(dtype) + 0.5, y), T)
    assert hopt.path == "forward over reverse"
    scale = max(abs(v * SETS[kind][n]) for n, v in want.items())
    for name, value in want.items():  # in float32 rounding is of the largest, in log coordinates
        floor = 0 if dtype == torch.float64 else rtol * scale / SETS[kind][name]
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=floor, err_msg=name)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.lstm(x[..., None])[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = self.embed((x * 3).long() % 7)
        with sdpa_kernel(SDPBackend.MATH):
            return self.out(nn.functional.scaled_dot_product_attention(z, z, z).mean(1))


class Carried(nn.Module):
    """BatchNorm whose running statistics keep their graph, as reverse mode through the whole run needs them."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.bias, self.eps, self.rate = like.weight, like.bias, like.eps, like.momentum
        self.running = torch.stack((like.running_mean, like.running_var))

    def forward(self, x):
        mean, var = self.running
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            moments = torch.stack((mean, x.var(0)))
            self.running = (1 - self.rate) * self.running + self.rate * moments
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


NETS = {
    "groupnorm": lambda: nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)),
    "lstm": Recurrent,
    "attention": Attention,
}


@pytest.mark.parametrize("net", NETS)
def test_layers_agree_with_reverse_mode(net):
    torch.manual_seed(3)
    model, (x, y) = NETS[net]().double(), data()
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    want, params = unrolled("SGD", other, SETS["SGD"], x, y, x + 0.5, y, 8)
    torch.manual_seed(7)
    hopt, got = forward("SGD", model, SETS["SGD"], (x, y), (x + 0.5, y), 8)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, err_msg=name)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, params[name])
    assert hopt.path in ("forward over reverse", "batched double backward", "looped double backward")


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(
    ("between", "path"),
    [(nn.Tanh, "forward over reverse"), (nn.Softplus, "batched double backward")],
    ids=["rule", "no rule"],
)
def test_running_statistics_agree_with_reverse_mode_through_them(between, path, chunk):
    torch.manual_seed(3)
    model, (x, y) = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), between(), nn.Linear(6, 3)).double(), data()
    other = copy.deepcopy(model)
    other[1] = Carried(other[1])
    want, params = unrolled("SGD", other, SETS["SGD"], x, y, x + 0.5, y, 20)
    hopt, got = forward("SGD", model, SETS["SGD"], (x, y), (x + 0.5, y), 20, chunk=chunk)
    assert hopt.path == path
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-10, err_msg=name)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, params[name])
    torch.testing.assert_close(torch.stack((model[1].running_mean, model[1].running_var)), other[1].running.detach())


@pytest.mark.parametrize("kind", SETS)
def test_state_dicts_stay_true(kind):
    (x, y), ours, theirs = data(), mlp(), mlp()
    hopt, _ = forward(kind, ours, SETS[kind], (x, y), (x, y), 5)
    opt = optimizer(kind, theirs.parameters(), SETS[kind])
    for _ in range(5):
        opt.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    mine, real = hopt.opt.state_dict()["state"], opt.state_dict()["state"]
    for i, slots in real.items():
        assert set(mine[i]) == set(slots)
        for name, value in slots.items():
            torch.testing.assert_close(mine[i][name], value)


def test_loss_hyperparameters_groups_frozen_unused_and_clipping_agree_with_differences():
    (x, y), start = data(), {"l2": 0.1, "lr": [0.1, 0.3]}

    def run(natural, T=6):
        model = mlp()
        extra, idle = model[2], nn.Parameter(torch.ones(2, dtype=torch.float64))
        model[0].bias.requires_grad_(False)
        opt = torch.optim.SGD([{"params": model[0].parameters()}, {"params": [*extra.parameters(), idle]}], lr=0.1)
        space = Space(lr=log(natural["lr"]), l2=log(natural["l2"]))
        val = lambda: nn.functional.cross_entropy(model(x + 0.5), y)
        hopt = HyperOptimizer(
            opt, tune=space, val_loss=val, steps=T + 1, window=T, outer=STILL, guard=None, forget=1.0, clip_norm=0.2
        )
        for _ in range(T):
            square = sum((p**2).sum() for p in extra.parameters())
            hopt.step(nn.functional.cross_entropy(model(x), y) + hopt.hyper["l2"] * square)
        assert torch.equal(idle.detach(), torch.ones(2, dtype=torch.float64))
        return hopt.hypergradient()

    h, e = run(start), 1e-5
    up, down = (run({"l2": 0.1 + d, "lr": [0.1, 0.3]}).value for d in (e, -e))
    np.testing.assert_allclose(h.natural["l2"], (up - down) / (2 * e), rtol=1e-6)
    up, down = (run({"l2": 0.1, "lr": [0.1, 0.3 + d]}).value for d in (e, -e))
    np.testing.assert_allclose(h.natural["lr"][1], (up - down) / (2 * e), rtol=1e-6)


def build(lr=0.1, seed=5):
    torch.manual_seed(seed)
    x, y = data()
    layers = (nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    model = nn.Sequential(*layers).double()
    opt = torch.optim.Adam(model.parameters(), lr=lr)

    def val_loss():
        model.eval()
        loss = nn.functional.cross_entropy(model(x + 0.5), y)
        model.train()
        return loss

    hopt = HyperOptimizer(opt, tune=("lr", "betas"), val_loss=val_loss, steps=20, window=5, model=model)
    return model, hopt, lambda: hopt.step(nn.functional.cross_entropy(model(x), y))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit():
    model, hopt, step = build()
    for _ in range(7):
        step()
    saved = copy.deepcopy(hopt.state_dict())
    losses = [step() for _ in range(15)]
    again, other, step = build(seed=6)
    other.load_state_dict(saved)
    assert [step() for _ in range(15)] == losses
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert hopt.opt.param_groups[0]["lr"] == other.opt.param_groups[0]["lr"] != 0.1


def test_divergence_takes_the_model_back():
    model, hopt, _ = build()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x, y = data()
    hopt.step(nn.functional.cross_entropy(model(x), y))
    hopt.step(nn.functional.cross_entropy(model(x), y) * float("nan"))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if "running" not in n and "num" not in n)
    np.testing.assert_allclose(hopt.opt.param_groups[0]["lr"], 0.1 / 3)


def bad(make, match):
    with pytest.raises(KoopmanHPOError, match=match):
        make()


def wrap(opt, **settings):
    return HyperOptimizer(opt, **{"tune": ("lr",), "val_loss": lambda: None, "steps": 30} | settings)


def test_bad_input_says_what_to_change():
    params = list(mlp().parameters())
    sgd = lambda **more: torch.optim.SGD(params, lr=0.1, **more)
    bad(lambda: wrap(torch.optim.Rprop(params)), "Use torch's SGD")
    bad(lambda: wrap(sgd(maximize=True)), "maximize=True is not supported")
    bad(lambda: wrap(sgd(), tune=("beta1",)), "tune names 'beta1'")
    bad(lambda: wrap(sgd(), tune=("weight_decay",)), "small positive value")
    bad(lambda: wrap(sgd(), val_loss=3), "val_loss must be a function")
    bad(lambda: wrap(torch.optim.SGD([torch.ones(2, dtype=torch.float16, requires_grad=True)], lr=1.0)), "float64")
    model, hopt, step = build()
    bad(lambda: hopt.step(torch.tensor(1.0)), "with its graph")
    hopt.opt.param_groups[0]["lr"] = 3.0
    bad(step, "knots")
    model, hopt, step = build()
    x, y = data(torch.float32)
    model.float()
    bad(lambda: hopt.step(nn.functional.cross_entropy(model(x), y)), "moved, cast")
