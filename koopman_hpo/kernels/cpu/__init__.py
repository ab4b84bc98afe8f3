"""CPU kernels: Numba, one thread, compiled on first use and cached on disk."""

from .optimizers import Coefficients, Grads, State, adagrad, adam, lion, rmsprop, sgd

__all__ = ["Coefficients", "Grads", "State", "adagrad", "adam", "lion", "rmsprop", "sgd"]
