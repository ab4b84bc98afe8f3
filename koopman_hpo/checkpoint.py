"""A tuner in a file: saved at any step, resumed bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from . import files
from .errors import CheckpointError, ShapeError
from .tuner import Tuner


def save(path: str | os.PathLike[str], tuner: Tuner) -> Path:
    """Write everything that the run needs to go on: parameters, optimizer slots, tangents, trajectory, outer optimizer,
    history, random state.  `.npz` without pickle, written whole or not at all; returns the path."""
    _check("save", tuner)
    snapshot = tuner.snapshot()
    meta = json.dumps(snapshot.pop("meta"))
    return files.write(path, "checkpoint", {"meta": np.array(meta), **snapshot})


def load(path: str | os.PathLike[str], tuner: Tuner) -> Tuner:
    """Bring a tuner to where it was when `save` was called, and return it.

    Args:
      path: of the file.
      tuner: made as the saved one was: same model, space, optimizer and settings.  Batches given as a list or as a
        function of the step go on where they were; an iterator must be brought there by its owner.

    Raises:
      CheckpointError: the file is corrupt, foreign, of another version, or of a run with other settings.  The tuner is
        then as before.
    """
    _check("load", tuner)
    arrays = dict(files.read(path, "checkpoint"))
    try:
        tuner.restore({**arrays, "meta": json.loads(str(arrays.get("meta", np.array("null"))))})
    except (ShapeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint.load: {path} does not fit this tuner. {error}") from error
    return tuner


def _check(call: str, tuner: Tuner) -> None:
    if not isinstance(tuner, Tuner):
        raise CheckpointError(f"checkpoint.{call}: the second argument must be a Tuner, got {type(tuner).__name__}.")
