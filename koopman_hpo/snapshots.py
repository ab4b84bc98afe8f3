"""What a run's snapshot must hold before any of it is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ShapeError


def check(call: str, snapshot: Any, like: Mapping[str, NDArray]) -> None:
    """Refuse a snapshot that lacks an array of `like`, or holds one of another shape or kind.

    Raises:
      ShapeError: saying which.
    """
    if not isinstance(snapshot, Mapping):
        raise ShapeError(f"{call}: needs what snapshot() returned, got {type(snapshot).__name__}.")
    for name, array in like.items():
        got = snapshot.get(name)
        shape, dtype = getattr(got, "shape", None), getattr(got, "dtype", None)  # of NumPy, or of a card
        if shape is None or tuple(shape) != tuple(array.shape) or not _alike(dtype, array.dtype):
            came = repr(got) if shape is None else f"{tuple(shape)} of {dtype}"
            raise ShapeError(
                f"{call}: {name} must be {array.shape} of {array.dtype}, got {came}. The snapshot belongs to another "
                f"model, space or optimizer."
            )
    if "directions" in snapshot and "directions" not in like:
        raise ShapeError(f"{call}: the snapshot is of random directions, this run follows all q. Give both the same.")


def hosted(a: Any) -> NDArray:
    """A copy on the host, from wherever it is kept."""
    return a.copy_to_host() if hasattr(a, "copy_to_host") else np.array(a)


def _alike(a: Any, b: np.dtype) -> bool:
    return a == b or a.kind == b.kind == "U"  # text of any length


def stored(rng: np.random.Generator) -> NDArray:
    """A generator's state as an array of text."""
    return np.array(json.dumps(rng.bit_generator.state))


def generator(call: str, state: NDArray) -> np.random.Generator:
    """A generator in a stored state.

    Raises:
      ShapeError: it is no state of one.
    """
    rng = np.random.default_rng(0)
    try:
        rng.bit_generator.state = json.loads(str(state))
    except (ValueError, TypeError, KeyError) as error:
        raise ShapeError(f"{call}: rng is no state of a random generator ({error!r}).") from error
    return rng
