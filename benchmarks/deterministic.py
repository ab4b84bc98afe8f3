"""Regularisers and learning rates of full-batch models tuned to the optimum: the trust region, exact and implicit ways.

    python benchmarks/deterministic.py [--problems NAME ...] [--seeds N] [--trials N] [--output FILE]

Ridge regression on diabetes (65 polynomial features in 10 groups, one weight decay each) and softmax regression on digits
(400 images, a fifth of the labels random; one weight decay a class, or one a pixel).  Training is SGD with momentum 0.9.
Without lr the outer loss is that of converged training; with lr, that after T steps from the start.

Methods: `trust.minimise`; the exact h[T] in reverse mode with SciPy's L-BFGS-B; HOAG (Pedregosa 2016: inexact L-BFGS inner
solves and conjugate gradients, warm, with a tolerance that falls at every step; the best of four settings, and the median);
implicit gradients at one tight tolerance with L-BFGS-B; TPE (Optuna, or random search where it is missing) over full runs.
Costs are in gradients of the inner loss: a Hessian-vector product counts as one, an inner step in reverse mode as three.
Reported: the cost at which the true validation loss is within 1e-3 of the reference's, a converged L-BFGS-B run from the
same start; the whole cost; the gap at the end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from koopman import cpu, on_one_thread, versions
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, cg

from koopman_hpo import Problem, Space, inner, log
from koopman_hpo.trust import minimise

MOMENTUM, NEAR = 0.9, 1e-3
Trace = list[tuple[float, np.ndarray]]  # (cost so far, phi) whenever a method moves


class Setting(NamedTuple):
    data: Callable[[int], tuple[Any, ...]]
    start: float  # weight decay
    bounds: tuple[float, float]
    lr: float
    steps: int
    tune_lr: tuple[float, float] | None  # its bounds
    window: int = 0
    columns: int = 64


def ridge(seed: int) -> tuple[Any, ...]:
    """Features in order of their group: the first variable of the monomial."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures

    X, y = load_diabetes(return_X_y=True)
    poly = PolynomialFeatures(2, include_bias=False)
    F, first = poly.fit_transform((X - X.mean(0)) / X.std(0)), (poly.fit(X).powers_ > 0).argmax(axis=1)
    F = ((F - F.mean(0)) / F.std(0))[:, np.argsort(first, kind="stable")]
    half = np.array_split(np.random.default_rng(seed).permutation(len(F)), 2)

    def loss(theta, X, y, Z):
        r, n = X @ theta - y, len(y)
        return 0.5 * r @ r / n, X.T @ r / n, (Z @ X.T) @ X / n

    y = (y - y.mean()) / y.std()
    return loss, *((F[i], y[i]) for i in half), tuple(np.bincount(first))


