"""The open questions on the page: a figure and a sentence or two with the numbers, each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from koopman_hpo_adapters.plot import BLUE, GREEN, GREY, INK, ORANGE, PURPLE

from .page import canvas, number

Row = dict[str, Any]
LINES = {"last": (ORANGE, "last value"), "auto": (GREEN, "auto, age unknown"), "aged": (BLUE, "aged")}
PARTS = {"full, reset": BLUE, "full, cumulative": GREEN, "mini, reset": ORANGE, "mini, cumulative": PURPLE}


def fits(record: Row, name: str) -> Row:
    return record["results"]["fits"][name]


def against(name: str, label: str) -> Callable[[Row], Any]:
    """Error of a fit with one setting fixed, in four parts, beside BIC's choice and the aged (marks at the right)."""

    def draw(record: Row) -> Any:
        figure, axes = canvas(6.4, 3.3)
        ax = axes[0][0]
        for part, colour in PARTS.items():
            found = fits(record, name)[part]
            xs = [int(k) for k in found if k.isdigit()]
            ax.plot(xs, [found[str(x)] for x in xs], "o-", ms=4, color=colour, label=part.replace("mini", "batches of 32"))
            end = max(xs)
            ax.plot([1.08 * end], [found["bic"]], "_", ms=11, mew=2, color=colour)
            ax.plot([1.17 * end], [found["aged"]], "*", ms=8, color=colour)
            ax.axhline(found["last"], color=colour, lw=0.7, ls=(0, (1, 3)))
        ax.set(xlabel=label, ylabel="median relative error", yscale="log")
        decimals(ax.yaxis)
        figure.legend(loc="outside upper center", ncols=4, fontsize=8)
        return figure

    return draw


def dots(pick: Callable[[Row], dict[str, dict[str, float]]]) -> Callable[[Row], Any]:
    """A line of dots for each key, one dot a part."""

    def draw(record: Row) -> Any:
        found = pick(record)
        keys = list(next(iter(found.values())))
        figure, axes = canvas(6.8, 0.36 * len(keys) + 1.3)
        ax = axes[0][0]
        for part, values in found.items():
            colour, name = LINES.get(part) or (PARTS[part], part.replace("mini", "batches of 32"))
            ax.plot([values[k] for k in keys], range(len(keys)), "o", ms=7, color=colour, label=name)
        ax.axvline(1.0, color=GREY, lw=0.8)
        ax.set(xlabel="median relative error", xscale="log", yticks=range(len(keys)), yticklabels=keys)
        decimals(ax.xaxis)
        ax.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=len(found), fontsize=8)
        return figure

    return draw


