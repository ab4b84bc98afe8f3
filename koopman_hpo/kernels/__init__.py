"""Loops over flat arrays, one module a device: no policy, no validation, no allocation."""

from __future__ import annotations

from types import ModuleType

DEVICES = ("cpu",)


def for_device(device: str) -> ModuleType:
    """The kernels of a device.  The only place that picks a twin.

    Raises:
      ValueError: no such device.
    """
    if device == "cpu":
        from . import cpu

        return cpu
    raise ValueError(f"kernels.for_device: device must be one of {DEVICES}, got {device!r}.")
