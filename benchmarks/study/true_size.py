"""The paper's reweighting at its true size, on a card: class weights of WRN-28-2 on images of 28x28."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .paper import FIRST_SEED, reweighting
from .settings import Settings


def measure(settings: Settings) -> dict[str, Any]:
    import torch

    from . import wide

    if settings.data is None or not torch.cuda.is_available():
        raise SystemExit("evidence: section true_size needs KMNIST (--data) and a torch that sees a card.")
    rows = [wide.row((m, FIRST_SEED), settings.data, wide.TRUE, "cuda") for m in wide.METHODS]
    card = {"card": torch.cuda.get_device_name(), "torch": version("torch")}
    return card | {"size": wide.TRUE._asdict(), "rows": rows}


def block(record: dict[str, Any]) -> str:
    results = record["results"]
    return f"{results['card']}, {record['date'][:10]}, torch {results['torch']}. {reweighting(results)}"


BLOCKS = {"true_size.table": block}
FIGURES: dict[str, Any] = {}
