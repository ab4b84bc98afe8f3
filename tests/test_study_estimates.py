"""The study of estimates: what it takes for the truth, how it judges, and how the page is filled."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest

from koopman_hpo import hypergradient

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
pytest.importorskip("sklearn")
from study import SECTIONS, answers, cases, estimates, forecasters, page, trajectories
from study.forecasters import Estimate, Window
from study.problems import Case, start

CASE = Case("ridge", 0.1, 10)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Trajectories of a horizon that a test can wait for."""
    monkeypatch.setattr(trajectories, "HORIZON", 160)
    monkeypatch.setattr(forecasters, "HORIZON", 160)
    monkeypatch.setattr(trajectories, "LATEST", 120)
    monkeypatch.setattr(forecasters, "CUMULATIVE_ENDS", (110, 120))
    monkeypatch.setattr(trajectories, "BEGINNINGS", (0, 40))
    return trajectories.trajectories(CASE, None, tmp_path)


def test_the_truth_is_the_exact_hypergradient_of_tangents_begun_where_the_window_says(short):
    s = start(CASE)
    want = hypergradient(s.run, [s.train] * 160, s.val).grad
    np.testing.assert_allclose(short[0].truth, want, rtol=1e-12)
    for t in range(40):
        s.run.step(s.run.space.phi0, s.batch(t), tangents=False)
    s.run.forget(0)
    for t in range(40, 160):
        s.run.step(s.run.space.phi0, s.batch(t))
    np.testing.assert_allclose(short[1].truth, s.run.hypergradient(s.val).grad, rtol=1e-12)


def test_the_truth_of_ridge_regression_is_its_closed_form():
    """Weights theta = (X'X / n + wd)^-1 X'y / n; d loss / d log wd = -wd gradient' (X'X / n + wd)^-1 theta."""
    s, wd = start(Case("ridge", 1.0, 10)), 1e-3
    (X, y), (V, v) = ((np.column_stack([X, np.ones(len(X))]), y[:, 0]) for X, y in (s.train, s.val))
    A = X.T @ X / len(y) + wd * np.eye(41)
    theta = np.linalg.solve(A, X.T @ y / len(y))
    gradient = V.T @ (V @ theta - v) / len(v)
    found = trajectories.trained(Case("ridge", 1.0, 10), None, 0).truth
    np.testing.assert_allclose(found[2], -wd * gradient @ np.linalg.solve(A, theta), rtol=1e-6)


def test_windows_hold_what_their_age_says(short):
    found = list(forecasters.windows("ridge", CASE, short))
    assert len(found) == 3 + 6 + 3
    s = start(CASE)
    every = []
    for t in range(120):
        s.run.step(s.run.space.phi0, s.batch(t))
        every.append(s.run.hypergradient(s.val).grad)
    for w in found:
        training, tangents = map(int, w.age)
        assert training - tangents == w.begun
        assert training + w.tau - 1 + w.steps == 160
        if w.begun == 0:
            np.testing.assert_allclose(w.H, every[training - 1 : training - 1 + w.tau], rtol=1e-12)


def test_a_cached_trajectory_is_the_one_that_was_made(short, tmp_path):
    again = trajectories.trajectories(CASE, None, tmp_path)
    np.testing.assert_array_equal(again[1].H, short[1].H)
    assert [one.begun for one in again] == [0, 40]


def rows(values, errors, truth=(3.0, 4.0), last=(3.0, 9.0)):
    return [
        {"truth": np.array(truth), "last": np.array(last), "methods": {"m": Estimate(np.array(v), np.array(e), True)}}
        for v, e in zip(values, errors, strict=True)
    ]


def test_a_summary_counts_what_it_says():
    found = estimates.summary(rows([(3.0, 4.0), (0.0, 0.0), (3.0, 9.0)], [(0.1, 0.1), (3.0, 1.0), (0.1, 2.6)]), "m")
    assert found["error"] == 1.0  # of 0, 1, 1
    assert found["wins"] == pytest.approx((1 + 0 + 2 * 0.5) / 3, abs=1e-3)  # one better, two alike
    assert found["sign"] == pytest.approx(4 / 6, abs=1e-3)
    assert found["covered"] == pytest.approx(4 / 6, abs=1e-3)
    assert found["covered_twice"] == pytest.approx(5 / 6, abs=1e-3)


