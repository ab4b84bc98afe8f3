"""PyTorch: tune the hyperparameters of torch's own optimizers in a training loop of one's own.

`hopt = HyperOptimizer(opt, tune=("lr", "momentum"), val_loss=val_loss, steps=T)`, then `hopt.step(loss)` in place of
zero_grad, backward and step.  Tangents come from the user's own loss graph, by forward over reverse or double backward.
`inner` makes an `Inner` for `koopman_hpo.Tuner` and the exact tools, where the losses are functions of a batch.

A parameter that a step does not use is skipped, as torch does.  BatchNorm's running statistics are part of the state and
have tangents; other buffers that a model changes count as constants.  Parameters live on the CPU, or on one CUDA device,
which needs the extra `cuda`: there a step reads nothing, and a loss is a tensor until somebody looks at it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("koopman_hpo_adapters.torch needs PyTorch: pip install 'koopman-hpo[torch]'.") from error

from koopman_hpo import Guard, Hypergradient, Tuner, checkpoint
from koopman_hpo.errors import AdapterError, whole
from koopman_hpo.problem import Linearisation

from . import _torch_checks as checks
from . import _torch_options as options
from ._torch_inner import TorchInner
from ._torch_losses import Source, scalar

__all__ = ["HyperOptimizer", "inner"]

_CALL = "HyperOptimizer"
Loss = torch.Tensor | Callable[[], torch.Tensor]


def _wrap(
    call: str,
    opt: torch.optim.Optimizer,
    tune: Any,
    source: Source,
    clip_norm: float | None,
    settings: dict[str, Any],
) -> TorchInner:
    checks.optimizer(call, opt)
    whole(call, "chunk", 1 if settings.get("chunk") is None else settings["chunk"])
    plan = options.plan(opt)
    losses = {"train_loss": source.train, "val_loss": source.val}
    checks.wrapping(call, opt, losses, source.module, clip_norm)
    space, owned = options.space(tune, opt.param_groups, plan.rule)
    return TorchInner(opt, space, plan, source, owned, clip_norm=clip_norm, **settings)


def inner(
    opt: torch.optim.Optimizer,
    train_loss: Callable[[Any], torch.Tensor],
    val_loss: Callable[[Any], torch.Tensor],
    tune: Any,
    *,
    model: torch.nn.Module | None = None,
    clip_norm: float | None = None,
    generators: Sequence[torch.Generator] = (),
    **settings: Any,
) -> TorchInner:
    """A training run of a torch optimizer as an `Inner`: for `Tuner`, also in mode `restart`, and the exact tools.

    Args:
      opt, tune, model, clip_norm, generators: as for `HyperOptimizer`.
      train_loss, val_loss: batch -> scalar tensor with its graph.  Loss hyperparameters: tensors given in `tune`, or
        `run.losses.hyper[name]`.
      settings: `directions`, `seed`, `chunk`, `tangents`, as for `koopman_hpo.inner.sgd`.

    Raises:
      AdapterError, HyperparameterError: as `HyperOptimizer`.
    """
    source = Source(train_loss, val_loss, lambda batch: True, model, checks.generators("inner", generators))
    return _wrap("inner", opt, tune, source, clip_norm, settings)


class HyperOptimizer:
    """Wraps one of torch's optimizers and tunes its hyperparameters while the model trains.

    Args:
      opt: SGD, Adam, AdamW, RMSprop or Adagrad, fresh, any number of param groups, parameters on one device.
      tune: what to tune.  Names ("lr", "momentum", "weight_decay", "betas", ...), which start from `opt`; a dict
        {name: how}, where how is `log`, `logit` or `identity`, a start such as `log(0.1, knots=...)`, the list of all param
        groups' indices (a value for each), or, for a hyperparameter of the loss, its start, its tensor, or (tensor,
        transform); a list of such dicts, one a param group; or a `Space`.  `hopt.hyper[name]` is a loss hyperparameter's
        tensor: use it in the loss.
      val_loss: `() -> tensor`, the outer loss with its graph; called only where a hypergradient is due.
      steps: T, training steps that tuning takes.
      model: the module.  Needed where it has buffers: a rollback and a checkpoint take them along, and BatchNorm's running
        statistics get tangents.  Its training modes are restored after `val_loss`.
      clip_norm: clip the gradient's norm as `clip_grad_norm_` does, derivative included.
      generators: random generators that the loss uses beside torch's own, saved and restored with the run.
      directions: random tangent directions in place of all q; chunk: tangents pushed at a time; seed: of the directions.
      tangents: "bfloat16" or "float16" keeps those of a float32 model on a card in half of the memory.
      strategy, window, outer, guard, settings: as for `koopman_hpo.Tuner`.

    Attributes:
      tuner: the `Tuner`.  hyper: {name: tensor} the loss hyperparameters, natural values.  path: how tangents are made.

    Raises:
      AdapterError: an optimizer, option or parameter that is not supported.  HyperparameterError: a wrong `tune`.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        *,
        tune: Any,
        val_loss: Callable[[], torch.Tensor],
        steps: int,
        model: torch.nn.Module | None = None,
        clip_norm: float | None = None,
        generators: Sequence[torch.Generator] = (),
        directions: int | None = None,
        chunk: int | None = None,
        seed: int = 0,
        tangents: str | None = None,
        strategy: Any = None,
        window: int = 25,
        guard: Guard | None = Guard(),  # noqa: B008 - frozen
        **settings: Any,
    ):
        checks.mode(_CALL, settings.pop("mode", None))
        self._scales = checks.Scales()
        call_val = val_loss if not callable(val_loss) else lambda _: val_loss()
        again = lambda batch: not isinstance(batch, torch.Tensor)
        source = Source(self._scales.asked, call_val, again, model, checks.generators(_CALL, generators))
        more = {"directions": directions, "chunk": chunk, "seed": seed, "tangents": tangents}
        self.opt, self._val_loss = opt, val_loss
        self._inner = _wrap(_CALL, opt, tune, source, clip_norm, more)
        self.tuner = Tuner(self._inner, strategy, steps=steps, window=window, guard=guard, mode="online", **settings)
        self._inner.show(self.tuner.phi)

    @property
    def hyper(self) -> dict[str, torch.Tensor]:
        return self._inner.losses.hyper

    @property
    def path(self) -> str:
        return self._inner.losses.graph.path

    # -- in the loop ---------------------------------------------------------------------------------------------------

    def step(self, loss: Loss | None = None) -> float:
        """One training step; after `steps` of them, plain training with what was found.

        Args:
          loss: a scalar tensor with its graph; or a function that makes one, which is called again where the layers leave
            nothing but central differences; or None after `accumulate`.

        Returns:
          The loss, the accumulated ones added; of a model on a card a tensor there, for which nobody has waited.

        Raises:
          AdapterError: not a scalar with a graph, scaled by a GradScaler, a model changed after wrapping, a layer that
            cannot be differentiated twice; nothing has moved then.
        """
        batch = self._checked("step", loss)
        tuner, run = self.tuner, self._inner
        value = run.step(tuner.phi, batch, tangents=False) if tuner.done else tuner.step(batch, None)
        run.drop()  # where the call did no more than settle a step whose val_loss had failed
        self._resumed()
        return value

    def accumulate(self, loss: Loss) -> float:
        """Add a loss to those of the next `step`, as several backward calls do; returns it.  Its graph is freed.

        The sum is shown as the parameters' `.grad` until the step; to clip it, pass `clip_norm`.
        """
        return self._inner.accumulate(self.tuner.phi, self._checked("accumulate", loss), tangents=not self.tuner.done)

    def _checked(self, call: str, loss: Loss | None) -> Any:
        self._inner.check(self.tuner.phi, self.tuner.done)
        if loss is None and self._inner.accumulated and call == "step":
            return None
        if isinstance(loss, torch.Tensor) or not callable(loss):
            self._scales.refuse(f"{_CALL}.{call}", scalar(f"{_CALL}.{call}", loss))
        return loss

    # -- exact tools ---------------------------------------------------------------------------------------------------

    def hypergradient(self) -> Hypergradient:
        """The derivative of `val_loss` with respect to the hyperparameters, now."""
        return self._inner.hypergradient(None)

    def linearise(self, loss: Loss) -> Linearisation:
        """Gradients and Hessian-vector products of `loss` and of `val_loss` at the current parameters.

        Products are made when asked for: of a graph only as long as no step is taken; of a function, anew each time.
        """
        return self._inner.linearise(loss, self._val_loss)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, model and random generators too: arrays, and "meta".

        Raises:
          AdapterError: between `accumulate` and `step`, whose sum is no part of it.
        """
        self._settled("state_dict")
        return self.tuner.snapshot()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, bit for bit.  Raises CheckpointError, ShapeError: of other settings or model."""
        self.tuner.restore(state)
        self._resumed()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `state_dict()` to an `.npz` without pickle, whole or not at all; returns the path."""
        self._settled("save")
        return checkpoint.save(path, self.tuner)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from `save`, bit for bit.  Raises CheckpointError: corrupt, foreign, of other settings or model."""
        checkpoint.load(path, self.tuner)
        self._resumed()

    def _settled(self, call: str) -> None:
        if self._inner.accumulated:
            raise AdapterError(f"{_CALL}.{call}: losses are accumulated that no step has taken. Call step() first.")

    def _resumed(self) -> None:
        self._inner.losses.statistics.on = not self.tuner.done
        self._inner.show(self.tuner.phi)
