"""Loops over flat arrays, one module a device: no policy, no validation, no allocation."""

from __future__ import annotations

from types import ModuleType

DEVICES = ("cpu", "cuda")


def for_device(device: str) -> ModuleType:
    """The kernels of a device.  The only place that picks a twin.

    Raises:
      ValueError: no such device.
      RuntimeError: "cuda", and this machine has no card that Numba can use.
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

        if cuda.is_available():
            return
    except Exception as error:  # a broken driver or toolkit says so in many ways
        why = f" ({error})"
    raise RuntimeError(
        f"kernels.for_device: device 'cuda' needs an NVIDIA card with its driver, and the extra that compiles for it: "
        f'pip install "koopman-hpo[cuda]". Numba finds none here{why}. device="cpu" works everywhere.'
    )
