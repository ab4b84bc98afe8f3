"""What the tangents follow: the coordinates of phi, or a few random directions drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from . import checks, snapshots
from .problem import Array


class Directions:
    """The coordinates of phi, or s random directions in place of all q: an unbiased estimate.

    Attributes:
      D: None, or (s, q) orthogonal rows of length sqrt(q), so that `D^T D / s` has the identity as its mean.
      count: how many tangents there are.
    """

    def __init__(self, call: str, n: int | None, q: int, seed: int):
        s = checks.directions(call, n, q)
        self._q, self._random, self.count = q, s is not None, s or q
        self._rng = np.random.default_rng(checks.seed(call, seed))
        self.D: Array | None = None
        self.draw()

    def draw(self) -> bool:
        """Fresh random directions, if any; whether there are."""
        if self._random:
            basis = np.linalg.qr(self._rng.normal(size=(self._q, self.count)))[0]
            self.D = math.sqrt(self._q) * (basis * self._rng.choice([-1.0, 1.0], self.count)).T.copy()
        return self._random

    def along(self, seed: Array) -> Array:
        """(count, ...) of seeds (q, ...) by the coordinates of phi."""
        return seed if self.D is None else self.D @ seed

    def spread(self, h: Array) -> Array:
        """(q,) of a derivative along the tangents, (count,)."""
        return h if self.D is None else h @ self.D / len(self.D)

    def snapshot(self) -> dict[str, NDArray]:
        """What a resumed run needs."""
        return {} if self.D is None else {"directions": self.D.copy(), "rng": snapshots.stored(self._rng)}

    def restore(self, call: str, snapshot: Mapping[str, NDArray]) -> None:
        """Go on from a snapshot's; nothing changes where it holds no generator.  Raises ShapeError."""
        if self.D is not None:
            rng = snapshots.generator(call, snapshot["rng"])
            self.D, self._rng = np.array(snapshot["directions"]), rng
