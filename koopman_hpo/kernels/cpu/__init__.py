"""CPU kernels: Numba, one thread, compiled on first use and cached on disk."""

from .optimizers import adagrad, adam, lion, rmsprop, sgd
from .tangents import project, scale

__all__ = ["adagrad", "adam", "lion", "project", "rmsprop", "scale", "sgd"]
