"""CPU kernels: Numba, one thread, compiled on first use and cached on disk."""

from .optimizers import adagrad, adam, lion, rmsprop, sgd

__all__ = ["adagrad", "adam", "lion", "rmsprop", "sgd"]
