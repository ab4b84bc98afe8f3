"""Numbers on a card that nobody has waited for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


class Unread:
    """A number on a card, or a sum of such, in the order of adding: what a step returns there as its loss.

    `float(x)` waits for it; so do printing and comparing with `math.isfinite`, which go through it.
    """

    def __init__(self, last: Callable[[], float], rest: Unread | float = 0.0):
        self._last, self._rest = last, rest

    def __float__(self) -> float:
        terms, node = [], self
        while isinstance(node._rest, Unread):
            terms.append(node._last)
            node = node._rest
        total = node._rest + node._last()
        for term in reversed(terms):
            total += term()
        return total

    def __add__(self, other: Unread | float) -> Unread:
        return Unread(other.__float__, self)

    def __radd__(self, other: float) -> Unread:
        return Unread(self.__float__, float(other))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(float(self), dtype)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __repr__(self) -> str:
        return repr(float(self))


class Slab:
    """Room on a card for so many numbers, each written once, and copied to the host as many at a time as there are.

    Args:
      room: (n,) on the card.  write: (into, number) copies there.  get: brings an array to the host.
    """

    def __init__(self, room: Any, write: Callable[[Any, Any], None], get: Callable[[Any], np.ndarray]):
        self._room, self._write, self._get = room, write, get
        self._used, self._known = 0, np.empty(0)

    @property
    def full(self) -> bool:
        return self._used == self._room.size

    def keep(self, number: Any) -> Unread:
        """A copy of a number (), or (1,), on the card: its owner may write over it."""
        i, self._used = self._used, self._used + 1
        self._write(self._room[i : i + 1], number)
        return Unread(partial(self._read, i))

    def _read(self, i: int) -> float:
        if i >= len(self._known):
            self._known = self._get(self._room)[: self._used]
        return float(self._known[i])