def softmax(seed: int, by_pixel: bool) -> tuple[Any, ...]:
    """Parameters class by class, or pixel by pixel."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X, rng = (X - X.mean()) / X.std(), np.random.default_rng(seed)
    order = rng.permutation(len(X))
    train, val, labels = order[:400], order[400:800], y.copy()
    wrong = train[rng.random(400) < 0.2]
    labels[wrong] = rng.integers(0, 10, len(wrong))
    matrix = lambda v: v.reshape(64, 10) if by_pixel else v.reshape(10, 64).T
    flat = lambda M: (M if by_pixel else M.T).ravel()

    def loss(theta, X, y, Z):
        A = X @ matrix(theta)
        A -= A.max(axis=1, keepdims=True)
        P = np.exp(A)
        total = P.sum(axis=1, keepdims=True)
        P /= total
        rows, n = np.arange(len(y)), len(y)
        value = (np.log(total[:, 0]) - A[rows, y]).mean()
        D = [P * (dA - (P * dA).sum(axis=1, keepdims=True)) for dA in (X @ matrix(z) for z in Z)]
        P[rows, y] -= 1
        dG = np.array([flat(X.T @ d / n) for d in D]).reshape(Z.shape)
        return value, flat(X.T @ P / n), dG

    return loss, (X[train], labels[train]), (X[val], y[val]), (10,) * 64 if by_pixel else (64,) * 10


SETTINGS = {
    "ridge, 10 groups": Setting(ridge, 1.0, (1e-2, 10.0), 0.1, 1000, None),
    "softmax, 10 classes": Setting(lambda s: softmax(s, False), 0.1, (1e-3, 10.0), 0.3, 1000, None, window=20),
    "softmax, 64 pixels": Setting(lambda s: softmax(s, True), 0.1, (1e-3, 10.0), 0.3, 1000, None, window=20),
    "ridge, 10 groups and lr": Setting(ridge, 1.0, (1e-2, 10.0), 0.003, 300, (1e-4, 0.1)),
    "softmax, 10 classes and lr": Setting(lambda s: softmax(s, False), 0.1, (1e-3, 10.0), 0.01, 300, (1e-3, 0.3)),
}


class Task:
    """A problem with its truth, and a count of gradients and products."""

    def __init__(self, setting: Setting, seed: int):
        self.setting = setting
        self.loss, self.train, self.val, self.groups = setting.data(seed)
        self.p, self.cost = sum(self.groups), 0
        low, high = setting.bounds
        decays = log(np.full(len(self.groups), setting.start), bounds=(low, high))
        lr = {} if setting.tune_lr is None else {"lr": log(setting.lr, bounds=setting.tune_lr)}
        self.space = Space(**lr, weight_decay=decays)
        self.bounds = list(zip(self.space.low, self.space.high, strict=True))
        self.warm = np.zeros(self.p), np.zeros(self.p)

    def run(self) -> Any:
        none = lambda theta, hyper, batch: (*self.loss(theta, *batch, theta[None][:0])[:2], {})
        jvp = lambda theta, hyper, Z, dhyper, batch: self.loss(theta, *batch, Z)
        lr = {} if "lr" in self.space else {"lr": self.setting.lr}
        problem = Problem(np.zeros(self.p), jvp, none, hyper=frozenset())
        return inner.sgd(problem, self.space, momentum=MOMENTUM, groups=self.groups, **lr)

    def gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        self.cost += 1
        return self.loss(theta, *self.train, theta[None][:0])[:2]

    def hvp(self, theta: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.cost += 1
        return self.loss(theta, *self.train, v[None])[2][0]

    def by_group(self, v: np.ndarray) -> np.ndarray:
        return np.add.reduceat(v, np.cumsum([0, *self.groups[:-1]]))

    def implicit(self, phi: np.ndarray, tolerance: float) -> tuple[float, np.ndarray]:
        """Outer loss of converged training and its gradient: inner gradient and adjoint residual below a tolerance."""
        w, (theta, adjoint) = np.repeat(np.exp(phi), self.groups), self.warm

        def penalised(theta: np.ndarray) -> tuple[float, np.ndarray]:
            value, g = self.gradient(theta)
            return value + 0.5 * w @ theta**2, g + w * theta

        options = {"maxiter": 10**4, "maxfun": 10**4, "ftol": 0, "gtol": tolerance / np.sqrt(self.p)}
        theta = minimize(penalised, theta, jac=True, method="L-BFGS-B", options=options).x
        value, dE, _ = self.loss(theta, *self.val, theta[None][:0])
        self.cost += 1
        H = LinearOperator((self.p, self.p), matvec=lambda v: self.hvp(theta, v.ravel()) + w * v.ravel())
        adjoint = cg(H, dE, x0=adjoint, rtol=0.0, atol=tolerance, maxiter=10**4)[0]
        self.warm = theta, adjoint
        return value, self.by_group(-w * theta * adjoint)

    def exact(self, phi: np.ndarray) -> tuple[float, np.ndarray]:
        """Outer loss after T steps and its gradient, in reverse mode."""
        lr = np.exp(phi[0]) if "lr" in self.space else self.setting.lr
        w, thetas, v = np.repeat(np.exp(phi[self.space.where("weight_decay")]), self.groups), [np.zeros(self.p)], 0.0
        for _ in range(self.setting.steps):
            v = MOMENTUM * v + self.gradient(thetas[-1])[1] + w * thetas[-1]
            thetas.append(thetas[-1] - lr * v)
        value, a, _ = self.loss(thetas[-1], *self.val, thetas[-1][None][:0])
        self.cost += 1
        b, h_lr, h_w = np.zeros(self.p), 0.0, np.zeros(self.p)
        for before, after in zip(thetas[-2::-1], thetas[:0:-1], strict=True):
            h_lr += a @ (after - before)  # = -lr v'a: the derivative by log lr
            b = b - lr * a
            h_w += w * before * b
            a = a + self.hvp(before, b) + w * b
            self.cost += 1  # a step of reverse mode counts as three
            b = MOMENTUM * b
        decay = self.by_group(h_w)
        return value, np.append(h_lr, decay) if "lr" in self.space else decay

    def true(self, phi: np.ndarray) -> float:
        """The outer loss that counts; costs nothing."""
        kept = self.cost, self.warm
        value = self.plain(phi) if "lr" in self.space else self.implicit(phi, 1e-7)[0]
        self.cost, self.warm = kept
        return float(value)

    def plain(self, phi: np.ndarray) -> float:
        run = self.run()
        for _ in range(self.setting.steps):
            run.step(phi, self.train, tangents=False)
        self.cost += self.setting.steps + 1
        return run.hypergradient(self.val).value

    @cached_property
    def reference(self) -> float:
        """Of a converged L-BFGS-B run from the same start."""
        f = self.exact if "lr" in self.space else lambda phi: self.implicit(phi, 1e-7)
        options = {"maxiter": 200, "ftol": 1e-11, "gtol": 1e-8}
        return float(minimize(f, self.space.phi0, jac=True, bounds=self.bounds, method="L-BFGS-B", options=options).fun)


def trust(task: Task) -> tuple[Trace, float, int]:
    s = task.setting
    settings = {"steps": s.steps, "warm": s.tune_lr is None, "window": s.window, "columns": s.columns}
    found = minimise(task.run(), task.train, task.val, **settings)
    moves = [(r.step, r.phi) for r in found.history if r.accepted]
    return moves, found.cost, found.steps


def scipy_lbfgs(task: Task, f: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> tuple[Trace, float]:
    trace: Trace = []

    def traced(phi: np.ndarray) -> tuple[float, np.ndarray]:
        out = f(phi)
        trace.append((task.cost, phi.copy()))
        return out

    minimize(traced, task.space.phi0, jac=True, bounds=task.bounds, method="L-BFGS-B", options={"maxiter": 60})
    return trace, task.cost


def hoag(task: Task, tolerance: float, fall: float, target: float) -> tuple[Trace, float]:
    """Gradient steps with the adaptive step size of Pedregosa's code; ends where the truth is near enough, as a favour."""
    phi, trace = task.space.phi0.copy(), []
    value, g = task.implicit(phi, tolerance)
    L = np.linalg.norm(g)  # a first step of length 1
    for _ in range(200):
        new = np.clip(phi - g / L, task.space.low, task.space.high)
        length, before, tolerance = np.linalg.norm(new - phi), tolerance, max(1e-7, fall * tolerance)
        value_new, g_new = task.implicit(new, tolerance)
        if value_new <= value + 0.25 * tolerance + 1.25 * before * length - L * length**2:
            L *= 0.95
        elif value_new >= 1.2 * value:
            L *= 2
            continue
        phi, value, g = new, value_new, g_new
        trace.append((task.cost, phi))
        if task.true(phi) <= target:
            break
    return trace, task.cost


