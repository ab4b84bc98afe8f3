"""What forward over reverse saves: a step of the torch adapter by it and by double backward, over plain training.

    python benchmarks/torch_paths.py [--repeats 15]        # a minute on one core

Networks with normalisations, float32, on one thread, SGD with lr, momentum and weight decay tuned (q = 3), in one process
and in turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from gpu_adapter import Adapted
from gpu_models import images, resnet
from koopman_hpo_adapters import _torch_forward
from torch import nn
from torch.nn import functional as F


def perceptron(width):
    block = lambda n: (nn.Linear(n, width), nn.LayerNorm(width), nn.GELU())
    return nn.Sequential(nn.Flatten(), *block(3 * 32 * 32), *block(width), nn.Linear(width, 10))


def convolutions(width):
    block = lambda a, b, stride: (nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(4, b), nn.ReLU())
    layers = (*block(3, width, 2), *block(width, width, 1), *block(width, 2 * width, 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


# name: (maker, examples of a batch)
NETWORKS = {
    "MLP, width 32, LayerNorm": (lambda: perceptron(32), 32),
    "MLP, width 256, LayerNorm": (lambda: perceptron(256), 32),
    "3 convolutions, 8 channels, GroupNorm": (lambda: convolutions(8), 32),
    "3 convolutions, 32 channels, GroupNorm": (lambda: convolutions(32), 32),
    "ResNet-18, 4 channels, BatchNorm": (lambda: resnet(4), 16),
    "ResNet-18, 16 channels, BatchNorm": (lambda: resnet(16), 16),
}


def plain(model, batch):
    opt = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3)

    def step():
        opt.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step()

    return step


def tuned(model, batch, rules):
    """A step with tangents by these rules, which returns the path."""
    run = Adapted(model, batch, "cpu")

    def step():
        with mock.patch.object(_torch_forward, "RULES", rules):
            run.step()
        return run.hopt.path

    return step


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for name, (make, n) in NETWORKS.items():
        torch.manual_seed(0)
        batch = images(n, 32, "cpu", torch.float32)
        steps = plain(make(), batch), tuned(make(), batch, _torch_forward.RULES), tuned(make(), batch, {})
        for _ in range(3):  # compiles, and a new network's hooks have cost the others a step
            paths = [step() for step in steps]
        times = [[seconds(step) for step in steps] for _ in range(repeats)]
        one, ahead, twice = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{name:40s} plain {1e3 * one:6.1f} ms, {paths[1]} {ahead / one:.1f} times, {paths[2]} {twice / one:.1f} times"
        )


if __name__ == "__main__":
    main()
