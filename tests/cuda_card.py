"""The torch adapter on a real card, beside its CPU runs: `python -m pytest tests/cuda_card.py` where there is one."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cuda_torch import TUNED, agree, resumes, wrapped
from koopman_hpo_adapters.torch import HyperOptimizer
from numba import config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from koopman_hpo import Guard, Local

F = nn.functional
pytestmark = pytest.mark.skipif(config.ENABLE_CUDASIM or not torch.cuda.is_available(), reason="needs a card")


def ran(steps, *args, **settings):
    """Runs of `wrapped` on the CPU and on the card, without dropout, whose masks differ."""
    runs = [wrapped(*args, drop=0.0, place=place, **settings) for place in ("cpu", "cuda")]
    for run in runs:
        for _ in range(steps):
            run[2]()
    return runs


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float64) for name in TUNED), ("adam", torch.float32)])
def test_a_run_is_the_one_on_the_cpu(name, dtype):
    agree(*ran(7, name, dtype, clip_norm=0.5), 1e-9 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("settings", [{"chunk": 2}, {"directions": 2, "seed": 3}])
def test_options_mean_the_same(settings):
    agree(*ran(5, "adam", **settings), 1e-9)


@pytest.mark.parametrize("kept", ["bfloat16", "float16"])
def test_tangents_in_half_the_memory_lose_what_their_type_loses(kept):
    full, half = (wrapped("adam", torch.float32, drop=0.0, place="cuda", **more) for more in ({}, {"tangents": kept}))
    for run in (full, half):
        for _ in range(3):
            run[2]()
    h, exact = half[1].hypergradient().grad, full[1].hypergradient().grad
    error = np.abs(h - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 3 * (2**-7 if kept == "bfloat16" else 2**-10)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path):
    """With dropout, whose masks come from the card's generator."""
    resumes(tmp_path, "cuda")


def test_a_window_that_diverges_is_taken_back():
    runs = ran(4, "sgd", guard=Guard(), lr=100.0)
    for run in runs:
        assert run[1].tuner.history[0].event.startswith("rolled back: validation loss")
    agree(*runs, 1e-9)


def test_a_loss_that_is_not_finite_is_noticed_where_h_is_recorded():
    net, x = nn.Linear(2, 1).double().cuda(), torch.ones(3, 2, dtype=torch.float64, device="cuda")
    opt = torch.optim.SGD(net.parameters(), 0.1)
    settings = {"steps": 8, "window": 4, "every": 4, "strategy": Local()}
    hopt = HyperOptimizer(opt, tune=("lr",), val_loss=lambda: net(x).square().mean(), **settings)
    for factor in (1.0, np.nan, 1.0, 1.0):
        hopt.step(net(x).square().mean() * factor)
    assert hopt.tuner.history[-1].event == "rolled back: inner loss is nan"


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.out = kind(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.net(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.out = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.out(self.net(x, x, x, need_weights=False)[0].mean(1))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 1))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.net(x.transpose(1, 2)).mean(2))


LAYERS = {
    "rnn": lambda: Recurrent(nn.RNN),
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "attention": Attention,
    "convolution": Convolution,
}


@pytest.mark.parametrize("named", [False, True], ids=["a graph", "a function"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_kernels_of_their_own_on_a_card(name, named):
    found = []
    for place in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = LAYERS[name]().double().to(place)
        x = torch.linspace(-1, 1, 8 * 6 * 2, dtype=torch.float64).sin().reshape(8, 6, 2).to(place)
        y = torch.arange(8, device=place) % 3
        opt = torch.optim.Adam(net.parameters(), 0.05)
        settings = {"window": 3, "steps": 6, "strategy": Local(), "guard": None, "model": net}
        val = lambda net=net, x=x, y=y: F.cross_entropy(net.eval()(x * 0.9), y)
        hopt = HyperOptimizer(opt, tune=("lr", "betas"), val_loss=val, **settings)
        loss = lambda net=net, x=x, y=y: F.cross_entropy(net.train()(x), y)
        with nullcontext() if named else sdpa_kernel(SDPBackend.MATH):
            losses = [float(hopt.step(loss if named else loss())) for _ in range(5)]
        h = hopt.hypergradient()
        found.append((losses, h.value, h.grad, hopt.path))
    assert found[1][3].split()[0] in ("forward", "batched", "looped")
    for cpu, card in zip(found[0][:3], found[1][:3], strict=True):
        np.testing.assert_allclose(card, cpu, rtol=1e-8, atol=1e-10)
