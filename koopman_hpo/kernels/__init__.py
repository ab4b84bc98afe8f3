"""Loops over flat arrays, one module a device: no policy, no validation, no allocation."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np

DEVICES = ("cpu", "cuda")


def for_device(device: str) -> ModuleType:
    """The kernels of a device.  The only place that picks a twin.

    Raises:
      ValueError: no such device.
      RuntimeError: "cuda", and this machine has no card that Numba can use, or a NumPy that is too new for it.
    """
    if device == "cpu":
        from . import cpu

        return cpu
    if device == "cuda":
        _demand_cuda()
        from . import cuda

        return cuda
    raise ValueError(f"kernels.for_device: device must be one of {DEVICES}, got {device!r}.")


def _demand_cuda() -> None:
    why = ""
    try:
        from numba import cuda

        here = cuda.is_available()
    except Exception as error:  # a broken driver or toolkit says so in many ways
        here, why = False, f" ({error})"
    if here:
        return _demand_numpy()
    raise RuntimeError(
        f"kernels.for_device: device 'cuda' needs an NVIDIA card with its driver, and the extra that compiles for it: "
        f'pip install "koopman-hpo[cuda]". Numba finds none here{why}. device="cpu" works everywhere.'
    )


def _demand_numpy() -> None:
    """numba-cuda 0.30, the last that is developed, loads this at its first launch, which fails from NumPy 2.5 on."""
    try:
        import_module("numba.cuda.np.arrayobj")
    except ModuleNotFoundError:  # Numba's own target, or its simulator
        return
    except AttributeError as error:
        raise RuntimeError(
            f"kernels.for_device: device 'cuda' needs an older NumPy than {np.__version__}, which numba-cuda does not "
            f'know ({error}): pip install "numpy<2.5".'
        ) from None
