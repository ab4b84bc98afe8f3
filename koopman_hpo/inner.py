"""What strategies and the tuner run: the `Inner` contract, and the inner optimizers that fill it for a `Problem`.

`inner.sgd(problem, space, momentum=0.9)` gives an `Inner` that tunes what `space` names and holds the rest fixed.  Names
in the space that the optimizer does not own are hyperparameters of the model's loss.

Options that every factory takes: `groups`, lengths of the segments that a per-group hyperparameter is spread over
(default: the problem's `segments`); `directions=s`, random tangent directions in place of all q (an unbiased estimate);
`chunk`, directions handed to the model at a time; `seed` of the random directions; `device="cuda"` for a model whose arrays
lie on an NVIDIA card; there, `tangents="bfloat16"` or `"float16"` keeps the tangents of float32 parameters in half of the
memory, with two to three digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import ArrayLike, NDArray

from . import checks, optimizers
from .engine import CoreInner
from .errors import AdapterError, KoopmanHPOError
from .optimizers import Rule
from .problem import Array, Hypergradient, Linearisation, Problem
from .space import Space

Value = ArrayLike | None


@runtime_checkable
class Inner(Protocol):
    """A training run as strategies and the tuner see it; they never look inside.

    A step's loss is a float, or what adds to one and gives one by `float(loss)`: a run that does not live on the host need
    not wait for its losses; the tuner looks at them where it waits for a hypergradient.  Given `record(batch)`, a
    hypergradient that stays where the run lives, and `recorded(those)`, which reads a list of them, a tuner waits for its
    trajectory once a window, or every 25 steps of a longer one.

    A run that does not live on the host may have `mark()` and `mark_params()` too: what `snapshot()` and `params` give,
    kept where the run lives, so that going back moves nothing to the host.  A run whose model is more than its parameters,
    BatchNorm's statistics say, has `buffers()`, these in `{name: array}`.  Given `adopt(phi, params, buffers)`, a tuner
    leaves it in mode `restart`, and the user's model with it, at the best it found.
    """

    @property
    def space(self) -> Space: ...
    @property
    def t(self) -> int: ...
    @property
    def params(self) -> Array: ...
    @property
    def directions(self) -> Array | None: ...  # (s, q) random directions that the tangents follow, or None
    def step(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> float: ...
    def hypergradient(self, batch: Any) -> Hypergradient: ...
    def run(self, phi: ArrayLike, batches: Iterable[Any], val_batch: Any, every: int = 1) -> tuple[Array, Array]: ...
    def forget(self, rho: float) -> None: ...
    def tangent_norm(self) -> float: ...
    def snapshot(self) -> dict[str, NDArray]: ...
    def restore(self, snapshot: Mapping[str, NDArray]) -> None: ...
    def linearise(self, batch: Any, val_batch: Any = None) -> Linearisation: ...


def mark(run: Inner) -> dict[str, Any]:
    """A snapshot to go back to, where the run lives if it can keep one there."""
    return getattr(run, "mark", run.snapshot)()


def mark_params(run: Inner) -> Any:
    """(p,) the current parameters, where the run lives if it can keep them there."""
    return run.mark_params() if hasattr(run, "mark_params") else run.params


def buffers(run: Inner) -> dict[str, Any]:
    """What the model holds beside its parameters, where the run lives if it can keep that there."""
    return run.buffers() if hasattr(run, "buffers") else {}


def require(call: str, run: Any, error: type[KoopmanHPOError] = AdapterError) -> None:
    """Refuse what is no `Inner`, in the name of the call, with the error that the call promises."""
    if not isinstance(run, Inner):
        raise error(
            f"{call}: the first argument must be an Inner, got {type(run).__name__}. Make one with "
            f"koopman_hpo.inner.sgd(problem, space) or an adapter."
        )


def _make(problem: Problem, space: Space, rule: Rule, fixed: Mapping[str, Value], options: Mapping[str, Any]) -> CoreInner:
    checks.options(f"inner.{rule.name}", rule, options)
    return CoreInner(problem, space, rule, fixed, **options)


def sgd(
    problem: Problem,
    space: Space,
    *,
    nesterov: bool = False,
    lr: Value = None,
    momentum: Value = None,
    dampening: Value = None,
    weight_decay: Value = None,
    **options: Any,
) -> CoreInner:
    """SGD with momentum, dampening, Nesterov and L2 weight decay, as torch.optim.SGD.

    Args:
      problem: the model.  space: what to tune.
      lr, momentum, dampening, weight_decay: held fixed here unless in the space; a number or one a group.  Where
        neither, momentum, dampening and weight_decay are 0; lr must be given.
      options: `groups`, `directions`, `chunk`, `seed`, `device`, `tangents` (see the module).

    Raises:
      HyperparameterError: an unknown name, a value outside its domain, one both tuned and fixed.
    """
    fixed = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    return _make(problem, space, optimizers.sgd(nesterov), fixed, options)


def adam(
    problem: Problem,
    space: Space,
    *,
    lr: Value = None,
    beta1: Value = None,
    beta2: Value = None,
    eps: Value = None,
    weight_decay: Value = None,
    **options: Any,
) -> CoreInner:
    """Adam with L2 weight decay, as torch.optim.Adam; defaults 1e-3, 0.9, 0.999, 1e-8, 0; otherwise as `sgd`."""
    fixed = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return _make(problem, space, optimizers.adam(decoupled=False), fixed, options)


def adamw(
    problem: Problem,
    space: Space,
    *,
    lr: Value = None,
    beta1: Value = None,
    beta2: Value = None,
    eps: Value = None,
    weight_decay: Value = None,
    **options: Any,
) -> CoreInner:
    """Adam with decoupled weight decay, as torch.optim.AdamW; weight_decay 1e-2 by default; otherwise as `adam`."""
    fixed = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return _make(problem, space, optimizers.adam(decoupled=True), fixed, options)


def rmsprop(
    problem: Problem,
    space: Space,
    *,
    centered: bool = False,
    lr: Value = None,
    alpha: Value = None,
    momentum: Value = None,
    eps: Value = None,
    weight_decay: Value = None,
    **options: Any,
) -> CoreInner:
    """RMSprop, as torch.optim.RMSprop; defaults 1e-2, 0.99, 0, 1e-8, 0; otherwise as `sgd`.

    `centered`: a variance that rounding takes below zero counts as zero (torch gives NaN there).
    """
    fixed = {"lr": lr, "alpha": alpha, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
    return _make(problem, space, optimizers.rmsprop(centered), fixed, options)


def adagrad(
    problem: Problem,
    space: Space,
    *,
    initial_accumulator: float = 0.0,
    lr: Value = None,
    lr_decay: Value = None,
    eps: Value = None,
    weight_decay: Value = None,
    **options: Any,
) -> CoreInner:
    """Adagrad, as torch.optim.Adagrad; defaults 1e-2, 0, 1e-10, 0; otherwise as `sgd`."""
    checks.initial_accumulator(initial_accumulator)
    fixed = {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay}
    return _make(problem, space, optimizers.adagrad(float(initial_accumulator)), fixed, options)


def lion(
    problem: Problem,
    space: Space,
    *,
    lr: Value = None,
    beta1: Value = None,
    beta2: Value = None,
    weight_decay: Value = None,
    **options: Any,
) -> CoreInner:
    """Lion (Chen et al. 2023), as published; defaults 1e-4, 0.9, 0.99, 0; otherwise as `sgd`.

    The derivative of its sign is zero wherever it exists and taken as zero everywhere: hypergradients of the betas are
    exactly zero, and those of lr and weight_decay are exact but for the steps at which a sign flips.
    """
    fixed = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay}
    return _make(problem, space, optimizers.lion(), fixed, options)
