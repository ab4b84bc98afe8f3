"""The study behind docs/evidence.md.  A section is a module with

measure(settings) -> results   JSON-able
BLOCKS   {name: f(record) -> Markdown}: what stands in the page between `<!-- name -->` and `<!-- /name -->`
FIGURES  {file name: f(record) -> matplotlib Figure}, drawn into docs/images

where a record is what evidence.py stores: {"tier", "seconds", "cpu", "versions", "data", "results": results}.
"""

from __future__ import annotations

from . import costs, crossing, estimates, model_based, paper, payoff, questions, restarts, true_size, tuning
from .settings import Settings

SECTIONS = {
    "estimates": estimates,
    "krylov": model_based,
    "costs": costs,
    "questions": questions,
    "tuning": tuning,
    "crossing": crossing,
    "restarts": restarts,
    "payoff": payoff,
    "paper": paper,
    "true_size": true_size,
}
ON_A_CARD = ("true_size",)  # measured only when asked for

__all__ = ["ON_A_CARD", "SECTIONS", "Settings"]
