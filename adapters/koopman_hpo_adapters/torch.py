"""PyTorch: tune the hyperparameters of torch's own optimizers in a training loop of one's own.

`hopt = HyperOptimizer(opt, tune=("lr", "momentum"), val_loss=val_loss, steps=T)`, then `hopt.step(loss)` in place of
zero_grad, backward and step.  Tangents come from double backward on the user's own loss graph.

Experimental: exact where it is tested (SGD, Adam, AdamW, RMSprop, Adagrad; BatchNorm, GroupNorm, dropout, LSTM,
embeddings, attention under the MATH kernel), with limits that are not all refused.  Not noticed, and wrong: a loss scaled
by a GradScaler.  Not noticed, and without effect: gradient accumulation by several backward calls, and `clip_grad_norm_`
of one's own (pass `clip_norm=`).  A parameter that a step does not use counts as having a gradient of zero, so that decay
and momentum still move it, where torch skips it.  The running statistics of BatchNorm have no tangent: measure `val_loss`
in training mode, or know that they count as constants.  CUDA tensors and mode `restart` are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from koopman_hpo import Guard, Hypergradient, HyperparameterError, Problem, ShapeError, Tuner
from koopman_hpo.engine import CoreInner
from koopman_hpo.errors import AdapterError
from koopman_hpo.problem import Array

from . import _torch_options as options
from ._torch_graph import Graph, clipped

__all__ = ["HyperOptimizer"]

_CALL = "HyperOptimizer"
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class _TorchInner(CoreInner):
    """The core's run whose parameters and slots are the memory of torch's tensors; its batch is a loss graph."""

    def __init__(self, opt: Any, space: Any, plan: options.Plan, model: Any, clip_norm: float | None):
        self._opt, self._plan, self._model, self._clip = opt, plan, model, clip_norm
        groups = [[p for p in group["params"] if p.requires_grad] for group in opt.param_groups]
        params = [p for group in groups for p in group]
        flat = np.concatenate([p.detach().numpy().ravel() for p in params])
        names = [n for n in space.names if n not in plan.rule.defaults]
        self.hyper = {n: torch.tensor(space[n].value[0] if space[n].knots else space[n].value) for n in names}
        self.hyper = {n: h.to(params[0].dtype).requires_grad_() for n, h in self.hyper.items()}
        self.graph = Graph(params, self.hyper)
        self._buffer = np.empty((space.q + 1, flat.size), flat.dtype)
        segments = tuple(sum(p.numel() for p in group) for group in groups)
        problem = Problem(flat, self._gradients, self._outer_gradients, frozenset(names), segments)
        own = [n for n in plan.rule.defaults if n not in space]
        fixed = {n: np.array([options.read(group, n) for group in opt.param_groups]) for n in own}
        super().__init__(problem, space, plan.rule, fixed)
        self._move_in()

    def _move_in(self) -> None:
        """Make every parameter and optimizer slot a view of the engine's flat memory."""
        theta, slots, start = torch.from_numpy(self._state.theta), torch.from_numpy(self._state.slots), 0
        self._views, self._counts = [], []
        for p in self.graph.params:
            cut = slice(start, start + p.numel())
            p.data, start = theta[cut].view(p.shape), cut.stop
            p.grad = None
            self._views.append((p, p.data_ptr()))
            state = {n: slots[k, cut].view(p.shape) for k, n in enumerate(self._plan.slots) if self._keeps(p, n)}
            if self._plan.counts:
                state["step"] = torch.tensor(0.0)
                self._counts.append(state["step"])
            self._opt.state[p] = state

    def _keeps(self, p: torch.Tensor, slot: str) -> bool:
        """Whether torch itself would keep this slot for a parameter."""
        group = next(g for g in self._opt.param_groups if any(p is x for x in g["params"]))
        if slot == "momentum_buffer":
            return "momentum" in self.space or group["momentum"] != 0
        return slot != "grad_avg" or group["centered"]

    def snapshot(self) -> dict[str, NDArray]:
        buffers = self._buffers()
        return super().snapshot() | {f"buffer/{n}": b.detach().numpy().copy() for n, b in buffers.items()}

    def restore(self, snapshot: Mapping[str, NDArray]) -> None:
        buffers = self._buffers()
        for name, b in buffers.items():
            got = snapshot.get(f"buffer/{name}")
            if got is None or got.shape != tuple(b.shape):
                raise ShapeError(f"inner.restore: buffer {name} must be {tuple(b.shape)}; the snapshot has another model.")
        super().restore(snapshot)
        for name, b in buffers.items():
            b.copy_(torch.as_tensor(np.array(snapshot[f"buffer/{name}"])))

    def step(self, phi: ArrayLike, batch: Any, *, tangents: bool = True) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            return super().step(phi, batch, tangents=tangents)

    def sync(self, phi: Array) -> None:
        """Show phi's values at the next step in `param_groups`, the loss hyperparameters and the step counts."""
        values = self.space.at(phi, self.t).values
        for name, value in values.items():
            if name in self.hyper:
                self.hyper[name].data.copy_(torch.from_numpy(np.asarray(value, np.float64)))  # never by way of float32
            else:
                spread = np.broadcast_to(value, (len(self._opt.param_groups),))
                for group, x in zip(self._opt.param_groups, spread, strict=True):
                    options.write(group, name, float(x))
        for count in self._counts:
            count.fill_(float(self.t))
        self._shown = self._reading()

    def check(self) -> None:
        """Raise where the model or the optimizer was changed behind our back."""
        for p, ptr in self._views:
            if p.data_ptr() != ptr or not p.requires_grad:
                raise AdapterError(
                    f"{_CALL}.step: a parameter of shape {tuple(p.shape)} was moved, cast, replaced or frozen after "
                    f"wrapping. Change the model first, then make the HyperOptimizer."
                )
        if self._reading() != self._shown:
            raise AdapterError(
                f"{_CALL}.step: param_groups were changed or added to from outside, by a scheduler perhaps. A schedule "
                f"is tuned with knots: Space(lr=log([.1, .01], knots=(0, 1000)))."
            )

    def _reading(self) -> list[list[float]]:
        return [[options.read(g, n) for n in self.rule.defaults] for g in self._opt.param_groups]

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {} if self._model is None else dict(self._model.named_buffers())

    def _gradients(self, theta: Array, hyper: Any, Z: Array, dhyper: Any, loss: Any) -> tuple[float, Array, Array]:
        grads = self.graph.gradient(loss, double=len(Z) > 0)
        g = self.graph.flat(grads[: len(self.graph.params)], self._buffer[0])
        dG = self._buffer[1 : 1 + len(Z)]
        if len(Z):
            self.graph.push(grads, Z, dict(dhyper), dG)
        if self._clip is not None:
            clipped(g, dG, self._clip)
        return float(loss.detach()), g, dG

    def _outer_gradients(self, theta: Array, hyper: Any, val_loss: Any) -> tuple[float, Array, dict[str, Array]]:
        versions = [b._version for b in self._buffers().values()]
        loss = _scalar(f"{_CALL}: val_loss", val_loss())
        if versions != [b._version for b in self._buffers().values()]:
            raise AdapterError(f"{_CALL}: val_loss changed the model's buffers. Call model.eval() in it, train() after.")
        grads = self.graph.gradient(loss, double=False)
        n = len(self.graph.params)
        dE = self.graph.flat(grads[:n], np.empty_like(theta))
        pairs = zip(self.hyper, grads[n:], strict=True)
        direct = {name: g.detach().numpy().astype(np.float64) for name, g in pairs if g is not None}
        return float(loss.detach()), dE, direct


