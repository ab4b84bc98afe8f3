"""A progress bar on long work: tqdm's where it is installed (extra `progress`), silent without it.

Tuner(run, Glocal(), steps=2000, callbacks=[Progress()]).fit(batches, val_batches)
"""

from __future__ import annotations

from typing import Any

from koopman_hpo import Tuner
from koopman_hpo.errors import whole

__all__ = ["Progress", "bar"]


class _Silent:
    """What a bar does where there is none."""

    def update(self, n: int = 1) -> None: ...
    def set_postfix_str(self, s: str) -> None: ...
    def close(self) -> None: ...


def bar(total: int, label: str = "", *, disable: bool | None = None) -> Any:
    """A bar over `total` steps with `update(n)`, `set_postfix_str(s)` and `close()`.

    Args:
      total: steps.
      label: what stands before it.
      disable: True, False, or None: shown only where stderr is a terminal.

    Raises:
      HyperparameterError: total is no whole number.
    """
    total = whole("progress.bar", "total", total, 0)
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=label, disable=disable, unit="step", dynamic_ncols=True)


class Progress:
    """A tuner's callback: inner steps spent, validation loss and hyperparameters after every window.

    One object may follow several tuners in turn: it closes its bar when a tuner is done, or gives way to another.
    """

    def __init__(self, label: str = "", *, disable: bool | None = None):
        self.label, self.disable = label, disable
        self._bar: Any = None
        self._tuner: Tuner | None = None
        self._seen = 0

    def __call__(self, tuner: Tuner) -> None:
        if tuner is not self._tuner:
            self.close()
            self._tuner, self._seen = tuner, 0
            self._bar = bar(tuner.budget, self.label, disable=self.disable)
        self._bar.update(tuner.used - self._seen)
        self._seen = tuner.used
        self._bar.set_postfix_str(describe(tuner))
        if tuner.done:
            self.close()

    def close(self) -> None:
        """Leave the bar as it stands.  Harmless where there is none."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._tuner = None


def describe(tuner: Tuner) -> str:
    """`loss 0.0912, lr 0.0025, momentum 0.994`: scalars by value, vectors by their range."""
    parts = [f"loss {tuner.value:.4g}"]
    for name, x in tuner.hyper.items():
        parts.append(f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x.min():.2g}..{x.max():.2g}")
    return ", ".join(parts)
