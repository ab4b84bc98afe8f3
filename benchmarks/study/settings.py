"""What a measurement is given."""

from __future__ import annotations

import multiprocessing
import pathlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The tier, the data, and where trajectories are kept."""

    full: bool = False
    data: pathlib.Path | None = None
    cache: pathlib.Path = pathlib.Path("study-cache")
    jobs: int = 1

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        """`[function(item) for item in items]`, in as many processes as asked for."""
        if self.jobs == 1:
            return [function(item) for item in items]
        with ProcessPoolExecutor(self.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(function, items))
