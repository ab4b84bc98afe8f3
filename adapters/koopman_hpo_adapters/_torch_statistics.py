"""BatchNorm's running statistics as part of the training state: their tangents, carried step by step.

In training mode `r' = (1 - rate) r + rate s(x)`, and s, mean and variance of the layer's input, depends on the parameters;
in evaluation mode the output depends on r.  Forward over reverse has the tangents of s on its way.  To double backward
both are made visible by inputs that are zero: `<s, u>` is added to the loss, whose gradient along u is s and along the
parameters, at u = 0, what it was; and an evaluating layer's output gets `(d output / d r) e`, which is zero, with e's
derivative that of r.  Where the gradient alone is asked for, that by r follows from that by the layer's output.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from koopman_hpo.errors import AdapterError
from koopman_hpo.problem import Array

from ._torch_rules_norm import BATCH_NORMS


class Seen(NamedTuple):
    """One call of one layer since the last step."""

    layer: int  # its number
    rate: float  # of the running average; NaN in evaluation
    zero: torch.Tensor | None  # (2, C) e, in evaluation, where second derivatives are to come
    x: torch.Tensor  # its input
    node: Any  # of the graph, that made its output, if it is known; of an outer loss its edge, at which it has a gradient
    version: int  # of x


class Statistics:
    """The tangents of the running mean and variance of a model's BatchNorm layers.

    Attributes:
      layers: the layers.  tangents: for each of its C channels, (s, 2, C) along s directions.
    """

    def __init__(self, model: torch.nn.Module | None, s: int):
        modules = [] if model is None else list(model.modules())
        if any(isinstance(m, _InstanceNorm) and m.track_running_stats for m in modules):
            raise AdapterError("HyperOptimizer: InstanceNorm with running statistics is not supported; leave them out.")
        self.layers: list[Any] = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if len({id(m.running_mean) for m in self.layers}) < len(self.layers):
            raise AdapterError("HyperOptimizer: two BatchNorm layers share their running statistics. Give each its own.")
        self.tangents = [m.running_mean.new_zeros((s, 2, m.num_features)) for m in self.layers]
        self.on, self._outer, self._still = True, False, False
        self._moved = [False] * len(self.layers)  # whether tangents may have left zero: not read on a card
        self._seen: list[Seen] = []
        self._checked: set[tuple[str, int]] = set()  # modes in which layers are known to do what BatchNorm does
        self._former: tuple[torch.Tensor, ...] = ()  # the running statistics before a call that is to be checked
        self._live, self._stray = False, False  # whether a step has made tangents; whether layers moved under no_grad since
        self._due: list[tuple[Seen, torch.Tensor]] = []
        for i, layer in enumerate(self.layers):
            hook = _Hook(self, i)
            layer.register_forward_pre_hook(hook, with_kwargs=True)
            layer.register_forward_hook(hook, with_kwargs=True)

    # -- what the layers do ------------------------------------------------------------------------------------------

    def before(self, i: int, layer: Any) -> None:
        """Raise where layer i is about to move its running statistics while derivatives are being made."""
        if not (layer.training and layer.track_running_stats):
            return
        if self._still:
            raise AdapterError(
                "HyperOptimizer.step: a BatchNorm layer runs again while tangents are made, under torch.utils.checkpoint, "
                "and would move its running statistics again. Leave it out of what is checkpointed."
            )
        if _foreign(layer) and ("training", i) not in self._checked:
            self._former = layer.running_mean.clone(), layer.running_var.clone()

    def observe(self, i: int, layer: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        """Note a call of layer i; returns an output that depends on the running statistics too, or None."""
        moves = layer.training and layer.track_running_stats
        if not (self.on and torch.is_grad_enabled()):
            self._stray |= self.on and moves and self._live
            return None
        own = type(out.grad_fn).__name__ in BATCH_NORMS and not _foreign(layer)
        if layer.training:
            if moves and (x.requires_grad or self._moved[i]):
                rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
                if _foreign(layer):
                    moments = lambda: self._moments(x.to(layer.running_mean.dtype))
                    self._check(i, layer, "training", lambda: torch.lerp(torch.stack(self._former), moments(), rate))
                self._seen.append(Seen(i, float(rate), None, x, out.grad_fn if own else None, x._version))
            return None
        if not self._moved[i]:
            return None
        if not own:
            self._check(i, layer, "evaluation", lambda: _normalised(layer, x), out)
        if self._outer and own:
            self._seen.append(Seen(i, np.nan, None, x, get_gradient_edge(out), x._version))
            return None
        zero = layer.running_mean.new_zeros((2, layer.num_features)).requires_grad_()
        self._seen.append(Seen(i, np.nan, zero, x, out.grad_fn, x._version))
        wide, scale, curve = _of_running(layer, x)
        half = wide(curve * zero[1]) * (x - wide(layer.running_mean))
        return out - (wide(scale) * (wide(zero[0]) + half)).to(out.dtype)

    @torch.no_grad()
    def _check(self, i: int, layer: Any, mode: str, wanted: Any, found: torch.Tensor | None = None) -> None:
        """Raise where a layer, of a class of its own or under another hook, is no BatchNorm: what it gives, or else its
        running statistics, is not what BatchNorm would make.  Looks once a layer and mode."""
        if (mode, i) in self._checked:
            return
        found = torch.stack((layer.running_mean, layer.running_var)) if found is None else found
        try:
            right = wanted()
            same = found.shape == right.shape and torch.allclose(found, right, rtol=1e-3, atol=1e-3)
        except (RuntimeError, ValueError):  # of shapes
            same = False
        if not same:
            raise AdapterError(
                f"HyperOptimizer: {type(layer).__name__} does something else in {mode} than BatchNorm, by its own class or "
                f"by a hook that was set before. Set hooks after wrapping, or do without running statistics."
            )
        self._checked.add((mode, i))

    # -- what the step asks ------------------------------------------------------------------------------------------

    def take(self) -> list[Seen]:
        """The calls since the last time.  Raises AdapterError: one that moved running statistics could not be seen."""
        seen, self._seen = self._seen, []
        if self._stray:
            self._stray = False
            raise AdapterError(
                "HyperOptimizer.step: a BatchNorm layer ran in training mode under no_grad, which moved its running "
                "statistics without their tangents. Call model.eval() there, or take a copy of the model."
            )
        return seen

    def refuse(self, seen: Sequence[Seen], grads: Sequence[torch.Tensor | None]) -> None:
        """Raise where an evaluating call that the loss depends on, as its gradient tells, follows one in training."""
        trained = {call.layer for call, _ in self._due}
        used = {id(c) for c, g in zip((c for c in seen if c.zero is not None), grads, strict=True) if g is not None}
        for call in seen:
            if call.zero is None:
                trained.add(call.layer)
            elif call.layer in trained and id(call) in used:
                raise AdapterError(
                    "HyperOptimizer.step: a BatchNorm layer evaluates in a step after it has trained in it, on statistics "
                    "whose tangents move only when the step is taken. Compute that part of the loss first."
                )

    def term(self, call: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """u (2, C) of a training call, and <s, u>."""
        moments = self._moments(call.x.to(self.tangents[call.layer].dtype))
        zero = torch.zeros_like(moments, requires_grad=True)
        return zero, (moments * zero).sum()

    @staticmethod
    def _moments(x: torch.Tensor) -> torch.Tensor:
        """(2, C) mean and variance of a layer's input."""
        over = [0, *range(2, x.dim())]
        return torch.stack((x.mean(over), x.var(over, correction=1)))

    @contextmanager
    def still(self) -> Iterator[None]:
        """Within, no layer may move its running statistics."""
        self._still = True
        try:
            yield
        finally:
            self._still = False

    @contextmanager
    def apart(self, on: bool) -> Iterator[None]:
        """Calls within are of their own, of an outer loss: those noted before are kept for the step."""
        kept, self._seen, self.on, self._outer = (self._seen, self.on, self._outer), [], on, True
        try:
            yield
        finally:
            self._seen, self.on, self._outer = kept

    def due(self, seen: Sequence[Seen], moved: Sequence[torch.Tensor | None]) -> None:
        """Hold d s (s, 2, C) of each training call, None for zero, until the step is taken."""
        held = (torch.zeros_like(self.tangents[c.layer]) if m is None else m for c, m in zip(seen, moved, strict=True))
        self._due += list(zip(seen, held, strict=True))

    def advance(self) -> None:
        """The running average of the tangents, call by call."""
        for call, moved in self._due:
            self.tangents[call.layer].lerp_(moved, call.rate)
            self._moved[call.layer] = True
        self._due, self._live = [], True

    def drop(self) -> None:
        """Forget the calls of a step that was not taken."""
        self._seen, self._due = [], []

    def forget(self, rho: float) -> None:
        self._moved = [m and rho > 0 for m in self._moved]
        self._live = self._live and rho > 0
        for t in self.tangents:
            t.mul_(rho) if rho else t.zero_()

    def pull(self, seen: Sequence[Seen], grads: Sequence[torch.Tensor | None]) -> Array:
        """(s,) share of the hypergradient that goes through the running statistics; gradients along `at`."""
        calls = [(call, self._slope(call, g)) for call, g in zip(seen, grads, strict=True) if g is not None]
        shares = [torch.tensordot(self.tangents[call.layer], g, 2).double() for call, g in calls]
        none = np.zeros(len(self.tangents[0]) if self.tangents else 1)
        return torch.stack(shares).sum(0).cpu().numpy() if shares else none  # one wait for a card

    @staticmethod
    def at(call: Seen) -> Any:
        """Where the gradient of an outer loss is asked for."""
        return call.node if call.zero is None else call.zero

    @torch.no_grad()
    def _slope(self, call: Seen, g: torch.Tensor) -> torch.Tensor:
        """(2, C) gradient along the running statistics, from that at the layer's output."""
        if call.zero is not None:
            return g.detach()
        layer, x = self.layers[call.layer], call.x
        if x._version != call.version:
            raise AdapterError(
                "HyperOptimizer: val_loss changed the input of a BatchNorm layer in place after the layer had used it. "
                "Replace the in-place operation."
            )
        wide, scale, curve = _of_running(layer, x)
        over, g = [0, *range(2, x.dim())], g.to(layer.running_mean.dtype)
        return torch.stack((g.sum(over), curve * (g * (x - wide(layer.running_mean))).sum(over))) * -scale

    def arrays(self) -> dict[str, torch.Tensor]:
        """The tangents by the names that they have in a snapshot."""
        return {f"statistics/{i}": t for i, t in enumerate(self.tangents)}

    def moved(self) -> dict[str, Array]:
        """What a mark, which is not read, says of them: whether they may have left zero."""
        return {"moved": np.array(self._moved)} if self.layers else {}

    def restore(self, tensors: Mapping[str, torch.Tensor], moved: Array | None) -> None:
        self.drop()
        for name, t in self.arrays().items():
            t.copy_(tensors[name])
        self._moved = [bool(t.any()) for t in self.tangents] if moved is None else moved.tolist()
        self._live = True


