"""What can go wrong, by name, and the conversions of what users give that say so.

Every message names the call, what was expected, what came, and what to do next.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray


class KoopmanHPOError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeError(KoopmanHPOError, ValueError):
    """An array has the wrong shape, dtype or size, or holds a value that is not finite."""


class HyperparameterError(KoopmanHPOError, ValueError):
    """A hyperparameter has an unknown name, a value outside its domain, or bounds that exclude it."""


class AdapterError(KoopmanHPOError, ValueError):
    """A model's function does not keep the contract of `Problem`."""


class NotFrozenError(AdapterError):
    """A run whose training steps `krylov` cannot freeze."""


class CheckpointError(KoopmanHPOError, ValueError):
    """A file is corrupt, foreign, of another version, or does not fit the run it is loaded into."""


class DivergenceWarning(RuntimeWarning):
    """Training diverged and a named policy acted; the history says which."""


def nearest(name: Any, known: Iterable[Any]) -> str:
    """`" Did you mean 'momentum'?"` for the nearest known name, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def short(value: Any) -> str:
    """`value` as a message shows it, at most 80 characters on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def reals(
    call: str,
    what: str,
    value: Any,
    error: type[KoopmanHPOError] = ShapeError,
    want: str = "a number or an array of real numbers",
) -> NDArray[np.float64]:
    """`value` as a float64 array of any shape, the caller's own where it is one.

    Raises:
      error: text, booleans, complex numbers, ragged lists, None, masked values, integers beyond float64.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and all(isinstance(x, Real) and not isinstance(x, bool) for x in array.flat):
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as problem:  # RuntimeError: a tensor that needs grad
        said = str(problem).split("\n", maxsplit=1)[0]
        raise error(f"{call}: {what} must be {want}, got {short(value)} ({said}).") from None
    if array.dtype.kind not in "fiu" or np.ma.is_masked(value):
        raise error(f"{call}: {what} must be {want}, got {short(value)} of dtype {array.dtype}.")
    with np.errstate(over="ignore"):
        return array.astype(np.float64, copy=False)


def number(
    call: str,
    name: str,
    value: Any,
    need: str = "a number",
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    error: type[KoopmanHPOError] = HyperparameterError,
) -> float:
    """`value` as a float within low..high, the ends included unless open; `need` says so in words.

    Raises:
      error: not one real number, NaN, or out of range.
    """
    x = value
    if type(value) is not float:
        array = reals(call, name, value, error, need)
        x = float(array) if array.ndim == 0 else math.nan
    if not ((x > low if open_low else x >= low) and (x < high if open_high else x <= high)):
        raise error(f"{call}: {name} must be {need}, got {short(value)}.")
    return x


def whole(
    call: str,
    name: str,
    value: Any,
    low: int = 1,
    high: int | None = None,
    do: str = "",
    *,
    error: type[KoopmanHPOError] = HyperparameterError,
) -> int:
    """`value` as an int in low..high; a boolean is none.

    Raises:
      error: not an integer, or out of range; `do` says what to do.
    """
    if type(value) is int and low <= value and (high is None or value <= high):  # the common case costs nothing
        return value
    try:
        n = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        n = None
    if n is None or n < low or (high is not None and n > high):
        range_ = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise error(f"{call}: {name} must be a whole number {range_}, got {short(value)}.{do and ' ' + do}")
    return n


def single_or_double(call: str, dtype: Any, error: type[KoopmanHPOError] = ShapeError) -> np.dtype[Any]:
    """`dtype` as a NumPy dtype, float32 or float64.

    Raises:
      error: it is neither.
    """
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise error(f"{call}: dtype must be float32 or float64, got {short(dtype) if found is None else found}.")
    return found


def choice(
    call: str, name: str, value: Any, known: Iterable[str], error: type[KoopmanHPOError] = HyperparameterError
) -> str:
    """`value` if it is one of `known`.

    Raises:
      error: it is none; the nearest is suggested.
    """
    known = sorted(known)
    if not isinstance(value, str) or value not in known:
        ones = ", ".join(repr(k) for k in known)
        raise error(f"{call}: {name} must be one of {ones}, got {short(value)}.{nearest(value, known)}")
    return value


def names(call: str, what: str, given: Any, error: type[KoopmanHPOError] = HyperparameterError) -> tuple[str, ...]:
    """`given` as a tuple of names.

    Raises:
      error: a single string, which would count as its letters, or no collection of strings.
    """
    if isinstance(given, str):
        raise error(f"{call}: {what} must be a collection of names, got the string {given!r}: use ({given!r},).")
    found = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(name, str) for name in found):
        raise error(f"{call}: {what} must be a collection of names, such as ('lr',), got {short(given)}.")
    return found


def flag(call: str, name: str, value: Any, error: type[KoopmanHPOError] = HyperparameterError) -> bool:
    """`value` as a bool.

    Raises:
      error: it is none: a string such as "no" would count as true.
    """
    if not isinstance(value, bool | np.bool_):
        raise error(f"{call}: {name} must be True or False, got {short(value)}.")
    return bool(value)
