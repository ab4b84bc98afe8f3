"""A device and its clock, two models, and a step of training with tangents by torch's double backward and our kernels."""

from __future__ import annotations

import gc
import math
import statistics
import time
from importlib import import_module

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from koopman_hpo import optimizers, tangent
from koopman_hpo.kernels import for_device
from koopman_hpo.kernels.arrays import Coefficients, Grads, TangentState
from koopman_hpo.optimizers import Dual


class Device:
    """The kernels of "cuda" or "cpu" on torch's tensors, and time on it.  The CPU is for trying the script out."""

    def __init__(self, name):
        self.name, self.cuda = name, name == "cuda"
        self.kernels = for_device(name)
        self.trajectory = import_module(f"koopman_hpo.kernels.{name}.trajectory")

    def see(self, x):
        """A tensor, or a named tuple of tensors, as the kernels take it."""
        if isinstance(x, tuple):
            return type(x)(*map(self.see, x))
        return self.kernels.device_array(x) if self.cuda else x.numpy()

    def call(self, kernel, *args):
        """Run a kernel on torch's current stream."""
        kernel(*args, **({"stream": torch.cuda.current_stream()} if self.cuda else {}))

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, call, repeats, queued=1):
        """Median time that the device takes for a call, after a few to warm up; of so many in a queue, which hides what the
        host takes to launch one where the device takes longer."""
        for _ in range(min(3, repeats)):
            call()
        calls = call if queued == 1 else lambda: [call() for _ in range(queued)]
        return statistics.median(self._once(calls) for _ in range(repeats)) / queued

    def kernel_milliseconds(self, call, repeats):
        """The same for a launch, out of a CUDA graph of several: the host has no part in it, however short it is."""
        if not self.cuda:
            return self.milliseconds(call, repeats)
        n = int(min(20, max(1, 5 / self.milliseconds(call, 3))))  # about 5 ms of them
        graph = self.graph(lambda: [call() for _ in range(n)])
        return self.milliseconds(graph.replay, repeats) / n

    def graph(self, call):
        """A CUDA graph of what a call, made before, launches on torch's current stream."""
        graph = torch.cuda.CUDAGraph()
        self.wait()
        with torch.cuda.graph(graph):
            call()
        return graph

    def _once(self, call):
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def peak(self, call):
        """MiB of device memory taken at most during a call, which makes what it needs, and what the call returns."""
        gc.collect()  # runs refer to themselves
        if not self.cuda:
            return 0.0, call()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, result

    def free(self):
        """Bytes of memory that can still be had."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() if self.cuda else math.inf


SETTING = {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-3}
SHARES = 512  # of the sum over parameters


class Block(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, n_in, n, stride):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(n_in, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n))
        self.two = nn.Sequential(nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n))
        same = stride == 1 and n_in == n
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(n_in, n, 1, stride, bias=False), nn.BatchNorm2d(n))

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + self.short(x))


def resnet(width=64, classes=10):
    """ResNet-18 for images of 32 x 32; 11.2 million parameters at width 64."""
    sizes = [
        (width, 1),
        (width, 1),
        (2 * width, 2),
        (2 * width, 1),
        (4 * width, 2),
        (4 * width, 1),
        (8 * width, 2),
        (8 * width, 1),
    ]
    layers, n_in = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for n, stride in sizes:
        layers.append(Block(n_in, n, stride))
        n_in = n
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))


def transformer(words=1000, width=256, layers=4):
    """An encoder over words that says the next one at every place; 3.7 million parameters."""
    stack = [nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(words, width), *stack, nn.LayerNorm(width), nn.Linear(width, words))


def images(n, side, device, dtype, seed=0):
    make = torch.Generator().manual_seed(seed)
    X, y = torch.randn(n, 3, side, side, generator=make, dtype=dtype), torch.randint(10, (n,), generator=make)
    return X.to(device), y.to(device)


def texts(n, length, words, device, seed=0):
    words = torch.randint(words, (n, length + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    return words[:, :-1], words[:, 1:]


def loss_of(model, batch):
    X, y = batch
    with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels cannot be differentiated twice
        return F.cross_entropy(model(X).flatten(0, -2), y.flatten())


class Training:
    """SGD with momentum whose parameters are views of flat memory, and tangents of lr, momentum and weight decay.

    `plain()` is a step without tangents, `step()` one with them, `step(peer)` the same with torch's operations in place of
    the kernel, `hypergradient()` the derivative (q,) of the batch's loss.
    """

    def __init__(self, model, batch, device, q=3):
        self.device, self.batch = device, batch
        self.model = model.to(device.name)
        self.params = list(self.model.parameters())
        theta = torch.cat([p.detach().reshape(-1) for p in self.params])
        for x, part in zip(self.params, self.cut(theta), strict=True):
            x.data = part
        new = lambda *shape, dtype=theta.dtype: torch.zeros(shape, dtype=dtype, device=theta.device)
        p = theta.numel()
        self.state, self.grads = TangentState(theta, new(1, p), new(q, p), new(1, q, p)), Grads(new(p), new(q, p))
        c, dc = (torch.tensor(x, dtype=theta.dtype, device=theta.device) for x in coefficients(q))
        self._rows = tuple(c[:, 0].tolist()), dc[:, :, 0]
        blocks = torch.from_numpy(tangent.blocks((p,))).to(theta.device)
        rest = device.see(blocks), False, np.empty((7, 1024), c.cpu().numpy().dtype)
        self._moving = *map(device.see, (self.grads, Coefficients(c, dc))), *rest, device.see(self.state)
        still = Grads(self.grads.g, self.grads.dG[:0]), Coefficients(c, dc[:, :0])
        self._still = *map(device.see, still), *rest, device.see(tangent.still(self.state))
        self.h = new(q)
        self._sums = device.see(new(SHARES, q, dtype=torch.float64)), device.see(self.h)

    def cut(self, flat):
        """Views of flat memory (p,) in the shapes of the parameters."""
        parts = flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def loss(self):
        return loss_of(self.model, self.batch)

    def _gradient(self, **graph):
        g = torch.autograd.grad(self.loss(), self.params, **graph)
        torch.cat([x.detach().reshape(-1) for x in g], out=self.grads.g)
        return g

    def plain(self):
        self._gradient()
        self.device.call(self.device.kernels.sgd, *self._still)

    def step(self, peer=None):
        g = self._gradient(create_graph=True)
        for z, into in zip(self.state.Z, self.grads.dG, strict=True):
            along = torch.autograd.grad(g, self.params, self.cut(z), retain_graph=True, materialize_grads=True)
            torch.cat([x.reshape(-1) for x in along], out=into)
        if peer is None:
            self.device.call(self.device.kernels.sgd, *self._moving)
        else:
            peer(self.state, self.grads, *self._rows)

    def hypergradient(self):
        self._gradient()
        self.device.call(self.device.kernels.project, self._moving[5].Z, self._moving[0].g, *self._sums)
        return self.h


def coefficients(q):
    """Rows (4, 1) and their tangents (4, q, 1): directions lr, momentum, weight decay, then lr again."""
    rule, seeds = optimizers.sgd(False), np.zeros((4, q, 1))
    for j in range(q):
        seeds[(0, 1, 3)[j] if j < 3 else 0, j] = 1.0
    duals = {n: Dual(np.array([x]), seeds[i]) for i, (n, x) in enumerate(SETTING.items())}
    rows = [rule.row(i, duals, 2) for i in range(4)]
    return np.array([r.x for r in rows]), np.array([r.dx for r in rows])
