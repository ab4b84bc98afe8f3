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
    if not isinstance(tuner, Tuner):
        raise CheckpointError(f"checkpoint.save: the second argument must be a Tuner, got {type(tuner).__name__}.")
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
    arrays = dict(files.read(path, "checkpoint"))
    try:
        meta = json.loads(str(arrays.pop("meta")))
        tuner.restore({"meta": meta, **arrays})
    except ShapeError as error:
        raise CheckpointError(f"checkpoint.load: {path} does not fit this tuner. {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint.load: {path} lacks what a checkpoint holds ({error!r}).") from error
    return tuner
