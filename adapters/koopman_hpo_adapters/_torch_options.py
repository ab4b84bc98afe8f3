"""What a PyTorch optimizer holds, in the core's words: its rule, names, groups, and what is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from koopman_hpo import Hyperparameter, HyperparameterError, Space, identity, log, logit, optimizers
from koopman_hpo.errors import AdapterError, nearest, short
from koopman_hpo.optimizers import Rule

_TRANSFORMS = {"lr": log, "weight_decay": log, "eps": log, "momentum": logit, "beta1": logit, "beta2": logit}
_TRANSFORMS |= {"alpha": logit, "dampening": logit, "lr_decay": log}
_MAKE: dict[str, Any] = {"log": log, "logit": logit, "identity": identity}
_REFUSED = ("maximize", "amsgrad", "capturable", "differentiable", "fused", "foreach")
_CALL = "HyperOptimizer"


class Plan(NamedTuple):
    """How an optimizer maps to a rule of the core."""

    rule: Rule
    slots: tuple[str, ...]  # torch's names of the rule's slots, in order
    counts: bool  # whether torch keeps a step count for each parameter
    early: bool = False  # whether torch makes the slots before the first step


def plan(opt: Any) -> Plan:
    """The rule of an optimizer.  Raises AdapterError for one, or an option, that is not supported."""
    groups, kind = opt.param_groups, type(opt)
    for name in _REFUSED:
        if any(group.get(name) for group in groups):
            raise AdapterError(f"{_CALL}: {name}=True is not supported. Leave it out: fused kernels do the update.")
    if kind is torch.optim.SGD:
        return Plan(optimizers.sgd(_same(groups, "nesterov")), ("momentum_buffer",), False)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = _same(groups, "decoupled_weight_decay")
        return Plan(optimizers.adam(decoupled), ("exp_avg", "exp_avg_sq"), True)
    if kind is torch.optim.RMSprop:
        return Plan(optimizers.rmsprop(_same(groups, "centered")), ("square_avg", "grad_avg", "momentum_buffer"), True)
    if kind is torch.optim.Adagrad:
        return Plan(optimizers.adagrad(float(_same(groups, "initial_accumulator_value"))), ("sum",), True, early=True)
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


def space(tune: Any, groups: list[dict[str, Any]], rule: Rule) -> tuple[Space, dict[str, torch.Tensor]]:
    """The space of `tune`, and {name: tensor} of the loss hyperparameters whose tensors are the user's.

    `tune` is a `Space`; names, which start from torch's present values under the default transforms; a dict of names to
    what says how: a transform (`log`, `logit`, `identity`) or None (the default), a `Hyperparameter`, the indices of all
    param groups (a value for each), a tensor of the loss, or (tensor, transform); or one such dict a param group.
    """
    if isinstance(tune, Space):
        _known(tune, {}, rule)
        return tune, {}
    if isinstance(tune, str):
        tune = (tune,)
    if isinstance(tune, Sequence) and tune and all(isinstance(t, Mapping) for t in tune):
        return Space(**_by_group(tune, groups, rule)), {}
    if not isinstance(tune, Iterable) or not all(isinstance(name, str) for name in tune):
        raise HyperparameterError(f"{_CALL}: tune must be a Space, names, or a dict of names, got {short(tune)}.")
    given = dict(tune) if isinstance(tune, Mapping) else dict.fromkeys(tune)
    if "betas" in given:
        given |= dict.fromkeys(("beta1", "beta2"), given.pop("betas"))
    if not given:
        raise HyperparameterError(f"{_CALL}: tune is empty. Name what to tune, for instance tune=('lr',).")
    owned: dict[str, torch.Tensor] = {}
    entries = {name: _entry(name, how, groups, rule, owned) for name, how in given.items()}
    _known(entries, owned, rule)
    return Space(**entries), owned


def _entry(name: str, how: Any, groups: list[dict[str, Any]], rule: Rule, owned: dict[str, torch.Tensor]) -> Hyperparameter:
    if isinstance(how, Hyperparameter):
        return how
    tensor, make = how if isinstance(how, tuple) and len(how) == 2 and isinstance(how[0], torch.Tensor) else (how, None)
    if isinstance(tensor, torch.Tensor):
        if make is not None and not callable(make):
            raise HyperparameterError(
                f"{_CALL}: tune[{name!r}] must be a tensor, or (tensor, transform), got {short(make)} for a transform. "
                f"Give log, logit or identity themselves: (tensor, log)."
            )
        owned[name] = _owned(name, tensor, groups, rule)
        value = tensor.detach().cpu().numpy().astype(np.float64)
        return _start(name, value, make or (log if (value > 0).all() else identity))
    if name not in rule.defaults:
        known = sorted(rule.defaults)
        raise HyperparameterError(
            f"{_CALL}: tune names {name!r}, {rule.name} has {known}. A hyperparameter of the loss is given with its start "
            f"or its tensor: tune={{'lr': log, {name!r}: log(1e-3)}}." + nearest(name, known)
        )
    values = np.array([read(group, name) for group in groups])
    make = how if callable(how) else _TRANSFORMS.get(name, identity)
    if how is None or callable(how):
        shared = bool((values == values[0]).all())
        if make is log and not shared and not values.all() and (values >= 0).all():  # zeros have no logarithm, and stay
            return log(values.max(), shares=values / values.max())
        return _start(name, values[0] if shared else values, make)
    if isinstance(how, Sequence) and list(how) == list(range(len(groups))):
        return _start(name, values, make)
    raise HyperparameterError(
        f"{_CALL}: tune[{name!r}] must be log, logit, identity, what they return, a tensor, or all of the param groups' "
        f"indices {list(range(len(groups)))}, got {short(how)}. Tune all or none."
    )


def _start(name: str, value: Any, make: Any) -> Hyperparameter:
    """make(value); a start on the edge of the transform is refused with what to do in torch."""
    if make in (log, logit) and (np.any(np.asarray(value) <= 0) or (make is logit and np.any(np.asarray(value) >= 1))):
        raise HyperparameterError(
            f"{_CALL}: {name} starts at {np.asarray(value).tolist()}, where {make.__name__} has no coordinate. Start the "
            f"optimizer from a small positive value, or give tune={{{name!r}: identity(0.0, bounds=(0, 1))}}."
        )
    return make(value)


def _owned(name: str, tensor: torch.Tensor, groups: list[dict[str, Any]], rule: Rule) -> torch.Tensor:
    """A tensor of the user's loss, made ready to be differentiated."""
    if name in rule.defaults:
        raise HyperparameterError(f"{_CALL}: {name} belongs to {rule.name}, got a tensor for it. Rename the loss's.")
    place = groups[0]["params"][0].device
    if not tensor.is_leaf or not tensor.is_floating_point() or tensor.dim() > 1 or tensor.device != place:
        raise HyperparameterError(
            f"{_CALL}: {name} must be a leaf tensor of floats on {place}, as the parameters, of no or one dimension, got "
            f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}. Use tensor.detach().reshape(-1), and .to() it."
        )
    if any(tensor is p for group in groups for p in group["params"]):
        raise HyperparameterError(f"{_CALL}: {name} is trained by the optimizer. Leave it out of its params.")
    return tensor.requires_grad_()


