"""What a tuner refuses before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, HyperparameterError
from .guard import Guard
from .inner import require
from .outer import Outer
from .space import Space

if TYPE_CHECKING:
    from .tuner import Tuner


def strategy(value: Any) -> None:
    """Before anything is read from it."""
    if isinstance(value, type) or not all(hasattr(value, n) for n in ("mode", "snapshots", "cut", "estimate")):
        raise HyperparameterError(
            f"Tuner: strategy must be Local(), Global(), Glocal() or an object with mode, snapshots, cut and estimate, "
            f"got {value!r}."
        )


def check(tuner: Tuner) -> None:
    require("Tuner", tuner.inner, HyperparameterError)
    if hasattr(tuner.strategy, "suits"):
        tuner.strategy.suits(tuner.inner)
    if tuner.inner.space.q == 0:
        raise HyperparameterError("Tuner: the space is empty, so there is nothing to tune.")
    if tuner.mode not in ("online", "restart"):
        raise HyperparameterError(f"Tuner: mode must be 'online' or 'restart', got {tuner.mode!r}.")
    if tuner.strategy.mode == "restart" and tuner.mode == "online":
        raise HyperparameterError(f"Tuner: {type(tuner.strategy).__name__} needs mode='restart'.")
    if tuner.mode == "online" and tuner.window > tuner.steps:
        raise HyperparameterError(
            f"Tuner: the window ({tuner.window}) is longer than the run ({tuner.steps} steps). Shorten it; a quarter of "
            f"the run or less leaves room for updates."
        )
    longest = tuner.window if tuner.mode == "online" else tuner.steps
    if tuner.every is not None and tuner.every > longest:
        raise HyperparameterError(f"Tuner: every={tuner.every} records nothing in a window of {longest} steps.")


def parts(outer: Any, guard: Any, callbacks: Any, space: Space) -> tuple[Callable[[Tuner], None], ...]:
    """What a tuner is put together from; returns the callbacks, which may come from a generator."""
    if not isinstance(outer, Outer):
        raise HyperparameterError(f"Tuner: outer must be outer.adam(), outer.sgd() or outer.sign(), got {outer!r}.")
    if not (guard is None or isinstance(guard, Guard)):
        raise HyperparameterError(f"Tuner: guard must be Guard(...) or None, got {guard!r}.")
    calls = tuple(callbacks) if isinstance(callbacks, Iterable) else (None,)
    if not all(callable(c) for c in calls):
        raise HyperparameterError(f"Tuner: callbacks must be a list of functions of the tuner, got {callbacks!r}.")
    for name in guard.shrink_names if guard is not None and guard.shrink_names != Guard().shrink_names else ():
        space.where(name)
    return calls


def form(space: Space) -> list[list[Any]]:
    """All of a space but where it begins."""
    return [
        [name, h.transform.name, list(h.bounds), None if h.knots is None else list(map(int, h.knots)), h.schedule]
        + ([] if h.factors is None else [list(h.factors)])
        + ([] if h.shares is None else [{"shares": list(h.shares)}])
        for name, h in space.items()
    ]


def of(tuner: Tuner) -> dict[str, Any]:
    """What two tuners must share for one to go on where the other stopped."""
    names = ("mode", "steps", "window", "runs", "forget", "every")
    return {n: getattr(tuner, n) for n in names} | {
        "space": form(tuner.inner.space),
        "labels": list(tuner.inner.space.labels),
        "inner": str(getattr(tuner.inner, "settings", type(tuner.inner).__name__)),
        "strategy": _described(tuner.strategy),
        "guard": repr(tuner.guard),
        "outer": f"{tuner.outer.name}(lr={tuner.outer.lr}, {tuner.outer.settings})",
    }


def _described(thing: Any) -> str:
    """Its repr, or its type and attributes where the repr is an address."""
    if type(thing).__repr__ is not object.__repr__:
        return repr(thing)
    return f"{type(thing).__qualname__}({', '.join(f'{k}={v!r}' for k, v in sorted(vars(thing).items()))})"


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse to resume a run under other settings, naming the first that differs."""
    for name, mine in ours.items():
        if theirs.get(name) != mine:
            raise CheckpointError(
                f"checkpoint.load: {name} was {theirs.get(name)!r} when it was saved and is {mine!r} now. Make the tuner "
                f"with the settings of the run that you resume."
            )
