"""JAX: any pure training step becomes an `Inner`, any pair of losses a `Problem`.

    run = inner(train_step, val_loss, state, space)        # your step and your optimizer, differentiated whole
    model = problem(train_loss, val_loss, params)          # your losses under the core's fused optimizers

The tangents of the whole state (parameters, optimizer slots, running statistics) come from `vmap(jvp(train_step))` inside
one jit; a window of steps is one `lax.scan`.  `init`, `point`, `step` and `hypergradient` are the pure functions of which
`inner` is made, for those who scan or shard themselves.  Letters: p parameters, q tangent directions.
"""

from __future__ import annotations

try:
    import jax as _jax  # noqa: F401 - asked for first: what follows needs it
except ImportError as error:
    raise ImportError("koopman_hpo_adapters.jax needs JAX: pip install 'koopman-hpo[jax]'.") from error

from ._jax_functions import Carry, Point, hypergradient, init, point, step
from ._jax_inner import JaxInner, inner
from ._jax_optax import TrainState, TrainStep, train_step
from ._jax_problem import problem
from ._tree import TreeProblem

__all__ = [
    "Carry",
    "JaxInner",
    "Point",
    "TrainState",
    "TrainStep",
    "TreeProblem",
    "hypergradient",
    "init",
    "inner",
    "point",
    "problem",
    "step",
    "train_step",
]
