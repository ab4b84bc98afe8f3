"""What a PyTorch optimizer holds, in the core's words: its rule, names, groups, and what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from koopman_hpo import HyperparameterError, Space, identity, log, logit, optimizers
from koopman_hpo.errors import AdapterError, nearest
from koopman_hpo.optimizers import Rule

_TRANSFORMS = {"lr": log, "weight_decay": log, "eps": log, "momentum": logit, "beta1": logit, "beta2": logit}
_TRANSFORMS |= {"alpha": logit, "dampening": logit, "lr_decay": log}
_REFUSED = ("maximize", "amsgrad", "capturable", "differentiable", "fused", "foreach")
_CALL = "HyperOptimizer"


class Plan(NamedTuple):
    """How an optimizer maps to a rule of the core."""

    rule: Rule
    slots: tuple[str, ...]  # torch's names of the rule's slots, in order
    counts: bool  # whether torch keeps a step count for each parameter


def plan(opt: Any) -> Plan:
    """The rule of an optimizer.  Raises AdapterError for one, or an option, that is not supported."""
    groups, kind = opt.param_groups, type(opt)
    for name in _REFUSED:
        if any(group.get(name) for group in groups):
            raise AdapterError(f"{_CALL}: {name}=True is not supported. Leave it out: the fused CPU kernels do the update.")
    if kind is torch.optim.SGD:
        return Plan(optimizers.sgd(_same(groups, "nesterov")), ("momentum_buffer",), False)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = _same(groups, "decoupled_weight_decay")
        return Plan(optimizers.adam(decoupled), ("exp_avg", "exp_avg_sq"), True)
    if kind is torch.optim.RMSprop:
        return Plan(optimizers.rmsprop(_same(groups, "centered")), ("square_avg", "grad_avg", "momentum_buffer"), True)
    if kind is torch.optim.Adagrad:
        return Plan(optimizers.adagrad(float(_same(groups, "initial_accumulator_value"))), ("sum",), True)
    raise AdapterError(f"{_CALL}: {kind.__name__} is not supported. Use torch's SGD, Adam, AdamW, RMSprop or Adagrad.")


def _same(groups: list[dict[str, Any]], name: str) -> Any:
    values = {group[name] for group in groups}
    if len(values) > 1:
        raise AdapterError(f"{_CALL}: {name} must be the same in all param groups, got {values}.")
    return values.pop()


def read(group: dict[str, Any], name: str) -> float:
    """A hyperparameter of a param group by the core's name."""
    if name in ("beta1", "beta2"):
        return float(group["betas"][int(name[-1]) - 1])
    return float(group[name])


def write(group: dict[str, Any], name: str, value: float) -> None:
    """Set a hyperparameter of a param group by the core's name."""
    if name in ("beta1", "beta2"):
        betas = list(group["betas"])
        betas[int(name[-1]) - 1] = value
        group["betas"] = tuple(betas)
    else:
        group[name] = value


def space(tune: Any, groups: list[dict[str, Any]], rule: Rule) -> Space:
    """The space of `tune`: itself, or its names with torch's present values and the default transforms."""
    if isinstance(tune, Space):
        return tune
    names: list[str] = []
    for name in (tune,) if isinstance(tune, str) else tuple(tune):
        names += ["beta1", "beta2"] if name == "betas" else [name]
    entries: dict[str, Any] = {}
    for name in names:
        if name not in rule.defaults:
            known = sorted(rule.defaults)
            raise HyperparameterError(
                f"{_CALL}: tune names {name!r}, {rule.name} has {known}. A hyperparameter of the loss needs a Space, "
                f"for instance Space(lr=log(1e-2), {name}=log(1e-3))." + nearest(str(name), known)
            )
        values = np.array([read(group, name) for group in groups])
        make = _TRANSFORMS.get(name, identity)
        if (values <= 0).any():
            raise HyperparameterError(
                f"{_CALL}: {name} starts at {values.tolist()}, where {make.__name__} has no coordinate. Start the "
                f"optimizer from a small positive value, or give Space({name}=identity(0.0, bounds=(0, 1)))."
            )
        entries[name] = make(float(values[0]) if (values == values[0]).all() else values)
    return Space(**entries)