def tpe(task: Task, trials: int, seed: int) -> tuple[Trace, float, str]:
    try:
        import optuna
    except ImportError:
        rng, best, trace = np.random.default_rng(seed), np.inf, []
        for _ in range(trials):
            phi = rng.uniform(task.space.low, task.space.high)
            value = task.plain(phi)
            if value < best:
                best = value
                trace.append((task.cost, phi))
        return trace, task.cost, "random search (Optuna is not installed)"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, trace = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)), []
    best = np.inf
    for _ in range(trials):
        trial = study.ask()
        phi = np.array([trial.suggest_float(n, *b) for n, b in zip(task.space.labels, task.bounds, strict=True)])
        value = task.plain(phi)
        study.tell(trial, value if np.isfinite(value) else 1e9)
        if value < best:
            best = value
            trace.append((task.cost, phi))
    return trace, task.cost, "TPE"


def scored(task: Task, trace: Trace, cost: float, **more: Any) -> dict[str, Any]:
    """Cost to get near the reference, whole cost, and the gap at the end."""
    gaps = [task.true(phi) / task.reference - 1 for _, phi in trace]
    near = next((c for (c, _), gap in zip(trace, gaps, strict=True) if gap < NEAR), None)
    return {
        "near": near,
        "cost": cost,
        "gap": gaps[-1],
        "trace": [(c, g) for (c, _), g in zip(trace, gaps, strict=True)],
    } | more


