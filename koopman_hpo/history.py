"""What happened, as plain arrays: one row a window, and every hypergradient recorded within."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import files
from .errors import CheckpointError, ShapeError, names, number, short
from .transforms import transform

Array = NDArray[Any]


class Record(NamedTuple):
    """One window.  q coordinates."""

    step: int  # inner steps spent when it ended
    t: int  # inner step of the run when it ended
    phi: Array  # (q,) held during the window
    h: Array  # (q,) last hypergradient recorded; NaN where none was
    estimate: Array  # (q,) of the global hypergradient; NaN after a rollback
    error: Array  # (q,) stated by the estimator; NaN where it states none
    move: Array  # (q,) outer step subtracted from phi
    coherence: Array  # (q,) |mean h| / mean |h|
    loss: float  # mean inner loss
    value: float  # outer loss at the end
    accepted: bool  # whether the forecast passed its gate
    method: str  # that made the estimate
    reason: str  # of the estimator's decision
    event: str  # what the guard did; empty when nothing


class History:
    """Records as columns: `history.phi` is (windows, q), `history.event` (windows,) strings, and so on for every field
    of `Record`; `trajectory` (m, q) and `trajectory_step` (m,) hold each recorded hypergradient and when.

    Attributes:
      labels: q names of the coordinates.  transforms: q names of their transforms.

    Raises:
      HyperparameterError, ShapeError: labels or transforms are no collections of names, or do not fit together.
    """

    def __init__(self, labels: tuple[str, ...], transforms: tuple[str, ...] = ()):
        self.labels = names("History", "labels", labels)
        self.transforms = names("History", "transforms", transforms) or ("identity",) * len(self.labels)
        if len(self.transforms) != len(self.labels):
            raise ShapeError(f"History: needs one transform a label, got {len(self.transforms)} for {len(self.labels)}.")
        for name in self.transforms:
            transform(name)
        self._records: list[Record] = []
        self._trajectory: list[Array] = []
        self._trajectory_step: list[int] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        return self._records[i]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name not in Record._fields:
            raise AttributeError(f"History has no column {name!r}; it has {Record._fields} and trajectory.")
        return self._column(name)

    def _column(self, name: str) -> NDArray[Any]:
        i = Record._fields.index(name)
        column = [r[i] for r in self._records]
        if name in _VECTORS:
            return np.array(column, np.float64).reshape(len(column), len(self.labels))
        return np.array(column, dtype=_SCALARS[name])

    @property
    def natural(self) -> Array:
        """(windows, q) the hyperparameters in natural values."""
        with np.errstate(over="ignore"):
            columns = [transform(t).to_natural(u) for t, u in zip(self.transforms, self.phi.T, strict=True)]
        return np.array(columns, np.float64).reshape(len(self.labels), len(self)).T

    @property
    def trajectory(self) -> Array:
        return np.array(self._trajectory, np.float64).reshape(len(self._trajectory), len(self.labels))

    @property
    def trajectory_step(self) -> NDArray[np.int64]:
        return np.array(self._trajectory_step, np.int64)

    def recent(self, step: int, least: int = 10) -> Array:
        """(m, q) the hypergradients recorded after a step, or the last `least` where these are more."""
        since = sum(1 for _ in itertools.takewhile(lambda s: s > step, reversed(self._trajectory_step)))
        m = min(max(since, least), len(self._trajectory))
        return np.array(self._trajectory[len(self._trajectory) - m :], np.float64).reshape(m, len(self.labels))

    def learned(self, before: float) -> Array:
        """(q,) where training learned most: the mean of phi over the windows, weighed by how far each took the logarithm of
        the outer loss below all before it, `before` at first.  The last phi where it never fell.

        Where to begin again: once a constant lr has learned what it can, its hypergradient asks to average out the noise,
        and takes it down.  Where a loss is not above zero the loss itself counts in place of its logarithm.

        Raises:
          ShapeError: no window.  HyperparameterError: `before` is not a finite number.
        """
        need = "the outer loss before training, a finite number"
        before = number("History.learned", "before", before, need, open_low=True, open_high=True)
        if not len(self):
            raise ShapeError("History.learned: the history has no window yet. Ask after the first.")
        values = np.concatenate([[before], np.where(np.isfinite(self.value), self.value, np.inf)])
        lowest = np.minimum.accumulate(values)
        gained = -np.diff(np.log(lowest) if lowest[-1] > 0 else lowest)
        return gained @ self.phi / gained.sum() if gained.sum() > 0 else self.phi[-1].copy()

    def append(self, record: Record) -> None:
        if not isinstance(record, Record):
            raise ShapeError(f"History.append: record must be a Record, got {short(record)}.")
        for name in _VECTORS:
            self._check(name, getattr(record, name))
        self._records.append(record)

    def observe(self, step: int, h: Array) -> None:
        self._check("h", h)
        self._trajectory.append(np.array(h))
        self._trajectory_step.append(step)

    def _check(self, name: str, h: Array) -> None:
        if np.shape(h) != (len(self.labels),):
            raise ShapeError(f"History: {name} must have shape (q,) = ({len(self.labels)},), got {np.shape(h)}.")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every column, the trajectory and the labels: what a file holds."""
        out = {name: self._column(name) for name in Record._fields}
        out |= {"trajectory": self.trajectory, "trajectory_step": self.trajectory_step}
        return out | {"labels": np.array(self.labels, np.str_), "transforms": np.array(self.transforms, np.str_)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> History:
        """The inverse of `arrays`.

        Raises:
          CheckpointError: a column is missing, has another length than the rest, or holds something else.
        """
        if not isinstance(arrays, Mapping):
            raise CheckpointError(f"History: not a history: a dict of arrays was expected, got {short(arrays)}.")
        missing = [n for n in (*Record._fields, *_OTHERS) if n not in arrays]
        lengths = {np.shape(arrays[n])[:1] for n in Record._fields if n in arrays}
        rows = {np.shape(arrays[n])[:1] for n in ("trajectory", "trajectory_step") if n in arrays}
        if missing or len(lengths) != 1 or len(rows) != 1:
            raise CheckpointError(
                f"History: not a history: columns missing {missing}, lengths {sorted(lengths)}, of the trajectory "
                f"{sorted(rows)}."
            )
        try:
            return cls._made(arrays)
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(f"History: not a history: {error}.") from error

    @classmethod
    def _made(cls, arrays: dict[str, NDArray[Any]]) -> History:
        history = cls(*(tuple(str(s) for s in arrays[n]) for n in ("labels", "transforms")))
        kinds: list[Callable[[Any], Any]] = [_SCALARS.get(n, np.array) for n in Record._fields]
        for i in range(len(arrays["step"])):
            row = [kind(arrays[n][i]) for kind, n in zip(kinds, Record._fields, strict=True)]
            history.append(Record(*row))
        for step, h in zip(arrays["trajectory_step"], arrays["trajectory"], strict=True):
            history.observe(int(step), h)
        return history

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `.npz`, whole or not at all."""
        return files.write(path, "history", self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote.

        Raises:
          CheckpointError: the file is corrupt, foreign or of another version.
        """
        return cls.from_arrays(files.read(path, "history"))


_OTHERS = ("trajectory", "trajectory_step", "labels", "transforms")
_VECTORS = frozenset({"phi", "h", "estimate", "error", "move", "coherence"})
_SCALARS: dict[str, type] = {
    "step": int,
    "t": int,
    "loss": float,
    "value": float,
    "accepted": bool,
    "method": str,
    "reason": str,
    "event": str,
}
