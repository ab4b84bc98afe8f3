"""Pictures of a run (extra `plot`): each function draws one thing from a `History` onto matplotlib axes.

    figure(result.history).savefig("run.png", dpi=200)

Hyperparameters are drawn in natural values where all of them are log or logit, else in phi.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError("koopman_hpo_adapters.plot needs matplotlib: pip install 'koopman-hpo[plot]'.") from error

from koopman_hpo import History, ShapeError, koopman
from koopman_hpo.errors import reals

__all__ = ["STYLE", "eigenvalues", "figure", "hypergradient", "hyperparameters", "largest", "losses"]

Array = NDArray[Any]
Curve = tuple[Any, Any]  # inner steps (n,), values (n,)

# Okabe and Ito's palette: distinct to the colour-blind, too
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#777777", "#C8C8C8"
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)

STYLE = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "savefig.facecolor": "white",
}
_SECOND: tuple[dict[str, Any], ...] = (
    {"color": INK, "lw": 1.6},
    {"color": ORANGE, "lw": 1.6, "ls": (0, (3, 1.5))},
    {"color": RED, "lw": 1.6, "ls": (0, (1, 1))},
)
MOST = 1e150  # larger values, and positive ones below 1 / MOST, are no matter for an axis
PANELS = 3  # hypergradients shown
LEAST = 10  # snapshots that a window needs for its eigenvalues to mean something


class _Shown(NamedTuple):
    """A coordinate as it is drawn."""

    label: str
    values: Array  # (windows,)


def figure(
    history: History,
    *,
    curves: Mapping[str, Curve] | None = None,
    background: Sequence[Curve] = (),
    behind: str = "",
) -> Figure:
    """Losses, hyperparameters and eigenvalues above; below, the (at most three) largest hypergradients.

    Args:
      history: of the run; its own validation loss is drawn where no curves are given.
      curves, background, behind: as in `losses`.

    Returns:
      A matplotlib `Figure`, 10.4 by 6.2 inches, not registered with pyplot.

    Raises:
      ShapeError: no `History`, or one without a window or a coordinate.
    """
    if not isinstance(history, History):
        raise ShapeError(f"plot.figure: the first argument must be a History, got {type(history).__name__}.")
    if not len(history) or not history.labels:
        lacks = "window" if not len(history) else "coordinate"
        raise ShapeError(f"plot.figure: the history holds no {lacks}. Run the tuner for at least one window first.")
    with rc_context(STYLE):
        fig: Any = Figure(figsize=(10.4, 6.6), layout="constrained")
        fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.05)
        top, bottom = fig.subfigures(2, 1)
        left, middle, right = top.subplots(1, 3)
        losses(left, curves or {"validation": (history.step, history.value)}, background, behind)
        _mark_events(left, history)
        hyperparameters(middle, history)
        eigenvalues(right, history)
        shown = largest(history, PANELS)
        below = bottom.subplots(1, len(shown), squeeze=False)[0]
        for ax, j in zip(below, shown, strict=True):
            hypergradient(ax, history, j)
        bottom.legend(handles=_keys(), loc="outside lower center", ncols=2, handletextpad=0.6)
    return fig


def losses(ax: Any, curves: Mapping[str, Curve], background: Sequence[Curve] = (), behind: str = "") -> None:
    """Outer losses over inner steps, on a log axis where they are positive.

    Args:
      ax: matplotlib axes.
      curves: `{name: (steps (n,), values (n,))}`.
      background: curves drawn pale behind them, named together by `behind`.

    Raises:
      ShapeError: curves are no dict, or one of them is no pair of numbers (n,), (n,).
    """
    if not isinstance(curves, Mapping):
        raise ShapeError(f"plot.losses: curves must be a dict {{name: (steps, values)}}, got {type(curves).__name__}.")
    curves = {str(name): _curve(name, curve) for name, curve in curves.items()}
    background = [_curve("background", curve) for curve in background]
    seen = np.concatenate([y[np.isfinite(y)] for _, y in curves.values()])
    top = 1.15 * seen.max(initial=0)
    for i, (x, y) in enumerate(background):
        ax.plot(x, np.where(y <= top, y, np.nan), color=PALE, lw=0.8, label=behind if i == 0 else None)
    for i, (name, (x, y)) in enumerate(curves.items()):
        main = i == len(curves) - 1
        look = {"color": BLUE, "lw": 2.6} if main else _SECOND[i % len(_SECOND)]
        ax.plot(x, y, label=name, zorder=2 if main else 3, **look)
    if seen.size and seen.min() > 0:
        low = min([seen.min(initial=1), *(y[y > 0].min(initial=1) for _, y in background)])
        ax.set_yscale("log")
        room = 0.22 if len(curves) > 1 else 0.0  # for the legend
        ax.set_ylim(low / 1.3, top * (top / low) ** room)
        if top / low < 30:  # less than two decades: plain numbers, some between the powers of ten
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
    ax.set(title="Validation loss", xlabel="inner steps", ylabel="loss per example")
    _steps_axis(ax)
    if len(curves) > 1 or background:
        _legend(ax)


def hyperparameters(ax: Any, history: History) -> None:
    """Hyperparameters over inner steps: natural values on a log axis (1 - x for a fraction near one), else phi."""
    shown = _natural(history)
    if shown is None:
        phi = _drawable(history.phi)
        moved = phi - phi[0]
        shown = [_Shown(label, moved[:, j]) for j, label in enumerate(history.labels)]
        ax.set_ylabel("change of phi")
    else:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylabel("value")
    colours = [_colour(history.labels, j) for j in range(len(shown))]
    for (_, values), colour in zip(shown, colours, strict=True):
        ax.plot(history.step, values, color=colour, lw=1.8 if len(shown) <= len(COLOURS) else 1.0)
    _name_ends(ax, *_ends(shown, colours))
    ax.set(title="Hyperparameters", xlabel="inner steps")
    _steps_axis(ax)


def hypergradient(ax: Any, history: History, j: int) -> None:
    """Hypergradient j as recorded, and each window's estimate of its value at the end of training, with its error."""
    label = history.labels[j]
    colour = _colour(history.labels, j)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.plot(history.trajectory_step, _drawable(history.trajectory[:, j]), color="#A8A8A8", lw=1.5, zorder=2)
    h, estimate = _drawable(history.h[:, j]), _drawable(history.estimate[:, j])
    used = np.isfinite(estimate) & (history.event == "")
    error = np.nan_to_num(_drawable(history.error[used, j]))
    bars = ax.errorbar(
        history.step[used],
        estimate[used],
        error,
        fmt="o",
        ms=2.6,
        lw=0.9,
        color=colour,
        zorder=3,
    )
    bars[0].set_markeredgewidth(0)
    size = max(np.abs(np.nan_to_num(h[used])).max(initial=0), np.abs(estimate[used]).max(initial=0))
    if size > 1 / MOST:
        linear = 10.0 ** np.floor(np.log10(size) - 2)
        ax.set_yscale("symlog", linthresh=linear, linscale=0.6)
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set(title=f"Hypergradient: {label}", xlabel="inner steps", ylabel=_derivative(label, history.transforms[j]))
    ax.get_ylim()  # brings the limits up to date
    zero = ax.transAxes.inverted().transform(ax.transData.transform((0, 0)))[1]
    for word, side, align, room in (("lower it", 5, "bottom", 1 - zero), ("raise it", -5, "top", zero)):
        if room > 0.25:
            place = {"xycoords": ax.get_yaxis_transform(), "xytext": (3, side), "textcoords": "offset points"}
            ax.annotate(word, (1, 0), **place, va=align, rotation=90, color=GREY, fontsize=8.5)
    _steps_axis(ax)


