"""Hyperparameters tuned by gradients, while the model trains.

Forward mode carries the tangents of training along with training itself, so the hypergradient is known after every
step; Koopman extrapolation carries its trajectory on to the end of training; a tuner turns it into steps of the
hyperparameters.
"""

from . import checkpoint, inner, koopman, outer
from .errors import (
    AdapterError,
    CheckpointError,
    DivergenceWarning,
    HyperparameterError,
    KoopmanHPOError,
    NotFrozenError,
    ShapeError,
)
from .exact import check_hypergradient, hypergradient, trajectory
from .guard import Guard
from .history import History
from .hyperparameters import Hyperparameter, box, identity, log, logit
from .inner import Inner
from .problem import Hypergradient, Problem
from .recipe import Searched, search_first
from .space import Space
from .strategies import Global, Glocal, Local
from .tuner import Result, Tuner

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DivergenceWarning",
    "Global",
    "Glocal",
    "Guard",
    "History",
    "Hypergradient",
    "Hyperparameter",
    "HyperparameterError",
    "Inner",
    "KoopmanHPOError",
    "Local",
    "NotFrozenError",
    "Problem",
    "Result",
    "Searched",
    "ShapeError",
    "Space",
    "Tuner",
    "box",
    "check_hypergradient",
    "checkpoint",
    "hypergradient",
    "identity",
    "inner",
    "koopman",
    "log",
    "logit",
    "outer",
    "search_first",
    "trajectory",
]
