"""Where batches come from: a function of the step, a list, or an iterable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .errors import ShapeError


def several(batches: Any) -> bool:
    """Whether these are batches to go through, and not one batch that was passed by mistake."""
    return isinstance(batches, Iterable) and not isinstance(batches, tuple | dict | str | bytes | np.ndarray)


def expect(call: str, batches: Any) -> None:
    """Refuse what is no list or iterator of batches."""
    if not several(batches):
        raise ShapeError(f"{call}: batches must be a list or an iterator of batches, got {type(batches).__name__}.")


def source(call: str, name: str, batches: Any) -> Callable[[int], Any]:
    """Batches by number, from a callable, a list or an iterable."""
    if callable(batches) and not isinstance(batches, Iterable):
        return batches
    if isinstance(batches, list):
        if not batches:
            raise ShapeError(f"{call}: {name} is empty; give at least one batch.")
        return lambda n: batches[n % len(batches)]
    if not several(batches):
        raise ShapeError(
            f"{call}: {name} must be a list of batches, an iterable of batches, or a function of the step, got "
            f"{type(batches).__name__}. For one batch used at every step write [batch]."
        )
    stream = _endless(call, name, batches)
    return lambda n: next(stream)


def _endless(call: str, name: str, batches: Iterable[Any]) -> Iterator[Any]:
    for epoch in itertools.count():
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ShapeError(
                f"{call}: {name} "
                + ("is empty; give at least one batch." if epoch == 0 else "ran out; pass a list, a loader or a function.")
            )
