"""Makes the pictures of the README: docs/images/glocal.png (seconds) and docs/images/demo.png (`koopman-hpo demo`).

python docs/make_images.py [glocal] [demo]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from koopman_hpo_adapters.numpy import softmax_regression
from koopman_hpo_adapters.plot import BLUE, GREY, INK, ORANGE, STYLE
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from koopman_hpo import Space, cli, inner, koopman, log, logit, trajectory

IMAGES = Path(__file__).parent / "images"
WINDOW, STEPS = 80, 600


def digits(seed=0):
    """200 training and 500 validation digits, scaled."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X = (X - X.mean()) / X.std()
    train, val = order[:200], order[200:700]
    return (X[train], y[train]), (X[val], y[val])


def hypergradients():
    """(STEPS, 2) exact hypergradients of l2 and lr after every step of full-batch softmax regression."""
    train, val = digits()
    space = Space(l2=log(0.05), lr=log(0.03), momentum=logit(0.5))
    return trajectory(inner.sgd(softmax_regression(64, 10), space), [train] * STEPS, val)[:, :2]


def draw(ax, h, name):
    """One trajectory (STEPS,): what a window sees, what it forecasts, what is true."""
    ahead = np.arange(0, STEPS - WINDOW + 1, 5)
    model = koopman.fit(h[:WINDOW, None])
    forecast = model.forecast(ahead)[:, 0]
    error = 2 * np.array([model.error(int(k))[0] for k in ahead])
    ax.axvspan(0, WINDOW, color="#F0F0F0", lw=0, zorder=0)
    ax.axhline(0, color=GREY, lw=0.8, zorder=1)
    ax.plot([WINDOW, STEPS], [h[WINDOW - 1]] * 2, color=ORANGE, lw=1.4, ls=(0, (4, 2)), zorder=2)
    ax.plot(np.arange(1, STEPS + 1), h, color="#A0A0A0", lw=4, solid_capstyle="round", zorder=2)
    ax.fill_between(WINDOW + ahead, forecast - error, forecast + error, color=BLUE, alpha=0.22, lw=0, zorder=3)
    ax.plot(WINDOW + ahead, forecast, color=BLUE, lw=1.8, zorder=4)
    ax.plot(np.arange(1, WINDOW + 1), h[:WINDOW], color=INK, lw=2.2, zorder=4)
    ends = (
        ("local", WINDOW, h[WINDOW - 1], ORANGE, "o"),
        ("global", STEPS, h[-1], GREY, "s"),
        ("glocal", STEPS, forecast[-1], BLUE, "o"),
    )
    for label, t, value, colour, marker in ends:
        size = 9 if label == "global" else 6
        ax.plot(t, value, marker, color=colour, ms=size, mec="white", mew=1, ls="", label=label, zorder=5, clip_on=False)
    ax.set(xlim=(0, STEPS + 8), xlabel="inner steps", ylabel=f"∂ validation loss / ∂ log {name}")


def glocal():
    H = hypergradients()
    with rc_context(STYLE):
        fig = Figure(figsize=(9.2, 3.5), layout="constrained")
        fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.06)
        left, right = fig.subplots(1, 2)
        draw(left, H[:, 0], "l2")
        draw(right, H[:, 1], "lr")
        left.set_title("l2, in the loss: settles")
        right.set_title("lr, in the optimizer: fades")
        left.annotate("window", (WINDOW / 2, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", color=GREY)
        look = {"labelspacing": 0.5, "handlelength": 1.8, "borderaxespad": 0.3}
        left.legend(handles=_legend(), loc="lower right", bbox_to_anchor=(1, 0.12), **look)
        fig.savefig(IMAGES / "glocal.png", dpi=200)


def _legend():
    from matplotlib.lines import Line2D

    edge = {"mec": "white", "mew": 1}
    local = {"color": ORANGE, "lw": 1.4, "ls": (0, (4, 2)), "marker": "o", "ms": 6}
    glocal = {"color": BLUE, "lw": 1.8, "marker": "o", "ms": 6}
    truth = {"color": "#A0A0A0", "lw": 4, "marker": "s", "ms": 9, "mfc": GREY}
    return [
        Line2D([], [], label="local: the window's last value", **local, **edge),
        Line2D([], [], label="glocal: the window, carried on (± 2 errors)", **glocal, **edge),
        Line2D([], [], label="global: the truth, after full training", **truth, **edge),
    ]


def demo():
    with tempfile.TemporaryDirectory() as folder:
        cli.main(["demo", "--out", folder])
        shutil.copy(Path(folder) / "demo.png", IMAGES / "demo.png")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ("glocal", "demo"):
        {"glocal": glocal, "demo": demo}[name]()
