"""Fills docs/evidence.md: each marked block by its function, each picture by its."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats by `number`, None is a dash."""
    lines = [list(heads), ["---"] * len(heads), *([number(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: Any) -> str:
    """Text as it is, None as a dash, a float with two digits that say something: .031, .31, 3.1, 31, 3e+06."""
    if x is None:
        return "-"
    if not isinstance(x, float):
        return str(x)
    size = abs(x)
    digits = ".0e" if size >= 1e4 else ".0f" if size >= 10 else ".1f" if size >= 3 else ".2f" if size >= 0.1 else ".3f"
    return f"{x:{digits}}"


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %"


def fill(text: str, name: str, block: str) -> str:
    """`text` with what stands between the marks of `name` replaced."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    text, found = pattern.subn(lambda m: f"{m[1]}{block.strip()}\n{m[2]}", text)
    if found != 1:
        raise SystemExit(f"evidence: docs/evidence.md must hold the marks of {name} once, found {found}.")
    return text


def write(records: dict[str, dict[str, Any]]) -> None:
    """Fill the page and draw its pictures from the sections' records."""
    from . import SECTIONS

    path = DOCS / "evidence.md"
    text = path.read_text(encoding="utf-8")
    for section, record in records.items():
        for name, block in SECTIONS[section].BLOCKS.items():
            text = fill(text, name, block(record))
        for name, draw in SECTIONS[section].FIGURES.items():
            with style():
                save(draw(record), DOCS / "images" / name)
    path.write_text(text, encoding="utf-8")


def save(figure: Any, path: pathlib.Path) -> None:
    """A small PNG without a date, so that equal figures are equal files."""
    figure.savefig(path, dpi=130, metadata={"Software": None})


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style() -> Any:
    """The context in which figures are drawn."""
    from koopman_hpo_adapters.plot import STYLE
    from matplotlib import rc_context

    return rc_context(STYLE)
