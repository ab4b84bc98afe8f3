"""The CUDA kernels on a card: right first, then how near to the card's memory bandwidth, and what a whole step costs.

    python benchmarks/gpu.py            # a few minutes on one NVIDIA card; needs the extras cuda, torch and test
    NUMBA_ENABLE_CUDASIM=1 python benchmarks/gpu.py --smoke     # no card: what can be proven without one

In order: every kernel against float64 NumPy on fresh random data; GB/s of each against a measured copy on the device, at
p = 1e6, 1e7, 1e8 and q = 1, 3, 10; the fused SGD and Adam updates against eager, `foreach` and compiled torch; a launch
at small p with and without a CUDA graph; the whole step of a ResNet-18 and of a transformer against plain training and
against the same step with torch's updates, by hand and under the torch adapter's `HyperOptimizer`, its peak memory, and
what crosses to the host in it; a window in JAX, where JAX sees the card. Prints one table, says which bars are met, and
writes benchmarks/results/gpu.json with the date and the card, after each part: what fails on the way is named there and
the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

try:
    import torch
    from cuda_cases import RULES, Case
except (ImportError, RuntimeError) as missing:  # of a driver, of numba-cuda, of torch: it says which
    raise SystemExit(
        f"gpu.py: {missing}\nIt needs an NVIDIA card and the extras cuda, torch and test. Without a card: "
        f"NUMBA_ENABLE_CUDASIM=1 python benchmarks/gpu.py --smoke"
    ) from None

from gpu_adapter import adapted_step, prove_adapter, to_host  # noqa: E402
from gpu_models import SHARES, Device, Training, images, loss_of, resnet, texts, transformer  # noqa: E402
from gpu_proofs import prove_kernels, prove_training  # noqa: E402
from gpu_updates import UPDATES, opponents  # noqa: E402

from koopman_hpo import tangent  # noqa: E402
from koopman_hpo.kernels.arrays import Coefficients, Grads, TangentState  # noqa: E402
from koopman_hpo.kernels.cuda import launch  # noqa: E402

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
RESULTS = HERE / "results" / "gpu.json"
NAMES = ("sgd", "adam", "rmsprop", "adagrad", "lion")


# -- right first ---------------------------------------------------------------------------------------------------------


def prove_updates(device, p):
    """torch's eager and `foreach` updates against the kernels, so that the race is between equals."""
    for name, peers in UPDATES.items():
        wanted = buffers(name, p, 3, device, torch.float64)
        kernel_step(name, wanted, device)()
        for peer in peers:
            got = buffers(name, p, 3, device, torch.float64)
            peer_step(peer, got)()
            for x, y in zip(got[0], wanted[0], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


# -- what is measured ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Sizes and repeats."""

    sizes: tuple[int, ...]  # p
    directions: tuple[int, ...]  # q
    race: int  # p of the race against torch
    copied: int  # floats
    models: tuple[tuple[str, Callable, Callable], ...]  # (name, model, batch(device))
    jax: tuple[tuple[int, ...], int, int]  # widths of a network, batch, steps of a window
    repeats: int
    backend: str  # of torch.compile


FULL = Plan(
    (10**6, 10**7, 10**8),
    (1, 3, 10),
    10**7,
    2**28,
    (
        ("ResNet-18, batch 128", resnet, lambda device: images(128, 32, device, torch.float32)),
        ("transformer, batch 32 x 128", transformer, lambda device: texts(32, 128, 1000, device)),
    ),
    ((1024, 4096, 4096, 1000), 256, 50),
    20,
    "inductor",
)
TINY = Plan(
    (1000,),
    (1, 3),
    1000,
    1000,
    (
        ("ResNet-18, tiny", lambda: resnet(2), lambda device: images(4, 8, device, torch.float32)),
        ("transformer, tiny", lambda: transformer(11, 8, 1), lambda device: texts(2, 5, 11, device)),
    ),
    ((8, 16, 4), 8, 5),
    1,
    "eager",
)


def buffers(name, p, q, device, dtype=torch.float32):
    """(state, grads, coefficients, blocks, scratch) of a kernel in the middle of a run, as torch tensors."""
    rule = RULES[name][0]
    make = torch.Generator(device.name).manual_seed(p + q)
    new = lambda *shape: torch.rand(shape, generator=make, device=device.name, dtype=dtype).add_(0.5)
    small = Case(name, (1,), q, np.float64).coefficients
    rows = Coefficients(*(torch.tensor(x, dtype=dtype, device=device.name) for x in small))
    state, grads = TangentState(new(p), new(rule.slots, p), new(q, p), new(rule.slots, q, p)), Grads(new(p), new(q, p))
    return state, grads, rows, torch.from_numpy(tangent.blocks((p,))).to(device.name), torch.empty(7, 1024, dtype=dtype)


def kernel_step(name, held, device):
    """A function that launches the kernel on buffers."""
    state, grads, rows, blocks = map(device.see, held[:4])
    return lambda: device.call(getattr(device.kernels, name), grads, rows, blocks, False, held[4].numpy(), state)


def peer_step(peer, held):
    state, grads, rows, _, _ = held
    c, dc = tuple(rows.c[:, 0].tolist()), rows.dc[:, :, 0]
    return lambda: peer(state, grads, c, dc)


def copy_bandwidth(plan, device):
    """GB/s, read and written, of a copy within the device's memory."""
    a = torch.zeros(plan.copied, device=device.name)
    b = torch.empty_like(a)
    return 2 * a.nbytes / device.milliseconds(lambda: b.copy_(a), plan.repeats) / 1e6


def bandwidths(plan, device, copy):
    rows = {}
    for p, q, (name, (make, moved, held)) in product(plan.sizes, plan.directions, launchers(device).items()):
        if 4 * held(p, q) > 0.9 * device.free():
            continue
        rate = 4 * moved(p, q) / device.kernel_milliseconds(make(p, q), plan.repeats) / 1e6
        rows[f"{name}, p = {p:.0e}, q = {q}"] = {"GB/s": rate, "of_copy": rate / copy}
    return rows


def launchers(device):
    """{kernel: (maker of a launch at p and q, floats that it moves, floats that it holds)}."""
    random = lambda *shape: torch.randn(shape, device=device.name)
    see, call = device.see, device.call

    def project(p, q):
        work, out = torch.zeros(SHARES, q, device=device.name, dtype=torch.float64), torch.zeros(q, device=device.name)
        args = [see(x) for x in (random(q, p), random(p), work, out)]
        return lambda: call(device.kernels.project, *args)

    def scale(p, q):
        x = see(random(q, p))
        return lambda: call(device.kernels.scale, x, 0.999)

    def combine(p, q):
        args = [see(x) for x in (random(q), random(q, p), random(p))]
        return lambda: call(device.trajectory.combine, *args)

    def gram_row(p, q):
        work = torch.zeros(SHARES, q, device=device.name, dtype=torch.float64)
        H, out, work = (see(x) for x in (random(q, p), random(q), work))
        return lambda: call(device.trajectory.gram_row, H, q, 1024, work, out)

    def gram(p, q):
        H, out = see(random(q, p)), see(random(q, q))
        return lambda: call(device.trajectory.gram, H, out)

    def fused(name):
        k = RULES[name][0].slots
        make = lambda p, q: kernel_step(name, buffers(name, p, q, device), device)
        return make, lambda p, q: p * (1 + q) * (2 + 2 * k + 1), lambda p, q: p * (1 + q) * (2 + k)

    around = lambda p, q: p * (q + 1)
    return {name: fused(name) for name in NAMES} | {
        "project": (project, around, around),
        "scale": (scale, lambda p, q: 2 * p * q, around),
        "combine": (combine, around, around),
        "gram_row": (gram_row, lambda p, q: p * q, around),
        "gram": (gram, lambda p, q: p * q * (q + 1), around),  # both rows of every pair, and the first from the cache
    }


def races(plan, device):
    """The fused updates at q = 3 against torch's own operations: ms of one in a queue, how many times ours is faster."""
    rows = {}
    clock = lambda call: device.milliseconds(call, plan.repeats, queued=10)
    for name in UPDATES:
        held = buffers(name, plan.race, 3, device)
        ours = clock(kernel_step(name, held, device))
        rows[f"{name}, ours"] = {"ms": ours, "times_ours": 1.0}
        for label, peer in opponents(name, plan.backend):
            try:
                ms = clock(peer_step(peer, held))
            except Exception as error:
                if label != "compiled":  # which needs a compiler that may be missing
                    raise
                rows[f"{name}, {label}, failed"] = {repr(error).splitlines()[0][:100]: math.nan}
            else:
                rows[f"{name}, {label}"] = {"ms": ms, "times_ours": ms / ours}
    return rows


def launches(plan, device):
    """Microseconds on the clock of a small SGD update (p = 1000, q = 3), launched one by one and from a CUDA graph."""
    go, n = kernel_step("sgd", buffers("sgd", 1000, 3, device), device), 100

    def clock(call):
        times = []
        for _ in range(plan.repeats):
            device.wait()
            start = time.perf_counter()
            call()
            device.wait()
            times.append((time.perf_counter() - start) / n * 1e6)
        return {"us": statistics.median(times)}

    go()
    rows = {"one by one": clock(lambda: [go() for _ in range(n)])}
    if device.cuda:
        rows["in a CUDA graph"] = clock(device.graph(lambda: [go() for _ in range(n)]).replay)
    return rows


def plain_torch(model, batch, device):
    """Plain training with torch's own fused SGD."""
    opt = torch.optim.SGD(model.to(device.name).parameters(), 0.05, 0.9, weight_decay=1e-3, fused=True)

    def step():
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()

    return step


def by_hand(plan, device, model, batch, q):
    """A step with q tangents, recording a hypergradient, and plain training: ms, peak memory, what crosses."""
    clock = lambda call: device.milliseconds(call, plan.repeats)
    torch.manual_seed(0)
    peak_torch, ms_torch = device.peak(lambda: clock(plain_torch(model(), batch, device)))
    peak_plain, ms_plain = device.peak(lambda: clock(Training(model(), batch, device, 0).plain))

    def stepped():
        run = Training(model(), batch, device, q)
        return run, clock(run.step)

    peak_step, (run, ms_step) = device.peak(stepped)
    peers = {}
    for label, peer in opponents("sgd", plan.backend):
        try:
            peers[f"ms_step_{label}"] = clock(lambda peer=peer: run.step(peer))
        except Exception:  # said by the race
            if label != "compiled":
                raise
    return peers | {
        "ms_torch": ms_torch,
        "ms_plain": ms_plain,
        "ms_step": ms_step,
        "ms_record": clock(run.hypergradient),
        "peak_MiB_torch": peak_torch,
        "peak_MiB_plain": peak_plain,
        "peak_MiB_step": peak_step,
        "bytes_to_host": to_host(run.step) if device.cuda else 0,
    }


def whole_step(plan, device, model, batch, q=3):
    """A step by hand and under the torch adapter, and both over the flop floor of plain training."""
    row = by_hand(plan, device, model, batch, q) | adapted_step(model, batch, device, plan.repeats)
    floor = (1 + 2 * q) * min(row["ms_torch"], row["ms_plain"])
    p = sum(x.numel() for x in model().parameters())
    return row | {"step_to_floor": row["ms_step"] / floor, "adapter_to_floor": row["ms_adapter"] / floor, "p": p}


# -- saying it -----------------------------------------------------------------------------------------------------------


def in_jax(plan, device):
    from gpu_jax import window  # last: what it needs, JAX on the card, may be missing

    return window(*plan.jax, plan.repeats, "gpu" if device.cuda else "cpu")


def parts(plan, device, copy):
    """{heading: what measures its rows}."""
    whole = lambda name, model, data: {name: whole_step(plan, device, model, data(device.name))}
    return (
        {
            "kernels": lambda: bandwidths(plan, device, copy),
            f"updates, p = {plan.race:.0e}, q = 3": lambda: races(plan, device),
            "a launch, p = 1000": lambda: launches(plan, device),
        }
        | {f"whole step, q = 3, {name}": partial(whole, name, model, data) for name, model, data in plan.models}
        | {"a window in JAX, q = 3": lambda: in_jax(plan, device)}
    )


def measure(plan, device, seed, path):
    """All parts, printed and written as they come; what fails is named there, on a card, and the rest goes on."""
    copy = copy_bandwidth(plan, device)
    card = torch.cuda.get_device_name() if device.cuda else "no card"
    result = {"date": date.today().isoformat(), "card": card, "copy_GB/s": copy, "seed": seed}
    result["versions"] = versions("numpy", "numba", "numba-cuda", "torch", "jax") | {"cuda": torch.version.cuda}
    print(f"{card}, {result['date']}: a copy makes {copy:.0f} GB/s")
    for heading, part in parts(plan, device, copy).items():
        print(f"\n{heading}", flush=True)
        if device.cuda:
            torch.cuda.empty_cache()
        started = time.perf_counter()
        try:
            result[heading] = part()
            for name, values in result[heading].items():
                print(f"  {name:30s}" + "".join(f"  {k} {v:.4g}" for k, v in values.items()))
            print(f"  ({time.perf_counter() - started:.0f} s)")
        except Exception as error:
            if not device.cuda:
                raise
            result[heading] = {"failed": {}, "error": repr(error)}
            print(f"  failed: {error!r}")
        if device.cuda:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def versions(*names):
    return {name: version(name) for name in names if find_spec(name.replace("-", "_"))}


def bars(result):
    """(what, value, the bar, whether it is met) for each figure that has one."""
    for heading, rows in result.items():
        if heading == "versions" or not isinstance(rows, dict) or "error" in rows:
            continue
        for name, row in rows.items():
            if heading == "kernels" and "1e+06" not in name:
                yield f"{name}, of a copy", row["of_copy"], ">= .85", row["of_copy"] >= 0.85
            if name.endswith(("eager", "compiled")) and heading.startswith("updates"):
                bar = 3 if name.endswith("eager") else 1
                yield f"{name}, times ours", row["times_ours"], f">= {bar}", row["times_ours"] >= bar
            for floor in (f for f in ("step_to_floor", "adapter_to_floor") if f in row and "ResNet" in name):
                yield f"{name}, {floor}", row[floor], "<= 1.15", row[floor] <= 1.15
            for crossed in (k for k in row if k.startswith("bytes_to_host")):
                yield f"{name}, {crossed}", row[crossed], "< 4 p", row[crossed] < 4 * row["p"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="no card: proofs in the simulator, and a dry run on the CPU")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the random data; fresh by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go")
    args = parser.parse_args()
    if args.smoke != SIMULATED or not (args.smoke or torch.cuda.is_available()):
        raise SystemExit(
            "gpu.py: needs an NVIDIA card and a torch that sees it, or, without one, --smoke and NUMBA_ENABLE_CUDASIM=1 in "
            "the environment."
        )
    print(f"seed {args.seed}")
    if args.smoke:
        launch.THREADS, launch.BLOCKS = 4, 2
    prove_kernels(*(((3, 14, 2), 2, 3) if args.smoke else ((300_000, 700_003, 1), 3, 20)), args.seed)
    print("all kernels agree with float64 NumPy")
    device = Device("cpu" if args.smoke else "cuda")
    prove_updates(device, 40 if args.smoke else 100_003)
    prove_training(device)
    print("torch's updates and the whole steps agree with the kernels and with central differences")
    prove_adapter(device)
    print("runs under HyperOptimizer agree with those on the CPU")
    result = measure(TINY if args.smoke else FULL, device, args.seed, args.out)
    print("\nbars")
    for what, value, bar, met in bars(result):
        print(f"  {what:50s} {value:10.4g}  {bar:8s} {'met' if met else 'MISSED'}")
    if args.smoke:
        print("\nA dry run on the CPU: these times say nothing, and are not kept.")


if __name__ == "__main__":
    main()
