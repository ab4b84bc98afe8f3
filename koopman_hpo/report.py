"""`koopman-hpo report`: table and figure of a saved history."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from .errors import CheckpointError, HyperparameterError, nearest
from .history import History
from .hyperparameters import Hyperparameter, Space, identity, log, logit

ROWS, COORDINATES = 12, 4  # shown in the table


def main(path: Path, out: Path, logs: list[str], logits: list[str]) -> int:
    """Read, draw, print.

    Raises:
      CheckpointError: the file is no history, or one without a window.
    """
    from koopman_hpo_adapters.plot import figure

    history = History.load(path)
    if not len(history):
        raise CheckpointError(f"{path} holds a history without a window: nothing to show.")
    space = _space(history, logs, logits)
    drawn = figure(history, space)
    _print(history, space)
    drawn.savefig(out, dpi=200)
    print(f"figure: {out}")
    return 0


def _space(history: History, logs: list[str], logits: list[str]) -> Space:
    """A space with one scalar a coordinate: what turns phi into natural values, as far as the transforms were named."""
    bare = [re.split(r"[\[@]", label)[0] for label in history.labels]
    for name in (*logs, *logits):
        if name not in bare:
            raise HyperparameterError(f"the history has no hyperparameter {name!r}.{nearest(name, bare)}")
    entries: dict[str, Hyperparameter] = {}
    for label, name, phi in zip(history.labels, bare, history.phi[0], strict=True):
        if name in logs:
            entries[label] = log(np.exp(phi))
        elif name in logits:
            entries[label] = logit(1 / (1 + np.exp(-phi)))
        else:
            entries[label] = identity(phi)
    return Space(**entries)


def _print(history: History, space: Space) -> None:
    from koopman_hpo_adapters.plot import largest
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = largest(history, COORDINATES)
    events = int((history.event != "").sum())
    title = f"{len(history)} windows, {history.step[-1]:,} inner steps, {events} guard events"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
    for name in ("step", "validation loss", *(space.labels[j] for j in shown)):
        table.add_column(name, justify="right")
    for name in ("estimate", "event"):
        table.add_column(name)
    transforms = [h.transform for h in space.values()]
    for i in np.unique(np.linspace(0, len(history) - 1, ROWS).round().astype(int)):
        r = history[i]
        natural = [f"{transforms[j].to_natural(r.phi[j]):.3g}" for j in shown]
        table.add_row(f"{r.step:,}", f"{r.value:.4g}", *natural, r.method, r.event)
    if len(shown) < space.q:
        table.caption = f"{len(shown)} of {space.q} coordinates: those with the largest hypergradients"
    Console().print(table)
    unnamed = [space.labels[j] for j in shown if transforms[j].name == "identity"]
    if unnamed:
        print(f"In coordinates phi: {', '.join(unnamed)}. Name their transforms with --log NAME ... or --logit NAME ...")
