"""CUDA kernels: numba.cuda, compiled at the first launch; the functions of `kernels.cpu` on arrays in device memory.

Each takes the same arguments as its CPU twin and, by keyword, the `stream` to run on: a handle, a torch stream or one of
Numba's; 0 is the device's default stream.  Nothing here waits for the device or copies to the host.
"""

from .launch import device_array, device_arrays, device_stream
from .optimizers import adagrad, adam, lion, rmsprop, sgd
from .tangents import project, scale

__all__ = [
    "adagrad",
    "adam",
    "device_array",
    "device_arrays",
    "device_stream",
    "lion",
    "project",
    "rmsprop",
    "scale",
    "sgd",
]