def test_the_page_says_which_goals_are_reached_and_what_is_left_out():
    summary = lambda error, covered: {"error": error, "ratio": error, "covered": covered, "covered_norm": covered}
    methods = {"last": summary(1.0, 0.1), "aged": summary(0.5, 0.9), "auto": summary(1.5, 0.2)}
    worse = methods | {"aged": summary(1.25, 0.5)}
    cells = [
        {"group": "full", "tangents": "reset", "tau": 20, "methods": methods},
        {"group": "ridge", "tangents": "reset", "tau": 50, "methods": worse},
    ]
    record = {
        "tier": "small",
        "data": False,
        "results": {"cells": cells, "all": {"windows": 7, "methods": methods}, "runs": 2},
    }
    text = estimates.bars(record)
    for words in (
        "7 windows of 2 runs (small tier; without MNIST and KMNIST",
        "in 1 of 2 cells (**auto**: 0)",
        "Not below it: aged in ridge regression, full batch (reset 50).",
        "Nor auto in: digits, full batch (reset 20); ridge regression, full batch (reset 50).",
        "At least 80 % in 1 of 2 cells; less in cells of: ridge regression, full batch.",
    ):
        assert words in text


def test_cells_are_named_by_problem():
    named = [("full", "reset", 20), ("full", "reset", 50), ("ridge", "cumulative", 20)]
    found = [dict(zip(("group", "tangents", "tau"), names, strict=True)) for names in named]
    assert (
        estimates.gathered(found) == "digits, full batch (reset 20, reset 50); ridge regression, full batch (cumulative 20)"
    )
    assert estimates.gathered([]) == "none"


def test_a_method_that_states_no_error_has_no_coverage():
    assert estimates.summary(rows([(1.0, 1.0)], [(np.nan, np.nan)]), "m")["covered"] is None


def test_the_published_rule_is_zero_where_no_eigenvalue_is_near_one():
    H = 0.7 ** np.arange(30)[:, None] * np.ones(2)
    w = Window("", CASE, "reset", 0, 30, H, 100, (1.0, 1.0), np.ones(2))
    np.testing.assert_array_equal(forecasters.published(w).value, 0.0)
    still = w._replace(H=np.ones((30, 1)) + 1e-9 * np.random.default_rng(0).normal(size=(30, 1)), truth=np.ones(1))
    np.testing.assert_allclose(forecasters.published(still).value, 1.0, rtol=1e-6)


def test_every_method_offered_is_judged_and_gives_a_value(short):
    w = next(forecasters.windows("ridge", CASE, short))
    found = forecasters.forecasters()
    from koopman_hpo import koopman

    assert set(koopman.METHODS) | {"aged", "law", "paper's rule"} <= set(found)
    for name, forecast in found.items():
        assert forecast(w).value.shape == (3,), name


def test_what_was_chosen_on_is_not_reported():
    for name in cases.GROUPS:
        assert min(c.seed for c in cases.cases(name, full=True)) >= cases.FIRST_SEED > 4


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.0312, "0.031"), (0.312, "0.31"), (3.12, "3.1"), (31.2, "31"), (2e7, "2e+07"), (None, "-")],
)
def test_numbers_have_two_digits_that_say_something(x, text):
    assert page.number(x) == text


def test_a_block_is_filled_between_its_marks_and_only_there():
    text = "before\n<!-- a.b -->\nold\n<!-- /a.b -->\nafter <!-- a.c -->"
    assert page.fill(text, "a.b", "new\n") == "before\n<!-- a.b -->\nnew\n<!-- /a.b -->\nafter <!-- a.c -->"
    with pytest.raises(SystemExit, match=r"a\.c"):
        page.fill(text, "a.c", "new")


def test_the_page_has_a_place_for_every_block_and_picture():
    text = (page.DOCS / "evidence.md").read_text(encoding="utf-8")
    for section in SECTIONS.values():
        for name in section.BLOCKS:
            assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->") == 1, name
        for name in section.FIGURES:
            assert f"(images/{name})" in text, name


def test_a_setting_is_best_among_those_tried_not_beside_them():
    assert answers.best({"1": 3.0, "2": 2.0, "aged": 0.1, "bic": 0.2}) == ("2", 2.0)
