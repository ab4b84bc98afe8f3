"""The paper's experiments in small: optimizer hyperparameters of a LeNet on MNIST, and run time.

A LeNet for MNIST pooled to 14x14 (3,012 parameters, JAX under the library's own optimizers), 1,000 training and 150
validation images, batches of 32, 600 steps (full tier 2,000); tuned: lr and momentum of SGD, or lr and both betas of Adam.
"""

from __future__ import annotations

import math
import time
import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from koopman_hpo import Global, Glocal, Local, Space, Tuner, inner, log, logit

from . import problems
from .methods import rounded, seeds
from .page import percent, table
from .problems import Case
from .settings import Settings

FIRST_SEED, STEPS, RUNS = 10, 600, 4
STARTS = {"sgd": (1e-3, 1e-1), "adam": (1e-4, 1e-2)}
METHODS = ("untuned", "local", "glocal", "global")
LABELS = {"sgd": "SGD, lr and momentum", "adam": "Adam, lr, beta1 and beta2"}


def space(optimizer: str, lr: float) -> Space:
    betas = {"momentum": logit(0.9)} if optimizer == "sgd" else {"beta1": logit(0.9), "beta2": logit(0.99)}
    return Space(lr=log(lr), **betas)


def rows(job: tuple[str, int], data: Any, steps: int) -> list[dict[str, Any]]:
    """Every method from every start, one seed: validation and test loss, seconds of the process.  Compiled once."""
    optimizer, seed = job
    model, (train, val) = problems.MODELS["cnn"](Case("cnn", 1.0, seed, 32, optimizer=optimizer), data)
    images, y = problems.mnist(data)
    X = problems.standardised(problems.pooled(images, 2)).reshape(-1, 14, 14, 1).astype(np.float32)
    rest = np.random.default_rng(seed).permutation(len(X))[5000:]  # the first 1,150 of this order train and validate
    test, batch = (X[rest], y[rest].astype(np.int32)), problems.feed(train, 32, seed)
    found = []
    for lr in STARTS[optimizer]:
        for method in METHODS:
            run = getattr(inner, optimizer)(model, space(optimizer, lr))
            params, seconds = tuned(method, run, batch, val, steps)
            values = [float(model.outer(params, {}, d)[0]) for d in (val, test)]
            found.append({"optimizer": optimizer, "lr": lr, "seed": seed, "method": method})
            found[-1]["found"] = rounded([*values, seconds])
    return found


def tuned(method: str, run: Any, batch: Any, val: Any, steps: int) -> tuple[np.ndarray, float]:
    """Parameters in the end, and seconds of the process."""
    phi, begun = run.space.phi0, run.snapshot()
    for tangents in (True, False):  # compiles where this is the first run
        run.step(phi, batch(0), tangents=tangents)
    run.hypergradient(val)
    Glocal().estimate(np.random.default_rng(0).normal(size=(25, run.space.q)), steps)
    run.restore(begun)
    clock = time.process_time()
    if method == "untuned":
        for t in range(steps):
            run.step(phi, batch(t), tangents=False)
        return run.params, time.process_time() - clock
    strategy = {"local": Local(), "glocal": Glocal(), "global": Global()}[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = Tuner(run, strategy, steps=steps, runs=RUNS).fit(batch, [val])
    return result.params, time.process_time() - clock


def measure(settings: Settings) -> dict[str, Any]:
    if settings.data is None or find_spec("jax") is None:
        return {}
    seeds = range(FIRST_SEED, FIRST_SEED + (5 if settings.full else 2))
    steps, jobs = (2000 if settings.full else STEPS), [(o, s) for o in STARTS for s in seeds]
    done = settings.map(partial(rows, data=settings.data, steps=steps), jobs)
    found = {"steps": steps, "runs": RUNS, "rows": [r for part in done for r in part]}
    return found | ({"wide": reweighted(settings)} if find_spec("torch") else {})


def reweighted(settings: Settings) -> dict[str, Any]:
    """The wide residual network: its size, and every method on every seed."""
    from . import wide

    size = wide.FULL if settings.full else wide.SMALL
    job = partial(wide.row, data=settings.data, size=size, device="cpu")
    jobs = [(m, s) for s in range(FIRST_SEED, FIRST_SEED + (5 if settings.full else 3)) for m in reversed(wide.METHODS)]
    return {"size": size._asdict(), "rows": settings.map(job, jobs)}


def whole(x: float | None) -> float:
    """A stored loss; None stands for infinity."""
    return math.inf if x is None else x


def block(record: dict[str, Any]) -> str:
    """Test loss by start, and time in plain runs."""
    if not record["results"]:
        return "Not measured: it needs MNIST (--data) and JAX."
    parts = []
    for optimizer, rates in STARTS.items():
        mine = [r for r in record["results"]["rows"] if r["optimizer"] == optimizer]
        pick = lambda method, k, lr=None, mine=mine: np.array(
            [whole(r["found"][k]) for r in mine if r["method"] == method and lr in (None, r["lr"])]
        )
        plain = np.median(pick("untuned", 2))
        lines = [
            [
                m,
                *(f"{pick(m, 1, lr).mean():.3f}" for lr in rates),
                f"{pick(m, 1).mean():.3f}",
                float(np.median(pick(m, 2)) / plain),
            ]
            for m in METHODS
        ]
        parts.append(table([LABELS[optimizer], *(f"from lr {lr:g}" for lr in rates), "mean", "time, plain runs"], lines))
    return "\n\n".join([f"{seeds(record)} {record['results']['steps']:,} steps.", *parts])


def verdict(record: dict[str, Any]) -> str:
    """The claim, "the cost of local, the quality of global", in the figures of the table."""
    if not record["results"]:
        return ""
    out, runs = [], record["results"]["runs"]
    for optimizer in STARTS:
        mine = [r for r in record["results"]["rows"] if r["optimizer"] == optimizer]
        mean = lambda m, k, mine=mine: float(np.mean([whole(r["found"][k]) for r in mine if r["method"] == m]))
        time_, loss = ({m: mean(m, k) for m in METHODS} for k in (2, 1))
        out.append(
            f"{LABELS[optimizer]}: glocal takes {time_['glocal'] / time_['local']:.1f} times the time of local and "
            f"{percent(time_['glocal'] / time_['global'])} of that of true global ({runs} runs and the last); test loss "
            f"{loss['glocal']:.3f}, local {loss['local']:.3f}, global {loss['global']:.3f}."
        )
    return " ".join(out)


def wide_block(record: dict[str, Any]) -> str:
    if not record["results"].get("wide"):
        return "Not measured: it needs KMNIST (--data) and torch."
    return reweighting(record["results"]["wide"])


def reweighting(results: dict[str, Any]) -> str:
    """The wide residual network: losses, and times beside each other."""
    from . import wide

    size, rows, side = results["size"], results["rows"], 28 // results["size"]["pooled"]
    about = (
        f"WRN-{size['depth']}, {size['base']} to {4 * size['base']} channels, {size['steps']:,} steps of {size['batch']}, "
        f"{side}x{side} pixels; true global takes {size['runs']} runs and the last. "
        f"{seeds({'results': results})}"
    )
    return f"{about}\n\n{table(['class weights (q = 10)', 'test loss', 'accuracy', 'time, plain runs'], wide.lines(rows))}"


BLOCKS = {"paper.table": block, "paper.verdict": verdict, "paper.wide": wide_block}
FIGURES: dict[str, Any] = {}