def _foreign(layer: Any) -> bool:
    """Whether its class has a forward of its own."""
    return type(layer).forward not in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward)


def _normalised(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What BatchNorm gives in evaluation."""
    moments = layer.running_mean, layer.running_var
    return batch_norm(x, *moments, layer.weight, layer.bias, training=False, eps=layer.eps)


def _of_running(layer: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """In evaluation `y = scale (x - mean) + b`: what makes (C,) broadcast, scale (C,), and `-(d scale / d var) / scale`."""
    inverse = torch.rsqrt(layer.running_var + layer.eps)
    scale = inverse if layer.weight is None else inverse * layer.weight
    return lambda v: v.view(1, -1, *(1,) * (x.dim() - 2)), scale, 0.5 * inverse**2


class _Hook:
    """Tells the statistics of a call, before and after it; a copy of the model, or one from a file, is nobody's."""

    def __init__(self, statistics: Statistics | None = None, i: int = 0):
        self._statistics, self._i = (lambda: None) if statistics is None else weakref.ref(statistics), i

    def __call__(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any], *out: torch.Tensor) -> torch.Tensor | None:
        statistics = self._statistics()
        if statistics is not None and out:
            return statistics.observe(self._i, layer, args[0] if args else named["input"], out[0])
        if statistics is not None:
            statistics.before(self._i, layer)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _random(module: Any) -> bool:
    """Whether it draws random numbers in training mode, and none in evaluation."""
    if isinstance(module, torch.nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, torch.nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, torch.nn.RReLU) or (isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0)


@contextmanager
def strict(layers: Sequence[Any]) -> Iterator[list[Any]]:
    """Within, a layer that acts differently in training must not be in training mode, nor unknown running statistics.

    Yields the layers that ran in evaluation mode and draw random numbers in training.
    """
    quiet: list[Any] = []

    def look(module: Any, args: Any) -> None:
        running = isinstance(module, _BatchNorm) and module.running_mean is not None
        if (running or _random(module)) and module.training:
            raise AdapterError(
                f"HyperOptimizer: val_loss runs {type(module).__name__} in training mode. Call model.eval() in it, "
                f"and model.train() after."
            )
        if running and all(module is not layer for layer in layers):
            raise AdapterError(
                "HyperOptimizer: val_loss depends on running statistics of a BatchNorm layer. Pass model=... so that "
                "they are carried along."
            )
        if _random(module):
            quiet.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield quiet
    finally:
        handle.remove()
