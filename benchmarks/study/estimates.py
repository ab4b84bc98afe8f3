"""Estimates against the true global hypergradient: every method, on every window."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from . import cases, trajectories
from .forecasters import CUMULATIVE_ENDS, HORIZON, Window, forecasters, windows
from .page import number, percent, table
from .problems import Case
from .settings import Settings

Row = dict[str, Any]


def judged(job: tuple[str, Case], settings: Settings) -> list[Row]:
    """One row a window: where it lies, and of each method (value, stated error, accepted)."""
    group, case = job
    found = trajectories.trajectories(case, settings.data, settings.cache)
    return [row(w) for w in windows(group, case, found)]


def row(w: Window) -> Row:
    where = {"group": w.group, "tangents": w.tangents, "tau": w.tau, "begun": w.begun, "lr": w.case.lr, "seed": w.case.seed}
    where["steps"] = w.steps
    with np.errstate(all="ignore"):
        found = {name: method(w) for name, method in forecasters().items()}
    return where | {"truth": w.truth, "last": w.H[-1], "methods": found}


def measure(settings: Settings) -> dict[str, Any]:
    """Cells (group, tangents, tau) and the whole, of every method; and what the figures need of each window."""
    jobs = [(name, case) for name in cases.GROUPS for case in trajectories.make(cases.cases(name, settings.full), settings)]
    rows = [row for part in settings.map(partial(judged, settings=settings), jobs) for row in part]
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        cells.setdefault((r["group"], r["tangents"], r["tau"]), []).append(r)
    return {
        "cells": [
            {"group": g, "tangents": t, "tau": tau, "windows": len(part), "methods": summaries(part)}
            for (g, t, tau), part in cells.items()
        ],
        "late": {g: {"windows": len(part), "methods": summaries(part)} for g, part in late(cells).items()},
        "all": {"windows": len(rows), "methods": summaries(rows)},
        "reset": {"methods": summaries([r for r in rows if r["tangents"] == "reset"])},
        "cumulative": {"methods": summaries([r for r in rows if r["tangents"] == "cumulative"])},
        "windows": [brief(r) for r in rows],
        "runs": len(jobs),
    }


def late(cells: dict[tuple[Any, ...], list[Row]]) -> dict[str, list[Row]]:
    """Of each group, the windows of 50 steps that end at the last place, tangents as old as training."""
    end = HORIZON - CUMULATIVE_ENDS[-1]
    part = {
        g: [r for r in rows if r["steps"] == end] for (g, t, tau), rows in cells.items() if (t, tau) == ("cumulative", 50)
    }
    return {g: rows for g, rows in part.items() if rows}


def summaries(rows: list[Row]) -> dict[str, Row]:
    """Of each method, its `summary` over windows."""
    return {name: summary(rows, name) for name in rows[0]["methods"]}


def summary(rows: list[Row], name: str) -> Row:
    """Medians and shares over windows.  A relative error is |value - truth| / |truth| over the q coordinates."""
    truth = np.array([r["truth"] for r in rows])
    value = np.array([r["methods"][name].value for r in rows])
    stated = np.array([r["methods"][name].error for r in rows])
    size = np.linalg.norm(truth, axis=1)
    error = np.linalg.norm(value - truth, axis=1) / size
    last = np.linalg.norm(np.array([r["last"] for r in rows]) - truth, axis=1) / size
    cosine = (value * truth).sum(axis=1) / (size * np.maximum(np.linalg.norm(value, axis=1), 1e-300))
    ratio = np.log(np.maximum(error, 1e-12) / np.maximum(last, 1e-12))
    cover = lambda z: short(np.mean(np.abs(value - truth) <= z * stated)) if np.isfinite(stated).all() else None
    whole = short(np.mean(error * size <= np.linalg.norm(stated, axis=1))) if np.isfinite(stated).all() else None
    return {
        "error": short(np.median(error)),
        "ratio": short(np.exp(np.mean(ratio))),  # geometric mean of error / error of the last value
        "cosine": short(np.median(cosine)),
        "sign": short(np.mean(np.sign(value) == np.sign(truth))),
        "wins": short(np.mean(error < last) + 0.5 * np.mean(error == last)),
        "covered": cover(1.0),
        "covered_twice": cover(2.0),
        "covered_norm": whole,
        "accepted": short(np.mean([r["methods"][name].accepted for r in rows])),
    }


def short(x: Any) -> float:
    return float(f"{x:.4g}")


def brief(r: Row) -> list[Any]:
    """What the figure needs: tangents, and lr's h: true, last value, aged."""
    values = (r["truth"], r["last"], r["methods"]["aged"].value)
    return [r["tangents"], *(float(f"{x[0]:.3g}") for x in values)]


