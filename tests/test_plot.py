"""Pictures of a history: drawn for every kind of run, and saying what is in it."""

import subprocess
import sys

import numpy as np
import pytest
from koopman_hpo_adapters import plot
from koopman_hpo_adapters.numpy import mlp
from matplotlib.figure import Figure

from koopman_hpo import Glocal, History, Local, ShapeError, Space, Tuner, identity, inner, log, logit
from koopman_hpo.history import Record

RNG = np.random.default_rng(0)
BATCH = RNG.normal(size=(20, 4)), RNG.integers(0, 3, 20)


def tuned(space, strategy=None, steps=100, **settings):
    run = inner.sgd(mlp((4, 5, 3)), space)
    with np.errstate(all="ignore"):
        return Tuner(run, strategy or Glocal(), steps=steps, **settings).fit([BATCH], [BATCH]).history


SPACES = {
    "one": Space(lr=log(0.1)),
    "three": Space(lr=log(0.1), momentum=logit(0.9), l2=log(1e-3)),
    "many": Space(lr=log(np.full((5, 2), 0.1), knots=range(0, 100, 20)), l2=log([1e-3, 1e-4])),
    "identity": Space(lr=identity(0.1, bounds=(1e-3, 1.0)), momentum=logit(0.3)),
}


def texts(fig):
    return [ax.get_title(loc="left") for ax in fig.axes] + [ax.get_ylabel() for ax in fig.axes]


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("strategy", [Glocal(), Local()], ids=["glocal", "local"])
def test_draws_any_run(name, strategy, tmp_path):
    space = SPACES[name]
    history = tuned(space, strategy)
    fig = plot.figure(history)
    fig.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert sum("Hypergradient" in t for t in texts(fig)) == min(3, space.q)


def test_axes_are_natural_where_all_values_fit_a_log_axis():
    seen = texts(plot.figure(tuned(SPACES["three"])))
    assert "value" in seen
    assert "∂ loss / ∂ logit momentum" in seen
    seen = texts(plot.figure(tuned(SPACES["identity"])))
    assert "change of phi" in seen
    assert "∂ loss / ∂ lr" in seen


def test_rolled_back_windows_are_marked_and_not_finite_values_left_out(tmp_path):
    history = tuned(Space(lr=log(1e3)), Local(), window=10)
    assert (history.event != "").any()
    fig = plot.figure(history)
    fig.savefig(tmp_path / "run.png")
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert "guard" in labels


def test_comparison_curves_and_what_lies_behind_them(tmp_path):
    history = tuned(SPACES["one"])
    steps = np.arange(1, 5)
    curves = {"fixed": (steps, np.full(4, 2.0)), "tuned": (steps, np.array([2.0, 1.0, 0.5, np.inf]))}
    fig = plot.figure(history, curves=curves, background=[(steps, np.array([3.0, np.nan, 1e9, 0.2]))], behind="1 random")
    fig.savefig(tmp_path / "run.png")
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert {"fixed", "tuned", "1 random"} <= set(labels)
    assert fig.axes[0].get_ylim()[1] < 10


def test_an_empty_history_is_refused():
    with pytest.raises(ShapeError, match="no window"):
        plot.figure(History(("lr",)))


@pytest.mark.parametrize("history", [None, History(()), []])
def test_what_is_no_history_of_coordinates_is_refused(history):
    if isinstance(history, History):
        history.append(record(np.empty(0)))
    with pytest.raises(ShapeError, match=r"must be a History|no coordinate"):
        plot.figure(history)


def record(x, step=1):
    """Of a window in which everything is x (q,)."""
    value = float(x[0]) if x.size else 0.0
    return Record(step, step, x, x, x, x, x, x, value, value, True, "last", "", "")


@pytest.mark.parametrize("transform", ["log", "logit", "identity"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-320, 0.0])
def test_values_that_no_axis_could_hold_are_left_out(value, transform, tmp_path):
    history = History(("a", "b"), (transform, transform))
    for step in (25, 50):
        history.append(record(np.array([value, 1.0]), step))
    for step in range(1, 51):
        history.observe(step, np.array([value, np.sin(step)]))
    plot.figure(history, background=[([1, 2], [value, value])]).savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "curves", [None, {"a": 5}, {"a": ([1, 2], [1.0])}, {"a": (["x"], [1.0])}, {"a": ([1], [1.0], [1.0])}]
)
def test_a_curve_that_is_none_is_refused(curves):
    with pytest.raises(ShapeError, match=r"plot\.losses: curve"):
        plot.losses(Figure().subplots(), curves)


def test_losses_at_or_below_zero_take_a_linear_axis():
    ax = Figure().subplots()
    plot.losses(ax, {"a": ([1, 2], [1.0, -1.0])})
    assert ax.get_yscale() == "linear"


def test_names_at_the_line_ends_do_not_overlap():
    ax = Figure().subplots()
    ax.plot([0, 1], [0, 1])
    plot._name_ends(ax, ["a", "b", "c"], [0.5, 0.5, 0.51], ["k"] * 3)
    places = sorted(text.get_position()[1] for text in ax.texts)
    assert np.diff(places).min() > 0.08


def test_leaves_pyplot_and_the_users_style_alone():
    code = (
        "import matplotlib as m, sys; settings = lambda: {k: v for k, v in m.rcParams.copy().items() if k != 'backend'}; "
        "before = settings(); import koopman_hpo_adapters.plot; assert settings() == before; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
