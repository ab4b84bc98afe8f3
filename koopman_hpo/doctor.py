"""`koopman-hpo doctor`: what is installed and usable, and a check that the derivative is right on this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util

import numpy as np

from . import __version__

EXTRAS = {"progress": ("tqdm",), "plot": ("matplotlib",), "demo": ("rich", "scikit-learn")}
FRAMEWORKS = ("torch", "jax", "autograd")


def main() -> int:
    """Print a line a finding; 0, or 1 where the self-check fails."""
    print(f"koopman-hpo {__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    for name in ("numpy", "numba", "scipy"):
        _line(name, _version(name) or "MISSING")
    _line("kernels", _kernels())
    _line("CUDA", _cuda())
    for extra, names in EXTRAS.items():
        _line(f"extra {extra}", ", ".join(f"{n} {_version(n) or 'not installed'}" for n in names))
    _line("adapter numpy", "ready")
    for name in FRAMEWORKS:
        _line(f"adapter {name}", _framework(name))
    ok, said = _self_check()
    _line("self-check", said)
    return 0 if ok else 1


def _line(name: str, finding: str) -> None:
    print(f"  {name:<18} {finding}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _framework(name: str) -> str:
    installed = f"{name} {_version(name)}" if _version(name) else f"{name} not installed"
    if util.find_spec(f"koopman_hpo_adapters.{name}") is None:
        return f"{installed}; its adapter is not part of this release"
    return f"{installed}; ready" if _version(name) else installed


def _kernels() -> str:
    """Where compiled kernels are kept."""
    from .kernels.cpu import optimizers

    kept = optimizers.sgd.stats.cache_path
    existing = kept
    while not os.path.isdir(existing):  # numba makes it at the first compilation
        existing = os.path.dirname(existing)
    usable = "" if os.access(existing, os.W_OK) else " NOT WRITABLE: set NUMBA_CACHE_DIR to a folder that is"
    return f"compiled once, kept in {kept}{usable}"


def _cuda() -> str:
    try:
        from numba import cuda

        here = cuda.is_available()
    except Exception as error:  # a broken driver must not end a diagnosis
        return f"not usable ({error})"
    device = "a device is present" if here else "no device found"
    kernels = util.find_spec("koopman_hpo.kernels.cuda") is not None
    return device if kernels else f"{device}; kernels for it are not part of this release"


def _self_check() -> tuple[bool, str]:
    """Compile (or load) one kernel, and compare a hypergradient with central differences."""
    from koopman_hpo_adapters.numpy import mlp

    from . import inner
    from .exact import check_hypergradient
    from .hyperparameters import log, logit
    from .space import Space

    rng = np.random.default_rng(0)
    batch = rng.normal(size=(8, 3)), rng.integers(0, 2, 8)
    run = inner.sgd(mlp((3, 4, 2)), Space(lr=log(0.1), momentum=logit(0.9), l2=log(1e-2)))
    check = check_hypergradient(run, [batch] * 5, batch)
    if check.ok:
        return True, f"ok: a hypergradient agrees with central differences to {check.error.max():.0e}"
    return False, f"FAILED: hypergradient and central differences disagree\n{check}"