# ---- the page --------------------------------------------------------------------------------------------------------

REFERENCE = (  # of the issue: case, group, tangents, tau, last value, best so far
    ("full batch, reset, tau 50", "full", "reset", 50, 0.80, 0.40),
    ("full batch, reset, tau 100", "full", "reset", 100, 0.62, 0.26),
    ("batches of 32, reset, tau 50", "mini", "reset", 50, 0.98, 0.88),
    ("batches of 32, reset, tau 100", "mini", "reset", 100, 0.81, 0.74),
    ("full batch, cumulative, 450 to 500", "full", "late", 50, 0.22, 0.08),
    ("batches of 32, cumulative, 450 to 500", "mini", "late", 50, 0.95, 0.40),
)
SHOWN = ("last", "aged", "auto", "law", "dmd", "robust", "affine", "rre", "aitken", "paper's rule", "PyDMD")


def cell(record: Row, group: str, tangents: str, tau: int) -> Row | None:
    if tangents == "late":
        found: Row | None = record["results"].get("late", {}).get(group)
        return found
    same = lambda c: (c["group"], c["tangents"], c["tau"]) == (group, tangents, tau)
    return next((c for c in record["results"]["cells"] if same(c)), None)


def reference(record: Row) -> str:
    """The table of the issue beside what is measured here."""
    heads = ("case", "last value, then", "best, then", "last value", "aged", "wins of aged", "best here", "which")
    rows = []
    for label, group, tangents, tau, last, best in REFERENCE:
        c = cell(record, group, tangents, tau)
        if c:
            found = {name: s["error"] for name, s in c["methods"].items()}
            name = min(found, key=found.__getitem__)
            wins = percent(c["methods"]["aged"]["wins"])
            rows.append((label, last, best, found["last"], found["aged"], wins, found[name], name))
    rule = record["results"]["reset"]["methods"].get("paper's rule")
    said = f"\n\nThe paper's rule, reset, all windows: {number(rule['error'])} (1.00 then)." if rule else ""
    return table(heads, rows) + said


def every_cell(record: Row) -> str:
    """Median relative errors, a line a cell."""
    names = [n for n in SHOWN if n in record["results"]["all"]["methods"]]
    rows = [
        (cases.GROUPS[c["group"]].label, c["tangents"], str(c["tau"]), *bold([c["methods"][n]["error"] for n in names]))
        for c in record["results"]["cells"]
    ]
    return table(("problem", "tangents", "tau", *names), rows)


def bold(errors: list[float]) -> list[str]:
    """As text, the least one bold."""
    least = min(errors)
    return [f"**{number(e)}**" if e == least else number(e) for e in errors]


def every_method(record: Row) -> str:
    """All windows together, a line a method."""
    heads = ("method", "error, reset", "error, cumulative", "error / last value's", "cosine", "signs", "wins", "1x", "2x")
    results = record["results"]
    rows = []
    for name, s in sorted(results["all"]["methods"].items(), key=lambda item: item[1]["ratio"]):
        errors = [results[t]["methods"][name]["error"] for t in ("reset", "cumulative")]
        shares = [percent(s[k]) for k in ("sign", "wins", "covered", "covered_twice")]
        rows.append((name, *errors, s["ratio"], s["cosine"], *shares))
    return table(heads, rows)


