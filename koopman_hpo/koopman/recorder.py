"""A trajectory and its Gram matrix, grown snapshot by snapshot."""

from __future__ import annotations

from typing import Any

import numpy as np

from koopman_hpo.errors import ShapeError, reals, single_or_double, whole
from koopman_hpo.kernels.cpu.trajectory import gram_row

BLOCK = 1024  # values a block: two rows of it stay in the first-level cache


class Recorder:
    """Records up to `capacity` snapshots of q values, and their Gram matrix relative to the first snapshot.

    `koopman.fit` and `koopman.extrapolate` take a Recorder in place of an array; a wide trajectory (q > m) is
    then read about once for a forecast, because the Gram matrix is already there.  Snapshots once appended never
    change, and `clear` starts a new buffer: a model fitted before stays what it was.

    Raises:
      ShapeError: q, capacity or dtype make no sense.
    """

    def __init__(self, q: int, capacity: int, dtype: Any = np.float64) -> None:
        for name, value in (("q", q), ("capacity", capacity)):
            whole("koopman.Recorder", name, value, do="Give a positive size.")
        self.q, self.capacity, self.dtype = int(q), int(capacity), single_or_double("koopman.Recorder", dtype)
        try:
            self.clear()
        except (MemoryError, ValueError):
            raise ShapeError(
                f"koopman.Recorder: {capacity} snapshots of {q} values do not fit into memory. Give a smaller capacity."
            ) from None

    def clear(self) -> None:
        """Forget all snapshots."""
        self._buffer = np.empty((self.capacity, self.q), self.dtype)
        self._gram = np.zeros((self.capacity, self.capacity))
        self._length = 0

    def append(self, h: Any) -> None:
        """Record the next snapshot h (q,).

        Raises:
          ShapeError: wrong shape, values that are not finite, or the recorder is full.  Nothing is recorded then.
        """
        plain = isinstance(h, np.ndarray) and h.dtype.kind in "fiu"  # as it is: no copy of a wide one
        m, h = self._length, h if plain else reals("koopman.Recorder.append", "h", h, want=f"{self.q} real numbers")
        if h.shape != (self.q,):
            raise ShapeError(f"koopman.Recorder.append: h must be {self.q} real numbers, got shape {h.shape}.")
        if m == self.capacity:
            raise ShapeError(
                f"koopman.Recorder.append: full, {m} of {self.capacity} snapshots. Call clear(), or give more capacity."
            )
        if h.dtype == self.dtype:
            self._buffer[m] = h
        else:
            with np.errstate(over="ignore"):  # found below
                self._buffer[m] = h
        row = self._gram[m]
        gram_row(self._buffer, m + 1, BLOCK, None, row)
        if not np.isfinite(row[m]) or (m == 0 and not np.isfinite(h).all()):
            raise ShapeError(
                f"koopman.Recorder.append: snapshot {m} must be finite and below 1e150. Training diverged: "
                f"keep what was recorded before, or lower the learning rate."
            )
        self._gram[: m + 1, m] = row[: m + 1]
        self._length = m + 1

    def __len__(self) -> int:
        """Number of snapshots m."""
        return self._length

    @property
    def snapshots(self) -> np.ndarray:
        """(m, q), read-only view."""
        return _read_only(self._buffer[: self._length])

    @property
    def gram(self) -> np.ndarray:
        """(m, m) float64, read-only view: dot products of the snapshots minus the first one."""
        return _read_only(self._gram[: self._length, : self._length])


def _read_only(view: np.ndarray) -> np.ndarray:
    view.flags.writeable = False
    return view
