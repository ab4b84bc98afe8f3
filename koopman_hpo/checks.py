"""What is refused at the door of an inner run, before any state changes."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import errors, optimizers
from .errors import AdapterError, HyperparameterError, ShapeError, choice, nearest, reals, short, whole
from .hyperparameters import Hyperparameter
from .optimizers import Domain, Rule
from .problem import Array, Problem
from .space import Space
from .transforms import IDENTITY

HALVES = ("bfloat16", "float16")
_KNOWN = frozenset(
    name
    for rule in (
        optimizers.sgd(False),
        optimizers.adam(False),
        optimizers.rmsprop(False),
        optimizers.adagrad(0.0),
        optimizers.lion(),
    )
    for name in rule.defaults
)


def problem(call: str, model: Problem, space: Space) -> None:
    if not isinstance(model, Problem):
        raise AdapterError(
            f"{call}: the first argument must be a Problem, got {type(model).__name__}. Make one with an adapter, for "
            f"instance koopman_hpo_adapters.numpy.problem(params, grad=..., outer=...)."
        )
    if not isinstance(space, Space):
        raise HyperparameterError(f"{call}: the second argument must be a Space, got {type(space).__name__}.")


def groups(call: str, model: Problem, lengths: Iterable[int] | None) -> tuple[int, ...]:
    if lengths is None:
        return model.segments or (model.params.size,)
    try:
        out = tuple(operator.index(n) for n in lengths)
    except TypeError:
        raise ShapeError(f"{call}: groups must be whole lengths of segments, got {short(lengths)}.") from None
    if sum(out) != model.params.size or min(out, default=0) < 1:
        raise ShapeError(
            f"{call}: groups must be positive lengths that sum to p = {model.params.size}, got {out} with sum {sum(out)}."
        )
    return out


def names(call: str, model: Problem, space: Space, rule: Rule) -> tuple[str, ...]:
    """The names of the space that belong to the loss, or an error about one that belongs to nobody."""
    own = set(rule.defaults)
    clash = own & (model.hyper or frozenset())
    if clash:
        raise HyperparameterError(
            f"{call}: {sorted(clash)} name hyperparameters of the optimizer and of the loss alike. Rename the loss's."
        )
    loss = tuple(n for n in space.names if n not in own)
    for name in loss:
        if name in model.domains:
            low, high = model.domains[name]
            _within(call, name, space[name], Domain(low, high, closed_high=True))
        if model.hyper is not None:
            if name not in model.hyper:
                known = sorted(own | model.hyper)
                raise HyperparameterError(
                    f"{call}: unknown hyperparameter {name!r}; {rule.name} and this model have {known}."
                    + nearest(name, known)
                )
        elif name in _KNOWN:
            raise HyperparameterError(
                f"{call}: {rule.name} has no {name!r}; it has {sorted(own)}. If the loss has one, say so: "
                f"problem(..., hyper={{{name!r}}})."
            )
        elif difflib.get_close_matches(name, own, n=1, cutoff=0.8):
            raise HyperparameterError(
                f"{call}: unknown hyperparameter {name!r}." + nearest(name, own) + " If it belongs to the loss, say so: "
                f"problem(..., hyper={{{name!r}}})."
            )
    return loss


def fixed(
    call: str, rule: Rule, space: Space, given: Mapping[str, Any], n: int, dtype: Any = np.float64
) -> dict[str, Array]:
    """`{name: (n,)}` of what is not tuned, from the caller's values and the defaults; dtype: of the run."""
    out = {}
    for name, default in rule.defaults.items():
        value = given.get(name)
        if name in space:
            if value is not None:
                raise HyperparameterError(
                    f"{call}: {name} is tuned by the space and fixed to {value!r} by keyword. Leave one of them out."
                )
            continue
        value = default if value is None else value
        if value is None:
            raise HyperparameterError(f"{call}: {name} is neither in the space nor given. Pass {name}=... or tune it.")
        array = reals(call, name, value, HyperparameterError, "a number or one a group")
        if array.shape not in ((), (n,)):
            raise ShapeError(f"{call}: {name} must be a number or one for each of {n} groups, got shape {array.shape}.")
        domain = rule.domains[name].of(dtype)
        if not domain.holds(array):
            raise HyperparameterError(f"{call}: {name} needs {domain}, got {array.tolist()}.")
        out[name] = np.broadcast_to(array, (n,))
    if rule.name == "sgd" and rule.flag:
        _nesterov(call, space, out)
    return out


