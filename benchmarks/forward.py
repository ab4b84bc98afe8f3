"""The cost of an exact hypergradient in forward mode, beside plain training and beside JAX's forward mode.

    python benchmarks/forward.py [--quick]

Digits MLP 64-128-10 (p = 9,610), batch 128, float64, SGD with lr, momentum and weight decay tuned (q = 3); further
hyperparameters are knots of a schedule of lr.  One thread on one core, all contenders interleaved in one process,
medians of its CPU time: on an idle machine that is the time on the clock, on a busy one it leaves out what the
neighbours take.  Both libraries train on the same batches and must agree on the hypergradient.  Prints a table and
writes benchmarks/results/forward.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from koopman_hpo_adapters.numpy import mlp
from sklearn.datasets import load_digits

from koopman_hpo import Space, hypergradient, inner, log, logit

SIZES, BATCH, T = (64, 128, 10), 128, 100  # T: steps a turn, short so that all contenders see the same weather
START = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
RESULTS = Path(__file__).parent / "results" / "forward.json"


def data(steps):
    """(batches, validation batch): `steps` random training batches (X, y) of the digits, and 360 held-out examples."""
    X, y = load_digits(return_X_y=True)
    X, y = X / 16, y.astype(np.int64)
    pick = np.random.default_rng(0).integers(0, len(X) - 360, size=(steps, BATCH))
    return [(X[i], y[i]) for i in pick], (X[-360:], y[-360:])


def our_run(q):
    """A run that tunes q hyperparameters: momentum, weight decay, and q - 2 knots of the learning rate."""
    knots = tuple(range(q - 2))
    lr = log(START["lr"]) if q == 3 else log([START["lr"]] * (q - 2), knots=knots, schedule="constant")
    space = Space(lr=lr, momentum=logit(START["momentum"]), weight_decay=log(START["weight_decay"]))
    return inner.sgd(mlp(SIZES), space)


# -- the peer: JAX, vmap(jvp(step)) inside one scan --------------------------------------------------------------------


def jax_peer(theta):
    """(plain, forward, phi): jitted functions of stacked batches; plain trains, forward returns h[T] (3,) as well."""
    jax.config.update("jax_enable_x64", True)
    cuts = np.cumsum([64 * 128, 128, 128 * 10])
    W1, b1, W2, b2 = (jnp.array(part) for part in np.split(theta, cuts))
    params = (W1.reshape(64, 128), b1, W2.reshape(128, 10), b2)
    phi = jnp.array([jnp.log(START["lr"]), jax.scipy.special.logit(START["momentum"]), jnp.log(START["weight_decay"])])

    def loss(params, batch):
        W1, b1, W2, b2 = params
        logits = jnp.tanh(batch[0] @ W1 + b1) @ W2 + b2
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1))

    def step(state, phi, batch):
        params, velocity = state
        lr, mu, wd = jnp.exp(phi[0]), jax.nn.sigmoid(phi[1]), jnp.exp(phi[2])
        g = jax.grad(loss)(params, batch)
        velocity = jax.tree.map(lambda v, g, w: mu * v + g + wd * w, velocity, g, params)
        return jax.tree.map(lambda w, v: w - lr * v, params, velocity), velocity

    start = params, jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def plain(X, y):
        return jax.lax.scan(lambda state, batch: (step(state, phi, batch), None), start, (X, y))[0]

    @jax.jit
    def forward(X, y, val):
        def body(carry, batch):
            state, tangents = carry
            push = lambda dstate, dphi: jax.jvp(lambda s, f: step(s, f, batch), (state, phi), (dstate, dphi))
            return jax.vmap(push, out_axes=(None, 0))(tangents, jnp.eye(3)), None

        zero = jax.tree.map(lambda a: jnp.zeros((3, *a.shape)), start)
        (state, tangents), _ = jax.lax.scan(body, (start, zero), (X, y))
        dE = jax.grad(loss)(state[0], val)
        return sum(jnp.tensordot(dz, d, d.ndim) for dz, d in zip(tangents[0], dE, strict=True))

    return plain, forward, phi


# -- measuring ---------------------------------------------------------------------------------------------------------


def interleaved(contenders, repeats):
    """{name: median CPU milliseconds a step}.  contenders: {name: (function, steps it takes)}, each warmed up once."""
    seconds = {name: [] for name in contenders}
    for function, _ in contenders.values():
        function()
    for _ in range(repeats):
        for name, (function, steps) in contenders.items():
            start = time.process_time()
            function()
            seconds[name].append((time.process_time() - start) / steps)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}


def stepper(run, batches, val=None, tangents=True):
    """A function that takes len(batches) steps from the run's start, and the hypergradient if there is a `val` batch."""
    start, phi = run.snapshot(), run.space.phi0

    def go():
        run.restore(start)
        for batch in batches:
            run.step(phi, batch, tangents=tangents)
        if val is not None:
            run.hypergradient(val)

    return go


