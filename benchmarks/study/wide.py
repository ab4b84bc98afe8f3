"""The paper's reweighting in small: class weights of a wide residual network on long-tailed KMNIST, in torch.

The network is Zagoruyko and Komodakis's: three groups of (depth - 4) / 6 blocks, twice as many channels in each as in the
one before, BatchNorm and ReLU before each convolution.  Small: depth 10 and 8 channels at first on images of 14x14; TRUE is
WRN-28-2 on images of 28x28.
"""

from __future__ import annotations

import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from koopman_hpo_adapters.torch import inner
from torch import nn
from torch.nn.functional import cross_entropy

from koopman_hpo import Global, Glocal, Local, Space, Tuner, log

from .problems import kmnist, pooled, standardised
from .tasks import CLASSES, Feed, long_tailed

LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


class Size(NamedTuple):
    """Of the network and of its training."""

    depth: int
    base: int  # channels of the first group
    pooled: int  # pixels on a side that are averaged
    most: int  # images of the largest class; the smallest has a fiftieth
    batch: int
    steps: int
    window: int
    validate: int
    test: int
    runs: int  # of true global, with tangents


SMALL = Size(10, 8, 2, 300, 32, 250, 25, 100, 2000, 3)
FULL = SMALL._replace(steps=1000, runs=5)
TRUE = Size(28, 32, 1, 400, 128, 1000, 50, 500, 5000, 4)
STRATEGIES: dict[str, Any] = {"local": Local(), "glocal": Glocal(snapshots=5), "global": Global()}


class Block(nn.Module):
    """Norm, ReLU, convolution, twice, beside the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(a), nn.BatchNorm2d(b)])
        self.first = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(a, b, 1, stride, bias=False) if (a, stride) != (b, 1) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        on = torch.relu(self.norms[0](x))
        out = self.second(torch.relu(self.norms[1](self.first(on))))
        return out + (x if self.skip is None else self.skip(on))


def network(size: Size, seed: int) -> nn.Module:
    """The residual network for one channel and ten classes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, size.base, 3, 1, 1, bias=False)]
    a = size.base
    for group in range(3):
        b = size.base * 2**group
        for k in range((size.depth - 4) // 6):
            layers.append(Block(a, b, 2 if group and k == 0 else 1))
            a = b
    return nn.Sequential(
        *layers, nn.BatchNorm2d(a), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, CLASSES)
    )


class Data(NamedTuple):
    """Tensors; training is long-tailed, the others are balanced as KMNIST is."""

    train: tuple[torch.Tensor, torch.Tensor]
    val: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    batch: Callable[[int], tuple[torch.Tensor, ...]]


def images(data: pathlib.Path, size: Size, seed: int, device: str = "cpu") -> Data:
    raw, y = kmnist(data)
    side, order = 28 // size.pooled, np.random.default_rng(seed).permutation(len(y))
    X = standardised(pooled(raw, size.pooled)).reshape(-1, 1, side, side).astype(np.float32)[order]
    y = y[order]
    tail = long_tailed(y[:4000], size.most)
    put = lambda rows: (torch.from_numpy(X[rows]).to(device), torch.from_numpy(y[rows]).to(device))
    train, val, test = put(tail), put(slice(4000, 4000 + size.validate)), put(slice(len(y) - size.test, len(y)))
    rows = Feed((np.arange(len(tail)),), min(size.batch, len(tail)), seed)
    return Data(train, val, test, lambda t: tuple(part[rows(t)[0]] for part in train))


def run(data: Data, size: Size, seed: int, device: str = "cpu") -> tuple[Any, nn.Module]:
    """A run that tunes the ten class weights, at its start, and its network."""
    model = network(size, seed).to(device)
    opt = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    space = Space(weights=log(np.ones(CLASSES), bounds=(1e-2, 1e2)))

    def loss(batch: Any) -> torch.Tensor:
        model.train()
        each = made.losses.hyper["weights"].to(device)[batch[1]]
        return (each * cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

    def val_loss(batch: Any) -> torch.Tensor:
        model.eval()
        return cross_entropy(model(batch[0]), batch[1])

    made = inner(opt, loss, val_loss, space, model=model)
    return made, model


def tuned(method: str, data: Data, size: Size, seed: int, device: str = "cpu") -> list[float]:
    """Test loss, test accuracy, seconds; "untuned" and "inverse frequency" hold the weights."""
    made, model = run(data, size, seed, device)
    clock = time.perf_counter if device != "cpu" else time.process_time
    begun = clock()
    if method in STRATEGIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner = Tuner(made, STRATEGIES[method], steps=size.steps, window=size.window, runs=size.runs)
            tuner.fit(data.batch, [data.val])
    else:
        counts = torch.bincount(data.train[1], minlength=CLASSES).double().cpu().numpy()
        weights = counts.mean() / counts if method == "inverse frequency" else np.ones(CLASSES)
        phi = made.space.phi({"weights": weights})
        for t in range(size.steps):
            made.step(phi, data.batch(t), tangents=False)
    seconds = clock() - begun
    model.eval()
    with torch.no_grad():
        logits = model(data.test[0])
        loss, hits = cross_entropy(logits, data.test[1]), (logits.argmax(1) == data.test[1]).double().mean()
    return [float(loss), float(hits), seconds]


METHODS = ("untuned", "inverse frequency", *STRATEGIES)


def row(job: tuple[str, int], data: pathlib.Path, size: Size, device: str) -> dict[str, Any]:
    method, seed = job
    torch.set_num_threads(1)
    found = tuned(method, images(data, size, seed, device), size, seed, device)
    return {"method": method, "seed": seed, "found": [round(x, 4) for x in found]}


def lines(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Method, test loss, accuracy, time in untuned runs; means over seeds."""
    found = {m: [r["found"] for r in rows if r["method"] == m] for m in METHODS}
    mean = {m: np.mean(values, axis=0) for m, values in found.items() if values}
    return [[m, f"{x[0]:.3f}", f"{100 * x[1]:.0f} %", float(x[2] / mean["untuned"][2])] for m, x in mean.items()]