def _by_group(tune: Sequence[Any], groups: list[dict[str, Any]], rule: Rule) -> dict[str, Hyperparameter]:
    """One dict a param group, {name: transform, None or Hyperparameter}, as values by group."""
    if len(tune) != len(groups) or any(set(t) != set(tune[0]) for t in tune):
        raise HyperparameterError(
            f"{_CALL}: tune must have one dict for each of {len(groups)} param groups, all with the same names, got "
            f"{[sorted(t) for t in tune]}."
        )
    entries = {}
    for name in tune[0]:
        each = [_entry(name, t[name], [g], rule, {}) for t, g in zip(tune, groups, strict=True)]
        if len({(h.transform, h.knots, h.schedule, h.factors, h.groups) for h in each}) > 1 or each[0].groups:
            raise HyperparameterError(f"{_CALL}: {name} must be one value a group, of one transform and schedule in all.")
        value = np.stack([h.value for h in each], axis=-1)
        entries[name] = replace(each[0], value=value, bounds=_shared(name, each))
    return entries


def _shared(name: str, each: Sequence[Hyperparameter]) -> tuple[float, float]:
    """The bounds of all groups; the default ones, that a start has widened, admit all starts."""
    bounds = {h.bounds for h in each}
    make = _MAKE.get(each[0].transform.name)
    low, high = each[0].bounds if make is None else make(0.5).bounds  # a box has those of its transform
    default = {(min(low, h.value.min()), max(high, h.value.max())) for h in each}
    if len(bounds) > 1 and not bounds <= default:
        raise HyperparameterError(
            f"{_CALL}: {name} must have the same bounds in all param groups, got {[h.bounds for h in each]}. Give each "
            f"group the same: log(0.1, bounds=(1e-3, 1.0))."
        )
    return min(b[0] for b in bounds), max(b[1] for b in bounds)


def _known(entries: Mapping[str, Any], owned: Mapping[str, Any], rule: Rule) -> None:
    """A name that is nearly one of the optimizer's, or another optimizer's, is a slip and no hyperparameter of the loss."""
    for name in (n for n in entries if n not in rule.defaults and n not in owned):
        if name in _TRANSFORMS or difflib.get_close_matches(name, rule.defaults, n=1, cutoff=0.8):
            raise HyperparameterError(
                f"{_CALL}: tune names {name!r}, {rule.name} has {sorted(rule.defaults)}. If it belongs to the loss, give "
                f"its tensor: tune={{{name!r}: tensor}}." + nearest(name, rule.defaults)
            )
