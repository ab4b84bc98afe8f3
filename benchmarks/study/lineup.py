"""The line-up of the tuning study: which tasks, from where, and by which methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from koopman_hpo import Global, Glocal, Guard, Local, outer

from . import blackbox, more_tasks, peers, searching
from .methods import Cost, Trace, cosine, point, train, tuned
from .tasks import Task, noisy, plain


class Setting(NamedTuple):
    """What is tuned; seeds and trials of the small and of the full tier: fewer where a run is dear."""

    label: str
    make: Callable[[Any, int], Task]  # (data, seed)
    needs: tuple[str, ...] = ()  # "data", "jax"
    seeds: tuple[int, int] = (3, 5)
    trials: tuple[int, int] = (30, 60)

    def available(self, data: Any) -> bool:
        return ("data" not in self.needs or data is not None) and ("jax" not in self.needs or bool(find_spec("jax")))


TASKS = {
    "clean": Setting("KMNIST", plain, ("data",)),
    "noisy": Setting("KMNIST, 30 % random labels", noisy, ("data",)),
    "mnist": Setting("MNIST", partial(plain, of="mnist"), ("data",)),
    "tabular": Setting("diabetes, a regression", more_tasks.tabular, (), (8, 12)),
    "cnn": Setting("MNIST, LeNet", more_tasks.lenet, ("data", "jax"), (3, 5), (20, 60)),
    "cnn, kmnist": Setting("KMNIST, LeNet", partial(more_tasks.lenet, of="kmnist"), ("data", "jax"), (3, 5), (20, 60)),
    "characters": Setting("characters, recurrent", more_tasks.characters, ("jax",), (3, 5), (20, 60)),
}
STARTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RATES = np.geomspace(1e-4, 1.0, 9)
FIRST_SEED = 10  # constants were chosen on seeds from 100 on
GLOBAL_RUNS, BRACKETS, SWEEPS = 8, 6, 2
ONLINE = ("local", "glocal", "glocal, 5 a window", "local, guarded", "glocal, guarded")
FALLING = ("local, search first", "local, search, three runs")  # their lr, to zero
FIXED = "local, search, then fixed"  # the control
ONLINE += FALLING
ONE_RUN = ("untuned", "hypergradient descent", *ONLINE, FIXED, "global")
AGAIN = "local, search first, other batches"  # from the middle of the starts
GUARDED = {"outer": outer.adam(0.25), "guard": Guard(again=0.3, fall=1.0)}  # chosen on seeds from 100 on
BLACK_BOX = ("random", "random, cosine", "tpe", "tpe, cosine", "halving", "hyperband", "grid", "grid, cosine")
NAMES = {
    "local": "**local, online**",
    "glocal": "**glocal, online**",
    "glocal, 5 a window": "**glocal, online, 5 snapshots a window**",
    "local, guarded": "**local, online, guarded**",
    "glocal, guarded": "**glocal, online, guarded, 5 snapshots a window**",
    "local, search first": "**local, online, search first, lr falling**",
    "local, search, three runs": "**local, online, search first, three runs, lr falling**",
    FIXED: "local, search first, then lr falling and nothing tuned",
    "global": f"true global, {GLOBAL_RUNS} runs",
    "random": "random search",
    "random, cosine": "random search, cosine schedule",
    "tpe": "TPE",
    "tpe, cosine": "TPE, cosine schedule",
    "halving": "successive halving",
    "hyperband": "Hyperband",
    "grid": "tuned constant lr",
    "grid, cosine": "tuned cosine schedule",
    "prodigy": "Prodigy",
    "prodigy, cosine": "Prodigy, cosine schedule",
}


def one_run(method: str, task: Task, c: Cost) -> Trace:
    """A method that starts from the task's own setting."""
    others: dict[str, Callable[[], Trace]] = {
        "untuned": lambda: [point(task, task.steps, train(task, task.space.phi0))],
        "hypergradient descent": lambda: [peers.hypergradient_descent(task)],
        "local, search first": lambda: searching.search_first(task, c, Local()),
        "local, search, three runs": lambda: searching.search_first(task, c, Local(), searching.RUNS),
        FIXED: lambda: [searching.fixed(task, c, Local())],
        AGAIN: lambda: searching.again(task, c, Local()),
    }
    if method in others:
        return others[method]()
    settings: dict[str, tuple[Any, dict[str, Any]]] = {
        "local": (Local(), {}),
        "glocal": (Glocal(), {}),
        "glocal, 5 a window": (Glocal(), {"every": 5}),
        "local, guarded": (Local(), GUARDED),
        "glocal, guarded": (Glocal(), GUARDED | {"every": 5}),
        "global": (Global(), {"runs": GLOBAL_RUNS}),
    }
    strategy, more = settings[method]
    return [tuned(task, c, strategy, **more)[0]]


def black_box(method: str, task: Task, c: Cost, n: int, seed: int) -> Trace:
    at = cosine(task) if "cosine" in method else None
    if method.startswith("prodigy"):
        return [peers.prodigy(task, "cosine" in method)]
    if method.startswith("grid"):
        return blackbox.grid(task, c, RATES, at)
    if method == "halving":
        return blackbox.halving(task, c, BRACKETS, seed)
    if method == "hyperband":
        return blackbox.hyperband(task, c, SWEEPS, seed)
    search = blackbox.tpe if method.startswith("tpe") else blackbox.random
    return search(task, c, n, seed, at)


def starts_of(method: str) -> tuple[float, ...]:
    """True global takes many runs a start: every other one."""
    return {"global": STARTS[::2], AGAIN: STARTS[2:3]}.get(method, STARTS)
