"""What can go wrong, by name.  Every message names the call, what was expected, what came, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KoopmanHPOError(Exception):
    """Base of every error that this library raises on purpose."""


class ShapeError(KoopmanHPOError, ValueError):
    """An array has the wrong shape, dtype or size, or holds a value that is not finite."""


class HyperparameterError(KoopmanHPOError, ValueError):
    """A hyperparameter has an unknown name, a value outside its domain, or bounds that exclude it."""


class AdapterError(KoopmanHPOError, ValueError):
    """A model's function does not keep the contract of `Problem`."""


class CheckpointError(KoopmanHPOError, ValueError):
    """A file is corrupt, foreign, of another version, or does not fit the run it is loaded into."""


class DivergenceWarning(RuntimeWarning):
    """Training diverged and a named policy acted; the history says which."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'momentum'?"` for the nearest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""
