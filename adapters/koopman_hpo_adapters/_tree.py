"""A `Problem` made of containers of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from koopman_hpo.problem import Problem

__all__ = ["TreeProblem"]


@dataclass(frozen=True)
class TreeProblem(Problem):
    """A `Problem` whose parameters came in containers: `unravel` gives flat ones (p,) theirs again, `segments` are the
    leaves."""

    unravel: Any = None
