"""Estimates against the true global hypergradient."""

from __future__ import annotations

from typing import Any

from . import cases, trajectories
from .settings import Settings

BLOCKS: dict[str, Any] = {}
FIGURES: dict[str, Any] = {}


def measure(settings: Settings) -> dict[str, Any]:
    """Trajectories of every group, kept in the cache."""
    return {name: len(trajectories.make(cases.cases(name, settings.full), settings)) for name in cases.GROUPS}
