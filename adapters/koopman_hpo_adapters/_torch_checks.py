"""What is refused before anything is wrapped or a step is taken."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from koopman_hpo import HyperparameterError
from koopman_hpo.errors import AdapterError, number, short

_PLACES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float64)


def optimizer(call: str, opt: Any) -> None:
    """Before anything is read from it."""
    if not isinstance(opt, torch.optim.Optimizer):
        raise AdapterError(
            f"{call}: the first argument must be a torch.optim.Optimizer, got {type(opt).__name__}. Make one of the "
            f"model's parameters: {call}(torch.optim.SGD(model.parameters(), lr=0.1), ...)."
        )


def generators(call: str, value: Any) -> tuple[torch.Generator, ...]:
    """Random generators as a tuple."""
    given = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(g, torch.Generator) for g in given):
        raise AdapterError(
            f"{call}: generators must be a list of torch.Generators, got {short(value)}. Pass generators=[generator], of "
            f"all that the loss draws from beside torch's own."
        )
    return given


def wrapping(call: str, opt: Any, losses: dict[str, Any], module: Any, clip_norm: Any) -> None:
    """Refuse what cannot be wrapped; nothing has moved."""
    for name, loss in losses.items():
        if not callable(loss):
            raise AdapterError(f"{call}: {name} must be a function that returns a loss with its graph, got {short(loss)}.")
    if module is not None and not isinstance(module, torch.nn.Module):
        raise AdapterError(f"{call}: model must be a torch.nn.Module, got {type(module).__name__}.")
    if clip_norm is not None:
        number(call, "clip_norm", clip_norm, "above 0", 0, open_low=True, open_high=True)
    first = opt.param_groups[0]["params"][0]
    for group in opt.param_groups:
        params = [p for p in group["params"] if p.requires_grad]
        if not params:
            raise AdapterError(f"{call}: a param group has no parameter that requires a gradient. Leave the group out.")
        for p in params:
            _parameter(call, p, first, opt.state.get(p, {}))
    if module is not None:
        known = {id(p) for p in module.parameters()}
        if not any(id(p) in known for group in opt.param_groups for p in group["params"]):
            raise AdapterError(f"{call}: the optimizer trains no parameter of the model. Give the model that it trains.")


def _parameter(call: str, p: torch.Tensor, first: torch.Tensor, state: Any) -> None:
    alike = (p.device, p.dtype, p.layout) == (first.device, first.dtype, torch.strided)
    if p.device.type not in _PLACES or p.dtype not in _DTYPES or not alike:
        raise AdapterError(
            f"{call}: parameters must be dense, on the CPU or on one CUDA device, of one dtype, float32 or float64, got "
            f"{p.dtype} on {p.device} beside {first.dtype} on {first.device}. Convert the model, then make the optimizer."
        )
    if float(state.get("step", 0)) != 0 or state.get("momentum_buffer") is not None:
        raise AdapterError(f"{call}: the optimizer has taken steps already. Wrap it fresh.")


def mode(call: str, value: Any) -> None:
    if value not in (None, "online"):
        raise HyperparameterError(
            f"{call}: in a loop of one's own only mode 'online' works, got {value!r}: training cannot be begun again from "
            f"here. Use koopman_hpo_adapters.torch.inner(...) with koopman_hpo.Tuner(mode='restart')."
        )


_PRODUCTS, _SUMS = ("MulBackward0", "DivBackward0"), ("MeanBackward0", "MeanBackward1", "SumBackward0", "SumBackward1")


class Scales:
    """Finds the mark of a `GradScaler` on a loss: a product with its scale, perhaps averaged or divided after."""

    def __init__(self) -> None:
        self._asked = 0
        self._scalers: list[weakref.ref[torch.amp.GradScaler]] = []

    def asked(self, loss: Any) -> Any:
        """The loss of a step, from the function that makes it where there is one."""
        if isinstance(loss, torch.Tensor) or not callable(loss):
            return loss
        made = loss()
        if isinstance(made, torch.Tensor):
            self.refuse("HyperOptimizer.step", made)
        return made

    def refuse(self, call: str, loss: torch.Tensor) -> None:
        node = loss.grad_fn
        while node is not None and node.name() in _PRODUCTS + _SUMS:
            factor = _factor(node)
            if isinstance(factor, torch.Tensor) and factor.dim() == 0 and factor.dtype is torch.float32:
                self._look(call, factor)  # a Python number is float64 or int64
            node = next((n for n, _ in node.next_functions if n is not None), None)

    def _look(self, call: str, factor: torch.Tensor) -> None:
        self._asked += 1
        if self._asked & (self._asked - 1) == 0:  # a power of two: looking through all objects takes milliseconds
            kind = torch.amp.GradScaler
            self._scalers = [weakref.ref(o) for o in gc.get_objects() if issubclass(type(o), kind)]
        for scaler in (ref() for ref in self._scalers):
            if scaler is not None and scaler._scale is factor:
                raise AdapterError(
                    f"{call}: the loss was scaled by a GradScaler, which would have to unscale a gradient that is not "
                    f"there. Pass the loss itself; use autocast with bfloat16, which needs no scaling."
                )


def _factor(node: Any) -> Any:
    """What a product multiplies by, if it is kept; a graph that was used keeps nothing."""
    try:
        return getattr(node, "_saved_other", None)
    except RuntimeError:
        return None