def decimals(axis: Any) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def transposed(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {k: {name: values[k] for name, values in found.items()} for k in next(iter(found.values()))}


def moduli(record: Row) -> Any:
    """How many fitted eigenvalues lie where, and what counting which of them costs."""
    figure, axes = canvas(6.4, 3.0)
    ax, edges = axes[0][0], np.linspace(0.5, 1.0, 26)
    for part, colour in PARTS.items():
        counts = np.array(fits(record, "moduli")[part], float)
        ax.stairs(counts / max(counts.sum(), 1), edges, color=colour, lw=1.6, label=part.replace("mini", "batches of 32"))
    ax.set(xlabel="modulus of a fitted eigenvalue", ylabel="share")
    ax.legend(loc="upper left", fontsize=8)
    return figure


def swept(rows: Callable[[Row], dict[str, list[Row]]], name: str, label: str) -> Callable[[Row], Any]:
    """Errors of the judges as one thing changes, reset above, cumulative below; a column each."""

    def draw(record: Row) -> Any:
        found = rows(record)
        figure, axes = canvas(7.6, 4.6, 2, len(found), sharex=True, sharey="row")
        for column, (title, part) in enumerate(found.items()):
            xs = [800 if r[name] is None else r[name] for r in part]
            for row, tangents in enumerate(("reset", "cumulative")):
                ax = axes[row][column]
                for judge, (colour, text) in LINES.items():
                    ys = [r[tangents][judge] if tangents in r else np.nan for r in part]
                    ax.plot(xs, ys, "o-", ms=3.5, color=colour, label=text)
                ax.axhline(1.0, color=GREY, lw=0.8)
                ax.set(xscale="log", yscale="log", title=f"{title}, {tangents}")
                decimals(ax.yaxis)
            axes[1][column].set_xlabel(label)
        axes[0][0].set_ylabel("relative error")
        axes[1][0].set_ylabel("relative error")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
        return figure

    return draw


def explosions(record: Row) -> Any:
    """The exact h of lr, its forecast, and the slope of the loss over a tenth of lr."""
    rows = record["results"]["explosions"]
    figure, axes = canvas(6.4, 3.3)
    ax = axes[0][0]
    looks = {"exact": (INK, "o", "exact h at step 300"), "aged": (BLUE, "s", "aged, from step 100")}
    looks["slope"] = (ORANGE, "_", "slope of the loss over ± 10 % of lr")
    for i, (key, (colour, mark, label)) in enumerate(looks.items()):
        points = [(r["lr"] * 1.12 ** (i - 1), abs(r[key])) for r in rows if r[key] is not None]
        size, width = (9, 2) if mark == "_" else (4.5, 0)
        ax.plot(*zip(*points, strict=True), mark, ms=size, mew=width, color=colour, label=label)
    ax.set(xscale="log", yscale="log", xlabel="learning rate, momentum 0.9", ylabel="|∂ validation loss / ∂ log lr|")
    ax.legend(fontsize=8)
    return figure


# ---- sentences -------------------------------------------------------------------------------------------------------


def best(found: dict[str, float]) -> tuple[str, float]:
    ranked = {k: v for k, v in found.items() if k.isdigit()}
    key = min(ranked, key=ranked.__getitem__)
    return key, ranked[key]


def setting(name: str, what: str) -> Callable[[Row], str]:
    def say(record: Row) -> str:
        lines = []
        for part, found in fits(record, name).items():
            key, least = best(found)
            bic, aged, last = (number(found[k]) for k in ("bic", "aged", "last"))
            others = f"by BIC {bic}; aged {aged}; last value {last}"
            lines.append(
                f"{part.replace('mini', 'batches of 32')}: best {what} in hindsight {key}, error {number(least)}; {others}"
            )
        return "\n".join(f"- {line}." for line in lines)

    return say


def losses(record: Row) -> str:
    found = record["results"]["losses"]
    parts = [
        f"{part.replace('mini', 'batches of 32')} {number(e['h and losses'])} instead of {number(e['h'])}"
        for part, e in found.items()
    ]
    return f"Training and validation loss as two coordinates more, softmax regression: {'; '.join(parts)}."


def modes(record: Row) -> str:
    found = fits(record, "modes")
    reset, cumulative = found["full, reset"], found["full, cumulative"]
    published, every = "near 1 only, as published", "all modes, bounded"
    return (
        f"In full batch the published rule has a median error of {number(reset[published])} (reset) and "
        f"{number(cumulative[published])} (cumulative); all modes, each counted as lambda^k, {number(reset[every])} and "
        f"{number(cumulative[every])}. Left nearly free to grow they give {number(reset['all modes, nearly free'])} and "
        f"{number(cumulative['all modes, nearly free'])}."
    )


def blown(record: Row) -> str:
    rows = [r for r in record["results"]["explosions"] if None not in (r["exact"], r["slope"])]
    off = [r for r in rows if np.sign(r["exact"]) != np.sign(r["slope"]) or abs(r["exact"]) > 10 * abs(r["slope"])]
    least = min((r["lr"] for r in off), default=None)
    return (
        f"Of {len(rows)} runs whose loss stays finite, in {len(off)} the exact hypergradient points against the slope of "
        f"the loss over a tenth of lr, or is more than ten times as large"
        + (f"; the first at lr {least:g}." if least is not None else ".")
    )


def changed(record: Row) -> str:
    found = record["results"]["changes"]
    say = lambda name: f"{number(found[name]['aged'])} (last value {number(found[name]['last'])})"
    return (
        f"Error of **aged**: {say('nothing')} if nothing changes, {say('lr falls to a tenth')} where lr falls to a "
        f"tenth, {say('new data')} where the data change."
    )


BLOCKS = {
    "questions.rank": setting("rank", "rank"),
    "questions.delays": setting("delays", "number of delays"),
    "questions.losses": losses,
    "questions.modes": modes,
    "questions.changes": changed,
    "questions.explosions": blown,
}
FIGURES = {
    "evidence_rank.png": against("rank", "rank, delays held at 12"),
    "evidence_delays.png": against("delays", "delays, rank by BIC"),
    "evidence_observables.png": dots(lambda r: fits(r, "observables")),
    "evidence_moduli.png": moduli,
    "evidence_modes.png": dots(lambda r: fits(r, "modes")),
    "evidence_rates.png": swept(
        lambda r: {label: r["results"]["rates"][k] for k, label in (("full", "full batch"), ("mini", "batches of 32"))},
        "lr",
        "learning rate",
    ),
    "evidence_noise.png": swept(lambda r: {"softmax": r["results"]["sizes"]}, "size", "batch size (800: full batch)"),
    "evidence_changes.png": dots(lambda r: transposed(r["results"]["changes"])),
    "evidence_explosion.png": explosions,
}
