"""The torch adapter's step on a device: a model under `HyperOptimizer`, as a user has it, proven and profiled."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from gpu_models import images, loss_of, resnet, texts, transformer
from koopman_hpo_adapters.torch import HyperOptimizer

from koopman_hpo import Local

LONG = 10**9  # steps: no window ends, and no hypergradient is recorded, unless it is asked for


class Adapted:
    """SGD with momentum on one batch, whose lr, momentum and weight decay are tuned.

    `step()` is a training step with tangents, `hypergradient()` the derivative (3,) of the batch's loss, on the host.
    """

    def __init__(self, model, batch, device, **settings):
        self.model, self.batch = model.to(device), batch
        opt = torch.optim.SGD(self.model.parameters(), 0.05, 0.9, weight_decay=1e-3)
        still = {"steps": LONG, "window": LONG, "every": LONG, "strategy": Local(), "guard": None}
        tune = ("lr", "momentum", "weight_decay")
        self.hopt = HyperOptimizer(opt, tune=tune, val_loss=self._val, model=self.model, **still | settings)

    def _val(self):
        self.model.eval()
        return loss_of(self.model, self.batch)

    def step(self):
        self.model.train()
        return self.hopt.step(loss_of(self.model, self.batch))

    def hypergradient(self):
        return self.hopt.hypergradient().grad


def prove_adapter(device):
    """Runs on the device are those on the CPU, with recorded hypergradients and a tuner that moves the hyperparameters."""
    torch.manual_seed(0)
    small = (resnet(4), lambda at: images(6, 8, at, torch.float64)), (transformer(11, 8, 1), lambda at: texts(3, 5, 11, at))
    for model, batch in small:
        found = []
        for at in ("cpu", device.name):
            run = Adapted(copy.deepcopy(model).double(), batch(at), at, steps=8, window=2, every=1)
            losses = [float(run.step()) for _ in range(5)]
            found.append((losses, run.hypergradient(), run.hopt.tuner.phi))
        for cpu, other in zip(*found, strict=True):
            np.testing.assert_allclose(other, cpu, rtol=1e-6, atol=1e-9)


def adapted_step(model, batch, device, repeats):
    """ms of a step and of a recorded hypergradient, peak memory, and the bytes that each copies to the host."""
    row = _measured("", model, batch, device, repeats)
    return row | (_measured("_bfloat16", model, batch, device, repeats, tangents="bfloat16") if device.cuda else {})


def _measured(name, model, batch, device, repeats, **settings):
    def run():
        torch.manual_seed(0)
        run = Adapted(model(), batch, device.name, **settings)
        return run, device.milliseconds(run.step, repeats)

    peak, (run, ms) = device.peak(run)
    recorded = device.milliseconds(run.hypergradient, repeats)
    row = {f"ms_adapter{name}": ms, f"ms_adapter{name}_record": recorded, f"peak_MiB_adapter{name}": peak}
    if device.cuda:
        row[f"bytes_to_host_adapter{name}"] = to_host(run.step)
        row[f"bytes_to_host_adapter{name}_record"] = to_host(run.hypergradient)
    return row


KNOWN = 12_345  # bytes that are copied to see whether the profiler sees it


def to_host(call):
    """Bytes that a call copies from the card to the host, by torch's profiler."""
    known = torch.zeros(KNOWN, dtype=torch.uint8, device="cuda")
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        known.cpu()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return copied(json.loads(path.read_text())["traceEvents"])


def copied(events):
    """Bytes to the host in a trace, but for those of a copy of `KNOWN` bytes that must be there."""
    moved = [e.get("args", {}).get("bytes", 0) for e in events if "DtoH" in e.get("name", "")]
    if KNOWN not in moved:
        raise RuntimeError("the profiler does not see what is copied to the host")
    return sum(moved) - KNOWN
