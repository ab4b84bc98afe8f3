"""What pays, and what does not: ideas for a better estimate, and loops that might make more of one."""

from __future__ import annotations

from typing import Any

from . import payoff_online, payoff_restarts, payoff_windows
from .page import number
from .settings import Settings

PARTS = {"restarts": payoff_restarts, "online": payoff_online}


def measure(settings: Settings) -> dict[str, Any]:
    there = PARTS if settings.data is not None else {}
    return {"windows": payoff_windows.measure(settings)} | {name: part.measure(settings) for name, part in there.items()}


def given(block: Any) -> Any:
    """A block of what needs data."""
    return lambda record: block(record) if record["data"] else "Not measured: no data was given."


def windows_verdict(record: dict[str, Any]) -> str:
    """Which ideas are below the aged in error, where."""
    plain, _ = record["results"]["windows"]
    aged, lines = plain["ideas"]["aged"], []
    for part in payoff_windows.PARTS:
        better = {n: v[part] for n, v in plain["ideas"].items() if v[part] < 0.95 * aged[part]}
        listed = "; ".join(f"{n} ({number(x)})" for n, x in sorted(better.items(), key=lambda item: item[1])) or "nothing"
        where = part.replace("mini", "batches of 32")
        lines.append(f"- {where}: aged has {number(aged[part])} of the last value's error; clearly less: {listed}.")
    return "\n".join(lines)


BLOCKS = {
    "payoff.windows": payoff_windows.block,
    "payoff.windows_verdict": windows_verdict,
    "payoff.restarts": given(payoff_restarts.block),
    "payoff.restarts_verdict": given(payoff_restarts.verdict),
    "payoff.online": given(payoff_online.block),
    "payoff.several": given(payoff_online.several_block),
    "payoff.online_verdict": given(payoff_online.verdict),
}
FIGURES: dict[str, Any] = {}
