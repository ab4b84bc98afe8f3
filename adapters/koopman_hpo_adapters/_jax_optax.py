"""A training step from a loss and an optax optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from koopman_hpo.errors import AdapterError
from koopman_hpo.space import Space

from ._jax_contract import Hyper, advised, expect_function, expect_key, expect_kind, expect_space, scalar
from ._jax_tree import is_array, put, trainable


class TrainState(NamedTuple):
    """What `train_step` carries."""

    params: Any
    opt_state: Any
    key: Any = None  # of dropout and the like; None where there is none


def constants(state: Any) -> list[bool]:
    """Which leaves of a state are constants of the program: what JAX cannot trace, bools, and the numbers among the
    parameters of a `TrainState`, which its optimizer does not train."""
    still = lambda x: not is_array(x) and (isinstance(x, bool) or not isinstance(x, int | float | complex))
    mark = lambda node: (
        TrainState(jax.tree.map(lambda x: not is_array(x), node.params), *jax.tree.map(still, node[1:]))
        if isinstance(node, TrainState)
        else still(node)
    )
    return jax.tree.leaves(jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, TrainState)))


def _injected(opt_state: Any) -> list[Any]:
    """The states of `optax.inject_hyperparams` in an optimizer's."""
    known = lambda x: type(x).__name__ in ("InjectHyperparamsState", "InjectStatefulHyperparamsState")
    return [x for x in jax.tree.leaves(opt_state, is_leaf=known) if known(x)]


@dataclass(frozen=True)
class TrainStep:
    """A training step `(state, hyper, batch) -> (state, loss)`; made by `train_step`."""

    loss: Callable[..., Any]
    optimizer: Callable[[Mapping[str, Any]], Any]

    def init(self, params: Any, space: Space, *, key: Any = None) -> TrainState:
        """The state before the first step.

        Args:
          params: pytree; leaves that are not real arrays (an Equinox model's functions, Python numbers) stay as they are.
          space: what is tuned.  key: a PRNG key if the loss takes one.

        Raises:
          HyperparameterError: space is none.
          AdapterError: params has no real array, key is none, the optimizer's maker returns something else, or
            `optax.inject_hyperparams` would hold a tuned value still.
        """
        expect_space("train_step.init", space)
        if key is not None:
            expect_key(key)
        trained = trainable(params)
        if not jax.tree.leaves(trained):
            raise AdapterError(
                "jax.train_step.init: params has no real array to train. Python numbers in it are constants: make what is "
                "trained an array, jnp.asarray(1.0)."
            )
        hyper = Hyper(space.at(space.phi0, 0).values)
        opt_state = self._optimizer(hyper).init(trained)
        if _injected(opt_state):
            self._expect_none_held(trained, hyper)
        return TrainState(params, opt_state, key)

    def _expect_none_held(self, trained: Any, hyper: Hyper) -> None:
        """An error if `optax.inject_hyperparams` keeps a value of `hyper` in its state, where no step reads it again."""

        def values(hyper: Hyper) -> list[dict[str, Any]]:
            states = _injected(self._optimizer(hyper).init(trained))
            timed = [getattr(state, "hyperparams_states", {}) for state in states]
            return [{k: x for k, x in s.hyperparams.items() if k not in t} for s, t in zip(states, timed, strict=True)]

        hyper = jax.tree.map(lambda x: jnp.asarray(x, float), hyper)
        with advised():
            _, slopes = jax.jvp(values, (hyper,), (jax.tree.map(jnp.ones_like, hyper),))
        held = [name for slope in slopes for name, x in slope.items() if x.dtype != jax.dtypes.float0 and (x != 0).any()]
        if held:
            raise AdapterError(
                f"jax.train_step.init: optax.inject_hyperparams keeps {', '.join(held)} in the optimizer's state, as it "
                f"was at init, so that nothing would be tuned. Pass the traced value to the optimizer itself, as "
                f"lambda hyper: optax.adam(hyper['lr'])."
            )

    def _optimizer(self, hyper: Mapping[str, Any]) -> Any:
        made = self.optimizer(hyper)
        if not all(callable(getattr(made, name, None)) for name in ("init", "update")):
            raise AdapterError(
                f"jax.train_step: optimizer must return an optax.GradientTransformation, got {type(made).__name__}. Write "
                f"it as lambda hyper: optax.adam(hyper['lr'])."
            )
        return made

    def __call__(self, state: TrainState, hyper: Mapping[str, Any], batch: Any) -> tuple[TrainState, Any]:
        expect_kind("train_step", "the state", state, TrainState, "what init of the step returned")
        params = trainable(state.params)
        value = lambda moved: self.loss_at(state._replace(params=put(moved, state.params)), hyper, batch)
        loss, g = jax.value_and_grad(value)(params)
        updates, opt_state = self._optimizer(hyper).update(g, state.opt_state, params)
        params = jax.tree.map(lambda x, u: (x + u).astype(x.dtype), params, updates)
        key = None if state.key is None else jax.random.split(state.key)[0]
        return TrainState(put(params, state.params), opt_state, key), loss

    def loss_at(self, state: TrainState, hyper: Mapping[str, Any], batch: Any) -> Any:
        """The loss of a state, with the key that its next step uses."""
        key = () if state.key is None else (jax.random.split(state.key)[1],)
        return scalar("the loss of train_step", self.loss(state.params, hyper, batch, *key))


def train_step(loss: Callable[..., Any], optimizer: Callable[[Mapping[str, Any]], Any]) -> TrainStep:
    """A training step for `inner` from a loss and an optax optimizer that is built inside the step.

        step = train_step(loss, lambda hyper: optax.adamw(hyper["lr"], b2=hyper["b2"]))
        run = inner(step, val_loss, step.init(params, space), space, params=lambda state: state.params)

    Args:
      loss: `(params, hyper, batch) -> scalar`, or `(params, hyper, batch, key)` if `init` is given a key: a fresh one a
        step.
      optimizer: `hyper -> optax.GradientTransformation`.  It sees traced values: where an optax schedule refuses them,
        build it of constants at height 1 and multiply, `lambda n: hyper["lr"] * schedule(n)`, or tune a schedule in the
        space (`log([...], knots=[...])`) and pass `hyper["lr"]` on.
    """
    for name, function in (("loss", loss), ("optimizer", optimizer)):
        expect_function("train_step", name, function)
    return TrainStep(loss, optimizer)
