"""The model-based operator beside the aging law, on the windows of benchmarks/krylov.py: 50 steps, tangents begun anew."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

from .cases import FIRST_SEED
from .page import number, percent, table
from .problems import NEEDS_DATA, Case
from .settings import Settings

LABELS = {
    "full": "digits, full batch",
    "mini": "digits, batches of 32",
    "noisy": "digits, 20 % random labels, batches of 32",
    "adam, full batch": "digits, Adam, full batch",
    "adam, batch 32": "digits, Adam, batches of 32",
    "kmnist": "KMNIST, batches of 64",
}


def measured(job: tuple[str, Case], settings: Settings) -> list[dict[str, Any]]:
    import krylov

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return krylov.windows(*job, settings.data)


def measure(settings: Settings) -> dict[str, Any]:
    """Summaries of each group: one seed in the small tier, all of the benchmark's in the full one."""
    import krylov

    jobs = [(group, case) for group in krylov.GROUPS for case in krylov.plan(group) if settings.full or case.seed == 0]
    there = [job for job in jobs if settings.data is not None or job[1].problem not in NEEDS_DATA]
    shifted = [(group, replace(case, seed=case.seed + FIRST_SEED)) for group, case in there]
    rows = [row for part in settings.map(partial(measured, settings=settings), shifted) for row in part]
    return {name: found for name, found in krylov.table(rows).items() if name in LABELS}


def groups(record: dict[str, Any]) -> str:
    """Median relative errors and the rest, a line a group."""
    heads = (
        "windows (how many)",
        "last value",
        "aged",
        "krylov",
        "accepted",
        "of these",
        "signs",
        "1x",
        "2x",
        "cost, windows",
    )
    rows = []
    for name, label in LABELS.items():
        if name in record["results"]:
            s = record["results"][name]
            e, accepted = s["error"], s["error_accepted"]
            shares = [percent(x) for x in (s["sign"]["krylov"], s["covered_once"], s["covered_twice"])]
            taken = "-" if accepted is None else number(accepted)
            where = f"{label} ({s['windows']})"
            errors = (e["last"], e["aged"], e["krylov"])
            rows.append((where, *errors, percent(s["accepted"]), taken, *shares, s["cost_in_windows"]))
    return table(heads, rows)


BLOCKS = {"krylov.groups": groups}
FIGURES: dict[str, Any] = {}