def _scalar(call: str, loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"{tuple(loss.shape)} without a graph" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise AdapterError(f"{call}: needs a scalar loss tensor with its graph, got {what}. Do not call backward or item.")
    return loss.reshape(())


def _check(opt: Any, val_loss: Any, mode: Any, clip_norm: Any) -> None:
    """Refuse what cannot be wrapped, before anything is moved."""
    if not callable(val_loss):
        raise AdapterError(f"{_CALL}: val_loss must be a function without arguments that returns the outer loss.")
    if mode not in (None, "online"):
        raise HyperparameterError(f"{_CALL}: only mode 'online' works in a loop of one's own, got {mode!r}.")
    if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise HyperparameterError(f"{_CALL}: clip_norm must be positive, got {clip_norm!r}.")
    for group in opt.param_groups:
        params = [p for p in group["params"] if p.requires_grad]
        if not params:
            raise AdapterError(f"{_CALL}: a param group has no parameter that requires a gradient. Leave the group out.")
        for p in params:
            first = opt.param_groups[0]["params"][0].dtype
            if p.device.type != "cpu" or p.dtype not in _DTYPES or p.dtype != first or p.layout != torch.strided:
                raise AdapterError(f"{_CALL}: parameters must be dense, on the CPU, of one dtype, float32 or float64.")
            state = opt.state.get(p, {})
            if float(state.get("step", 0)) != 0 or "momentum_buffer" in state:
                raise AdapterError(f"{_CALL}: the optimizer has taken steps already. Wrap it fresh.")


class HyperOptimizer:
    """Wraps one of torch's optimizers and tunes its hyperparameters while the model trains.

    Args:
      opt: SGD, Adam, AdamW, RMSprop or Adagrad, fresh, any number of param groups, parameters on the CPU.
      tune: names ("lr", "momentum", "weight_decay", "betas", ...), started from `opt`, or a `Space`; names in it that the
        optimizer does not own are hyperparameters of the loss: use `hopt.hyper[name]` in it.
      val_loss: `() -> tensor`, the outer loss with its graph; called only where a hypergradient is due.
      model: the module, so that a rollback restores its buffers (BatchNorm statistics) too.
      clip_norm: clip the gradient's norm as `clip_grad_norm_` does, derivative included.
      strategy, steps, window, outer, guard, settings: as for `koopman_hpo.Tuner`.

    Attributes:
      tuner: the `Tuner`.  hyper: {name: tensor} the loss hyperparameters, natural values.  path: how tangents are made.

    Raises:
      AdapterError: an optimizer, option or parameter that is not supported.  HyperparameterError: a wrong `tune`.
    """

    def __init__(
        self,
        opt: Any,
        *,
        tune: Any,
        val_loss: Callable[[], torch.Tensor],
        steps: int,
        model: torch.nn.Module | None = None,
        clip_norm: float | None = None,
        strategy: Any = None,
        window: int = 25,
        guard: Guard | None = Guard(),  # noqa: B008 - frozen
        **settings: Any,
    ):
        plan = options.plan(opt)
        _check(opt, val_loss, settings.get("mode"), clip_norm)
        space = options.space(tune, opt.param_groups, plan.rule)
        self.opt, self._val_loss = opt, val_loss
        self._inner = _TorchInner(opt, space, plan, model, clip_norm)
        settings["mode"] = "online"
        self.tuner = Tuner(self._inner, strategy, steps=steps, window=window, guard=guard, **settings)
        self._inner.sync(self.tuner.phi)

    @property
    def hyper(self) -> dict[str, torch.Tensor]:
        return self._inner.hyper

    @property
    def path(self) -> str:
        return self._inner.graph.path

    def step(self, loss: torch.Tensor) -> float:
        """One training step on the graph of `loss`; after `steps` of them, plain training with what was found.

        Returns the loss.  Raises AdapterError: not a scalar with a graph, a model changed after wrapping, a layer that
        cannot be differentiated twice; nothing has moved then.
        """
        loss = _scalar(f"{_CALL}.step", loss)
        self._inner.check()
        if self.tuner.done:
            value = self._inner.step(self.tuner.phi, loss, tangents=False)
        else:
            value = self.tuner.step(loss, self._val_loss)
        self._inner.sync(self.tuner.phi)
        return value

    def hypergradient(self) -> Hypergradient:
        """The derivative of `val_loss` with respect to the hyperparameters, now."""
        return self._inner.hypergradient(self._val_loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, model and torch's random generator too: arrays, and "meta"."""
        return self.tuner.snapshot() | {"torch_rng": torch.get_rng_state().numpy().copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, bit for bit.  Raises CheckpointError, ShapeError: of other settings or model."""
        self.tuner.restore({k: v for k, v in state.items() if k != "torch_rng"})
        torch.set_rng_state(torch.from_numpy(np.array(state["torch_rng"])))
        self._inner.sync(self.tuner.phi)