def _nesterov(call: str, space: Space, out: Mapping[str, Array]) -> None:
    damped = "dampening" in space or bool(np.any(out["dampening"] != 0))
    still = "momentum" in out and bool(np.any(out["momentum"] == 0))
    if damped or still:
        raise HyperparameterError(f"{call}: nesterov=True requires momentum > 0 and no dampening.")


def domains(call: str, rule: Rule, space: Space, n: int, dtype: Any = np.float64) -> None:
    """Tuned values of the optimizer: their start, their bounds, and one value a group; dtype: of the run."""
    for name in space.names:
        if name not in rule.defaults:
            continue
        h = space[name]
        if h.groups not in ((), (n,)):
            raise ShapeError(
                f"{call}: {name} must be one value or one for each of {n} groups, got {h.groups[0]}. Pass groups=..., the "
                f"lengths of the segments of the parameter vector."
            )
        _within(call, name, h, rule.domains[name].of(dtype))


def _within(call: str, name: str, h: Hyperparameter, domain: Domain) -> None:
    """A tuned value's start and bounds, within its domain."""
    if not domain.holds(h.value):
        raise HyperparameterError(f"{call}: {name} needs {domain}, got a start of {h.value.tolist()}.")
    low, high = h.bounds
    edge = h.transform is IDENTITY and math.isfinite(domain.high) and not domain.closed_high
    if low < domain.low or (high >= domain.high if edge else high > domain.high):
        raise HyperparameterError(
            f"{call}: {name} needs {domain}, but its bounds are ({low:g}, {high:g}). Give bounds within, or use a "
            f"transform that cannot leave the domain: log above 0, logit between 0 and 1."
        )


def count(call: str, name: str, n: int | None) -> int | None:
    return None if n is None else whole(call, name, n)


def directions(call: str, n: int | None, q: int) -> int | None:
    """How many random directions stand for all q; None for none."""
    s = count(call, "directions", n)
    if s is not None and s > q:
        raise HyperparameterError(f"{call}: directions must be at most q = {q}, got {s}.")
    return s


def seed(call: str, value: Any) -> int:
    return whole(call, "seed", value, 0)


def options(call: str, rule: Rule, given: Mapping[str, Any]) -> None:
    """Keywords that no factory takes, with the nearest that this one does."""
    known = ("groups", "directions", "chunk", "seed", "device", "tangents")
    for name in given:
        if name not in known:
            names = sorted({*rule.defaults, *known})
            raise HyperparameterError(f"{call}: unknown keyword {name!r}; it takes {names}." + nearest(name, names))


def kept(call: str, tangents: Any, device: str, dtype: Any) -> str | None:
    """The type that tangents are kept in; None: that of the parameters."""
    if tangents is None:
        return None
    tangents = choice(call, "tangents", tangents, HALVES)
    if device == "cpu" or dtype != np.float32:
        raise HyperparameterError(
            f"{call}: tangents={tangents!r} needs float32 parameters on device 'cuda', got {dtype} on {device!r}: half of "
            f"the memory is half of the time on a card alone, and the CPU has no kernels for it. Leave tangents out."
        )
    return tangents


def initial_accumulator(value: float) -> None:
    errors.number("inner.adagrad", "initial_accumulator", value, "a finite number >= 0", 0.0, math.inf, open_high=True)


def rows(call: str, V: Any, theta: Array) -> Array:
    V = np.ascontiguousarray(reals(call, "V", V), theta.dtype)
    if V.ndim != 2 or V.shape[1] != theta.size:
        raise ShapeError(f"{call}: V must have shape (n, p) = (n, {theta.size}), got {V.shape}.")
    return V


def locked(a: NDArray) -> NDArray:
    """A read-only view: a model can look at the engine's buffers, not change them."""
    view = a.view()
    view.flags.writeable = False
    return view


def number(call: str, name: str, x: Any) -> float:
    if isinstance(x, float):
        return x
    array = reals(call, name, x, AdapterError, "a number")
    if array.ndim:
        raise AdapterError(
            f"{call}: {name} must be a number, got {type(x).__name__} of shape {array.shape}. Reduce it with a mean."
        )
    return float(array)


def array(call: str, name: str, a: Any, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    if type(a) is np.ndarray and a.shape == shape and a.dtype == dtype and a.flags.c_contiguous:
        return a
    given = reals(call, name, a, AdapterError, f"an array of real numbers of shape {shape}")
    if given.shape != shape:
        raise AdapterError(f"{call}: {name} must have shape {shape}, got {given.shape}.")
    return np.ascontiguousarray(given, dtype) if shape else np.asarray(given, dtype)
