"""Arrays in a file: written whole or not at all, read without pickle, refused when foreign."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError, short

VERSION = 1
_MAGIC = "koopman_hpo"


def write(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Any]) -> Path:
    """Write arrays as `.npz` by way of a temporary file beside it and a rename; returns the path."""
    path = _path(f"{kind}.save", path)
    if path.is_dir():
        raise CheckpointError(f"{kind}.save: {path} is a directory; name a file in it.")
    if not path.parent.is_dir():
        raise CheckpointError(f"{kind}.save: the directory {path.parent} does not exist; make it first.")
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, _magic=np.array([_MAGIC, kind, str(VERSION)]), **arrays)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _path(call: str, path: Any) -> Path:
    """`path` as a `Path`.

    Raises:
      CheckpointError: it is none, or an empty one.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise CheckpointError(f"{call}: path must be a string or a Path, got {short(path)}.") from None
    if not text or "\0" in text:
        raise CheckpointError(f"{call}: path must name a file, got {short(text)}.")
    return Path(text)


def read(path: str | os.PathLike[str], kind: str) -> dict[str, NDArray[Any]]:
    """Read what `write` wrote.

    Raises:
      CheckpointError: not found, corrupt, not written by this library, of another kind or version.
    """
    call = f"{kind}.load"
    path = _path(call, path)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise CheckpointError(f"{call}: no file at {path}.") from None
    except (
        *(OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, MemoryError, OverflowError),
        *(NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise CheckpointError(f"{call}: {path} is corrupt or not an .npz of arrays ({error}).") from None
    magic = [str(s) for s in np.atleast_1d(arrays.pop("_magic", np.array([])))]
    if len(magic) != 3 or magic[0] != _MAGIC:
        raise CheckpointError(f"{call}: {path} was not written by koopman_hpo.")
    if magic[1] != kind:
        raise CheckpointError(f"{call}: {path} holds a {magic[1]}, expected a {kind}.")
    if magic[2] != str(VERSION):
        raise CheckpointError(f"{call}: {path} has format version {magic[2]}, this library reads {VERSION}.")
    return arrays