def compare(name: str, seed: int, trials: int) -> dict[str, Any]:
    """Every method on one problem, each with a task of its own."""
    setting = SETTINGS[name]
    judge = Task(setting, seed)
    rows: dict[str, Any] = {}
    task = Task(setting, seed)
    moves, cost, steps = trust(task)
    rows["trust region"] = scored(judge, moves, cost, steps=steps)
    task = Task(setting, seed)
    trace, cost = scipy_lbfgs(task, task.exact)
    rows["exact h[T], L-BFGS-B"] = scored(judge, trace, cost, steps=setting.steps * len(trace))
    if setting.tune_lr is None:
        target, tried = judge.reference * (1 + NEAR), []
        for tolerance in (1e-1, 1e-2):
            for fall in (0.9, 0.8):
                task = Task(setting, seed)
                tried.append(scored(judge, *hoag(task, tolerance, fall, target), setting=(tolerance, fall)))
        tried.sort(key=lambda row: row["near"] or np.inf)
        rows["HOAG, best of 4 settings"], rows["HOAG, the third of them"] = tried[0], tried[2]
        task = Task(setting, seed)
        rows["implicit, L-BFGS-B"] = scored(judge, *scipy_lbfgs(task, lambda phi: task.implicit(phi, 1e-4)))
    task = Task(setting, seed)
    trace, cost, method = tpe(task, trials, seed)
    rows[f"{method}, {trials} runs"] = scored(judge, trace, cost)
    return {"problem": name, "seed": seed, "q": judge.space.q, "reference": judge.reference, "methods": rows}


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['problem']}, seed {found['seed']}: q = {found['q']}, reference {found['reference']:.6f}")
    for name, row in found["methods"].items():
        near = "-" if row["near"] is None else f"{row['near']:,}"
        print(f"  {name:46} near at {near:>9}, whole cost {row['cost']:>9,}, gap {row['gap']:+.1e}", flush=True)


def main() -> None:
    on_one_thread()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).parent
    parser.add_argument("--problems", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=100, help="full runs of TPE")
    parser.add_argument("--output", type=pathlib.Path, default=here / "results" / "deterministic.json")
    arguments = parser.parse_args()
    results = []
    for name in arguments.problems:
        for seed in range(arguments.seeds):
            results.append(compare(name, seed, arguments.trials))
            show(results[-1])
            record = {"cpu": cpu(), "versions": versions(), "results": results}
            arguments.output.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