def extra_mib(steps, batches, val):
    """Peak MiB that the hypergradient over `steps` steps allocates, in a run of its own, the batches not counted."""
    run = our_run(3)
    run.step(run.space.phi0, batches[0])  # compiled, buffers not yet counted
    steps_batches = [batches[t % len(batches)] for t in range(steps)]
    tracemalloc.start()
    fresh = our_run(3)
    hypergradient(fresh, steps_batches, val)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def measure(quick):
    repeats = 10 if quick else 40
    batches, val = data(T)
    X, y = (jnp.array(np.stack(part)) for part in zip(*batches, strict=True))
    jval = tuple(jnp.array(part) for part in val)
    run = our_run(3)
    plain, forward, _ = jax_peer(run.params)

    ours, theirs = hypergradient(run, batches, val).grad, np.asarray(forward(X, y, jval))
    gap = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if gap > 1e-10:
        raise SystemExit(f"forward.py: the two hypergradients differ by {gap:.1e}, expected 1e-10: {ours} and {theirs}.")

    contenders = {
        "ours, plain": (stepper(run, batches, tangents=False), T),
        "JAX, plain": (lambda: jax.block_until_ready(plain(X, y)), T),
        "ours, q = 3": (stepper(run, batches, val), T),
        "JAX forward, q = 3": (lambda: jax.block_until_ready(forward(X, y, jval)), T),
    }
    for q in (12, 48, 96):
        some = batches[: max(4, 120 // q)]
        contenders[f"ours, q = {q}"] = (stepper(our_run(q), some), len(some))
    ms = interleaved(contenders, repeats)
    base = ms["ours, plain"]
    return {
        "ms_per_step": ms,
        "ratio_q3_to_plain": ms["ours, q = 3"] / base,
        "ratio_q3_to_jax": ms["ours, q = 3"] / ms["JAX forward, q = 3"],
        "plain_steps_per_further_hyperparameter": {
            q: (ms[f"ours, q = {q}"] - ms["ours, q = 3"]) / (q - 3) / base for q in (12, 48, 96)
        },
        "peak_extra_mib": {steps: extra_mib(steps, batches, val) for steps in (200, 2000)},
        "relative_gap_to_jax": gap,
    }


def report(result):
    ms = result["ms_per_step"]
    print(f"{'':22s}{'ms / step':>10s}{'/ our plain':>13s}")
    for name, each in ms.items():
        print(f"{name:22s}{each:10.3f}{each / ms['ours, plain']:13.2f}")
    print(f"\nq = 3 / our plain step   {result['ratio_q3_to_plain']:.2f}  (bar 4)")
    print(f"q = 3 / JAX forward      {result['ratio_q3_to_jax']:.2f}  (bar 1)")
    for q, slope in result["plain_steps_per_further_hyperparameter"].items():
        print(f"a further one, to q = {q:2d}  {slope:.2f}  plain steps (bar 1.05)")
    for steps, mib in result["peak_extra_mib"].items():
        print(f"peak extra at T = {steps:<5d}  {mib:.2f}  MiB (bar 5)")
    print(f"the two hypergradients agree to {result['relative_gap_to_jax']:.1e}")


def on_one_thread():
    """Start this script again with every library held to one thread, which they read only when they are loaded."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    one["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if os.environ.items() >= one.items():
        return
    slow = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # a machine's owner may have set them; they slow NumPy down
    os.execve(sys.executable, [sys.executable, *sys.argv], {k: v for k, v in os.environ.items() if k not in slow} | one)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args()
    on_one_thread()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result = measure(args.quick)
    result |= {"date": date.today().isoformat(), "cpu": cpu_name(), "python": platform.python_version()}
    result["versions"] = {name: version(name) for name in ("numpy", "numba", "scipy", "jax")}
    report(result)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