def eigenvalues(ax: Any, history: History) -> None:
    """Koopman eigenvalues of every window's trajectory in the unit circle, a window's colour its place in training."""
    found = list(_spectra(history))
    turn = np.linspace(0, 2 * np.pi, 400)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, lw=0.9, zorder=1)
    ax.axhline(0, color="#ECECEC", lw=0.8, zorder=0)
    ax.axvline(0, color="#ECECEC", lw=0.8, zorder=0)
    ax.grid(False)
    if found:
        step = np.concatenate([np.full(len(lam), s) for s, lam in found])
        lam = np.concatenate([lam for _, lam in found])
        dots = ax.scatter(lam.real, lam.imag, c=step, cmap="viridis", s=13, lw=0, alpha=0.85, zorder=2)
        colours = ax.figure.colorbar(dots, ax=ax, fraction=0.05, pad=0.04, aspect=28, label="inner steps")
        colours.outline.set_visible(False)
        colours.locator = MaxNLocator(4, integer=True)
        colours.update_ticks()
    else:
        ax.text(0, 0, "windows too short\nfor a fit", ha="center", va="center", color=GREY)
    left = min([lam.real.min() for _, lam in found], default=-1.0)
    ax.set(xlim=(min(-0.15, max(-1.0, left) - 0.15), 1.12), ylim=(-1.12, 1.12), aspect="equal", yticks=(-1, 0, 1))
    ax.set(title="Koopman eigenvalues", xlabel="real part (per snapshot)", ylabel="imaginary part")


# -- parts -------------------------------------------------------------------------------------------------------------


def _spectra(history: History) -> Iterable[tuple[int, Array]]:
    """(step, eigenvalues) of every window with enough snapshots, each coordinate in its standard deviations."""
    start, at = 0, history.trajectory_step
    for end in history.step:
        H = _drawable(history.trajectory[(at > start) & (at <= end)])
        start = end
        if len(H) < LEAST or np.isnan(H).any():
            continue
        scale = H.std(axis=0)
        moving = scale > 1e-12 * np.abs(H).max(axis=0)
        if moving.any():
            yield int(end), koopman.fit(H[:, moving] / scale[moving]).eigenvalues