def bars(record: Row) -> str:
    """Which of the goals are reached, in sentences."""
    cells = record["results"]["cells"]
    whole = record["results"]["all"]["methods"]
    less = lambda name: [c for c in cells if c["methods"][name]["error"] < c["methods"]["last"]["error"]]
    missed = {name: gathered([c for c in cells if c not in less(name)]) for name in ("aged", "auto")}
    held = [c for c in cells if c["methods"]["aged"]["covered"] >= 0.8]
    low = sorted({cases.GROUPS[c["group"]].label for c in cells if c not in held})
    lines = [
        f"Over {record['results']['all']['windows']} windows of {record['results']['runs']} runs ({record['tier']} tier"
        + ("):" if record["data"] else "; without MNIST and KMNIST, which were not given):"),
        "",
        f"- The median relative error of **aged** is below the last value's in {len(less('aged'))} of {len(cells)} cells "
        f"(**auto**: {len(less('auto'))}); window by window it is {number(whole['aged']['ratio'])} of the last value's in "
        f"the geometric mean (**auto**: {number(whole['auto']['ratio'])}).",
        f"- Not below it: aged in {missed['aged']}.",
        f"- Nor auto in: {missed['auto']}.",
        f"- The error that **aged** states holds the truth in {percent(whole['aged']['covered'])} of all coordinates "
        f"({percent(whole['aged']['covered_norm'])} of the windows by norm), that of **auto** in "
        f"{percent(whole['auto']['covered'])}. At least 80 % in {len(held)} of {len(cells)} cells; less in cells of: "
        f"{'; '.join(low) or 'none'}.",
    ]
    return "\n".join(lines)


def gathered(cells: list[Row]) -> str:
    """Cells by problem, in words."""
    parts: dict[str, list[str]] = {}
    for c in cells:
        parts.setdefault(cases.GROUPS[c["group"]].label, []).append(f"{c['tangents']} {c['tau']}")
    return "; ".join(f"{label} ({', '.join(part)})" for label, part in parts.items()) or "none"


def scatter(record: Row) -> Any:
    """h of lr, predicted against true: last value and aged."""
    from koopman_hpo_adapters.plot import BLUE, GREY, ORANGE

    from .page import canvas

    figure, axes = canvas(9.2, 3.9, 1, 2, sharey=True)
    for ax, tangents in zip(axes[0], ("reset", "cumulative"), strict=True):
        part = [w[1:] for w in record["results"]["windows"] if w[0] == tangents]
        true, last, value = np.array(part).T
        ax.plot([-10, 0, 10], [-10, 0, 10], color=GREY, lw=0.8)
        ax.plot(true, last, "o", ms=2.6, color=ORANGE, mew=0, alpha=0.55, label="last value")
        ax.plot(true, value, "o", ms=2.6, color=BLUE, mew=0, alpha=0.55, label="aged")
        ax.set_xscale("symlog", linthresh=1e-3)
        ax.set_yscale("symlog", linthresh=1e-3)
        ticks = (-10, -0.1, 0, 0.1, 10)
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.set_yticks(ticks, [f"{x:g}" for x in ticks])
        ax.set(xlabel="true, at step 1,000", title=f"{tangents} tangents", xlim=(-10, 10), ylim=(-10, 10))
    axes[0][0].set_ylabel("∂ validation loss / ∂ log lr, predicted")
    axes[0][0].legend(loc="upper left", markerscale=1.8)
    return figure


BLOCKS = {
    "estimates.bars": bars,
    "estimates.reference": reference,
    "estimates.methods": every_method,
    "estimates.cells": every_cell,
}
FIGURES = {"evidence_estimates.png": scatter}
