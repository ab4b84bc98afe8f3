"""`koopman-hpo report`: table and figure of a saved history."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import CheckpointError
from .history import History

ROWS, COORDINATES = 12, 4  # shown in the table


def main(path: Path, out: Path | None = None) -> int:
    """Read, draw, print; the figure goes to `out`, by default the history's name with .png.

    Raises:
      CheckpointError: the file is no history, or one without a window; or `out` is no picture that can be written.
    """
    from koopman_hpo_adapters.plot import figure

    history = History.load(path)
    out = path.with_suffix(".png") if out is None else out
    _check(path, out)
    if not len(history):
        raise CheckpointError(f"{path} holds a history without a window: nothing to show.")
    drawn = figure(history)
    _print(history)
    drawn.savefig(out, dpi=200)
    print(f"figure: {out}")
    return 0


def _check(path: Path, out: Path) -> None:
    """Refuse a figure that cannot be written, before anything is drawn."""
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if out.is_dir() or not out.parent.is_dir():
        wrong = "is a directory" if out.is_dir() else f"lies in {out.parent}, which does not exist"
        raise CheckpointError(f"the figure {out} {wrong}. Name a file with --out.")
    if out.exists() and out.samefile(path):
        raise CheckpointError(f"the figure would overwrite the history {path}. Name another file with --out.")
    if out.suffix.removeprefix(".").lower() not in kinds:
        raise CheckpointError(f"the figure {out} must end in one of {', '.join(sorted(kinds))}. Name one with --out.")


def _print(history: History) -> None:
    from koopman_hpo_adapters.plot import largest
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown, q = largest(history, COORDINATES), len(history.labels)
    events = int((history.event != "").sum())
    title = f"{len(history)} windows, {history.step[-1]:,} inner steps, {events} guard events"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
    for name in ("step", "validation loss", *(history.labels[j] for j in shown)):
        table.add_column(name, justify="right")
    for name in ("estimate", "event"):
        table.add_column(name)
    natural = history.natural
    for i in np.unique(np.linspace(0, len(history) - 1, ROWS).round().astype(int)):
        r = history[i]
        table.add_row(f"{r.step:,}", f"{r.value:.4g}", *(f"{natural[i, j]:.3g}" for j in shown), r.method, r.event)
    if len(shown) < q:
        table.caption = f"{len(shown)} of {q} coordinates: those with the largest hypergradients"
    Console().print(table)