def _natural(history: History) -> list[_Shown] | None:
    """Coordinates in natural values, all of them fit for a log axis; None where that cannot be."""
    if not set(history.transforms) <= {"log", "logit"}:
        return None
    shown = []
    for label, transform, x in zip(history.labels, history.transforms, _drawable(history.natural.T), strict=True):
        near_one = transform == "logit" and x[0] >= 0.5
        values = 1 - x if near_one else x
        shown.append(_Shown(f"1 - {label}" if near_one else label, np.where(values > 1 / MOST, values, np.nan)))
    return shown


def _drawable(y: Any) -> Array:
    """`y` as floats, NaN where an axis could not hold it; NaN is left out of a line."""
    y = np.asarray(y, float)
    return np.where(np.abs(y) < MOST, y, np.nan)


def _curve(name: Any, curve: Any) -> Curve:
    """Steps (n,) and values (n,) as they are drawn."""
    parts = tuple(curve) if isinstance(curve, Iterable) else ()
    arrays = [reals("plot.losses", f"curve {name!r}", part) for part in parts]
    if len(arrays) != 2 or arrays[0].ndim != 1 or arrays[0].shape != arrays[1].shape:
        raise ShapeError(
            f"plot.losses: curve {name!r} must be (steps (n,), values (n,)), got shapes {[a.shape for a in arrays]}."
        )
    return parts[0], _drawable(arrays[1])


def _derivative(label: str, transform: str) -> str:
    """The hypergradient's unit in words."""
    return f"∂ loss / ∂ {label}" if transform == "identity" else f"∂ loss / ∂ {transform} {label}"


def largest(history: History, n: int) -> list[int]:
    """The n coordinates whose hypergradient is largest, in the order of the space."""
    size = np.abs(np.nan_to_num(_drawable(history.h))).mean(axis=0)
    return sorted(np.argsort(-size, kind="stable")[:n].tolist())


def _keys() -> list[Any]:
    """What lines and dots of the hypergradients are."""
    line = Line2D([], [], color="#A8A8A8", lw=1.5, label="recorded, step by step")
    dots = Line2D([], [], color=INK, marker="o", ms=3.5, lw=0, label="forecast for the end of training, and its error")
    return [line, dots]


def _mark_events(ax: Any, history: History) -> None:
    """A triangle on the axis for every window that the guard threw away or disbelieved."""
    events = history.step[history.event != ""]
    if events.size:
        where = ax.get_xaxis_transform()
        ax.plot(events, np.full(events.size, 0.025), "^", ms=4, color=RED, transform=where, label="guard")
        _legend(ax)


def _legend(ax: Any) -> None:
    ax.legend(loc="upper right", ncols=2, columnspacing=1.2, borderaxespad=0.2, labelspacing=0.3)


def _colour(labels: Sequence[str], j: int) -> str:
    """One a coordinate while they last; then one a name, its groups and knots alike."""
    if len(labels) <= len(COLOURS):
        return COLOURS[j]
    names = list(dict.fromkeys(_name(label) for label in labels))
    return COLOURS[names.index(_name(labels[j])) % len(COLOURS)]


def _name(label: str) -> str:
    """`l2` of `l2[1]@500`, `1 - momentum` of `1 - momentum@500`."""
    return re.split(r"[\[@]", label)[0]


def _ends(shown: Sequence[_Shown], colours: Sequence[str]) -> tuple[list[str], list[float], list[str]]:
    """Labels, last values and colours of what is named: every line, or where they are many every name once."""
    found: dict[str, tuple[list[float], str]] = {}
    for (label, values), colour in zip(shown, colours, strict=True):
        if np.isnan(values[-1]):
            continue
        key = label if len(shown) <= len(COLOURS) else _name(label)
        found.setdefault(key, ([], colour))[0].append(float(values[-1]))
    middles = [float(np.median(ends)) for ends, _ in found.values()]
    return list(found), middles, [colour for _, colour in found.values()]


def _name_ends(ax: Any, labels: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    """Name each line at its right end, names pushed apart where lines meet."""
    if not labels:
        return
    log = ax.get_yscale() == "log"
    y = np.log10(values) if log else np.asarray(values, float)
    low, high = np.log10(ax.get_ylim()) if log else ax.get_ylim()
    order, gap = np.argsort(y), 0.085 * (high - low)
    at = y.copy()
    for below, above in pairwise(order):
        at[above] = max(at[above], at[below] + gap)
    over = max(0.0, at.max() - (high - 0.3 * gap))
    for j, label in enumerate(labels):
        place = (at[j] - over - low) / (high - low)
        ax.text(1.02, place, label, color=colours[j], transform=ax.transAxes, va="center", clip_on=False)


def _steps_axis(ax: Any) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlim(left=0)
