"""What pays: the ideas for better estimates on data where their answer is known, and the loops that heed magnitudes."""

from __future__ import annotations

import math
import pathlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from koopman_hpo import Global, Local, Tuner, hypergradient, koopman
from koopman_hpo.strategies import Window

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
pytest.importorskip("sklearn")
from study import methods, payoff, payoff_online, payoff_restarts, payoff_windows
from study.payoff_online import View
from study.payoff_restarts import Leg, Loop
from study.problems import Case
from study_toys import COST, task

# -- windows -----------------------------------------------------------------------------------------------------------


def planted(seed, m=50, begun=0):
    """(m, 3): a constant, a slow mode and an oscillation, and what they are 200 steps after the end."""
    rng = np.random.default_rng(seed)
    lam = np.array([0.97, 0.9 * np.exp(0.3j), 0.9 * np.exp(-0.3j)])
    c, real, mixed = rng.normal(size=(3, 3))
    amplitudes = np.stack([real, mixed + 1j * rng.normal(size=3), np.zeros(3)])
    amplitudes[2] = amplitudes[1].conj()
    at = lambda t: (c + (lam ** np.asarray(t)[..., None]) @ amplitudes).real
    return at(np.arange(begun, begun + m)), at(begun + m - 1 + 200), lam


@pytest.mark.parametrize("subspace", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_planted_modes_are_found_from_one_window_and_from_several_with_constants_of_their_own(subspace, pooled):
    H, end, lam = planted(1)
    others = [planted(1, begun=begun)[0] + shift for begun, shift in ((3, 5.0), (9, -2.0))] if pooled else []
    found = payoff_windows.poles([*others, H], subspace, 1e-6, 6)
    np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(lam), atol=1e-6)
    np.testing.assert_allclose(payoff_windows.carried(H, found, 200), end, atol=1e-5)


def test_modes_that_grow_are_bounded():
    H = 1.01 ** np.arange(50.0)[:, None]
    assert abs(payoff_windows.carried(H, np.array([1.01]), 100_000)[0]) < 10


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(payoff_windows, "HORIZON", 130)
    monkeypatch.setattr(payoff_windows, "BEGINNINGS", {0: 120, 60: 110})
    monkeypatch.setattr(payoff_windows, "ENDS", {0: (50, 120), 60: (110,)})
    return list(payoff_windows.looks(Case("ridge", 0.1, 10, 50)))


def test_a_look_holds_what_was_seen_of_the_steps_that_it_says(short):
    assert [look.part for look in short] == ["mini, reset", "mini, cumulative", "mini, reset"]
    assert [(look.steps, look.age) for look in short] == [(80, (1, 1)), (10, (71, 71)), (20, (61, 1))]
    first, late, second = short
    np.testing.assert_array_equal(late.since[:50], first.H)
    np.testing.assert_array_equal(late.since[-50:], late.H)
    np.testing.assert_array_equal(late.past[-1], late.since[20:70])
    np.testing.assert_array_equal(second.past[-1], first.H)
    assert len(first.past) == 0
    assert np.isfinite(late.beside).all()
    assert (late.beside[:, 2:] > 0).all()
    for name, drawn in late.drawn.items():
        assert 0 < np.abs(drawn - late.H).max() < 10 * np.abs(late.H).max(), name


def test_every_idea_has_a_finite_answer_and_all_data_are_judged_as_the_last_value(short):
    for look in short:
        for name, idea in payoff_windows.IDEAS.items():
            assert np.isfinite(idea(look)).all(), name
            assert idea(look).shape == (3,), name
    np.testing.assert_array_equal(payoff_windows.IDEAS["last value"](short[0]), short[0].H[-1])


def test_equal_epochs_repeat_their_batches_and_others_do_not(monkeypatch):
    monkeypatch.setattr(payoff_windows, "HORIZON", 60)
    monkeypatch.setattr(payoff_windows, "BEGINNINGS", {0: 60})
    monkeypatch.setattr(payoff_windows, "ENDS", {0: (60,)})
    shown = {False: [], True: []}
    for cycled, batches in shown.items():
        see = lambda s, batch, *rest, batches=batches: (
            batches.append(batch[0][0, 0]) or payoff_windows_seen(s, batch, *rest)
        )
        monkeypatch.setattr(payoff_windows, "seen", see)
        list(payoff_windows.looks(Case("ridge", 0.1, 10, 50), cycled))
    assert shown[True][:4] == shown[True][4:8] == shown[True][8:12]
    assert shown[False][:4] == shown[True][:4] != shown[False][4:8]


payoff_windows_seen = payoff_windows.seen


def test_ratios_are_geometric_means_by_part():
    errors = [("full, reset", 2.0, 1.0), ("full, reset", 1.0, 2.0), ("mini, reset", 4.0, 1.0)]
    found = payoff_windows.ratios([{"part": p, "errors": {"last value": a, "x": b}} for p, a, b in errors])
    assert found["ideas"]["x"] == {"full, reset": 1.0, "mini, reset": 0.25}
    assert found["windows"] == {"full, reset": 2, "mini, reset": 1}
    assert found["last"]["full, reset"] == pytest.approx(math.sqrt(2), rel=1e-3)


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_the_age_in_mode_restart_is_that_of_the_snapshots():
    rng = np.random.default_rng(0)
    H = rng.normal(size=(25, 2)).cumsum(axis=0)
    found = payoff_restarts.Aged().look(H, 30, Window(None, None, 120, 100))  # at steps 4, 8, ..., 100
    want = koopman.extrapolate(H, 30, age=(1.0, 1.0))
    np.testing.assert_array_equal(found.value, want.value)
    late = payoff_restarts.Aged(4).look(H[:4], 3, Window(None, None, 120, 102))  # every 26 steps: at 24, 50, 76, 102
    law = koopman.aging.forecast(H[:4] / np.abs(H[:4]).max(axis=0), 3, koopman.aging.Age(24 / 26, 24 / 26))
    np.testing.assert_allclose(late.value, law[0] * np.abs(H[:4]).max(axis=0), rtol=1e-12)


def test_a_walk_costs_its_runs_its_hypergradients_and_the_race():
    t = task()
    legs = payoff_restarts.walk(t, COST, Loop(Global()), 200.0)
    assert [leg.spent for leg in legs] == [(k + 1) * (40 * 2 + 3) + 3 for k in range(3)]
    plain = payoff_restarts.walk(t, COST, Loop(Local(mode="restart")), 10.0)
    raced = payoff_restarts.walk(
        t, COST, Loop(Local(mode="restart"), lambda t: lambda *a: payoff_restarts.racing(t, *a)), 10.0
    )
    assert raced[0].spent == plain[0].spent + 3 * 4
    short = replace(t, steps=4)
    tried = [plain[0].phi + s * (plain[0].then - plain[0].phi) for s in (0.5, 1.0, 2.0)]
    best = min(tried, key=lambda phi: methods.train(short, phi).val)
    np.testing.assert_allclose(raced[0].then, best, rtol=1e-12)


def test_an_online_run_first_is_counted_and_its_mean_is_where_the_loop_begins():
    t = task(steps=60)  # three windows
    first, second = payoff_restarts.walk(t, COST, Loop(Local(mode="restart", cut=0.5), warm=True), 200.0)[:2]
    tuned = Tuner(t.run(), Local(), steps=60)
    tuned.fit(t.batch, [t.val])
    np.testing.assert_allclose(first.then, tuned.history.phi.mean(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(second.phi, first.then)
    assert first.spent == 60 * 2 + (3 + 1) * 3
    assert second.spent == first.spent + 30 * 2 + (1 + 1) * 3


def test_what_stands_is_the_newest_then_the_best_whole_run():
    leg = lambda cut, phi, value, then: Leg(0.0, cut, np.array([phi]), value, np.array([then]))
    legs = [leg(0.5, 0.0, 9.0, 1.0), leg(0.5, 1.0, 8.0, 3.0), leg(1.0, 3.0, 2.0, 4.0), leg(1.0, 4.0, 2.5, 5.0)]
    assert [float(x[0]) for x in payoff_restarts.standing(legs)] == [1.0, 3.0, 3.0, 3.0]


def bracket(growth, rows, target):
    made = [SimpleNamespace(event="", estimate=np.array(h), phi=np.array(phi)) for h, phi in rows]
    tuner = SimpleNamespace(history=made, phi=np.array(target), inner=SimpleNamespace(space=SimpleNamespace(clip=np.array)))
    payoff_restarts.bracketed(growth)(tuner, made[-1].phi, 0.5)
    return tuner.phi


def test_a_bracket_is_the_zero_of_a_line_and_steps_that_go_on_grow():
    rows = [((-1.0, -1.0), (0.0, 0.0)), ((3.0, -1.0), (0.6, 0.6))]
    np.testing.assert_allclose(bracket(1.0, rows, (0.1, 1.2)), (0.15, 1.2))
    np.testing.assert_allclose(bracket(1.5, rows, (0.1, 1.2)), (0.15, 1.5))
    assert bracket(1.5, rows[1:], (0.1, 1.2)).tolist() == [0.1, 1.2]


def test_an_estimate_used_twice_is_two_of_the_default_updates():
    one, two = payoff_restarts.outer.adam(), payoff_restarts.repeated(2)
    h, state = np.array([0.3, -2.0]), one.init(2)
    total, steps = np.zeros(2), state
    for _ in range(2):
        step, steps = one.update(h, steps, 0.6)
        total += step
    found, after = two.update(h, state, 0.6)
    np.testing.assert_array_equal(found, total)
    assert after.steps == 2


def test_other_batches_are_others_and_the_same_every_time():
    t = task()
    first, again, second = (payoff_restarts.other(t, k).batch(3)[1] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    assert (first != t.batch(3)[1]).any()


# -- online ------------------------------------------------------------------------------------------------------------


def window_of(t, at, run=None):
    run = t.run() if run is None else run
    H = [run.step(run.space.phi0, t.batch(k)) and run.hypergradient(t.val).grad for k in range(at)]
    return np.array(H), Window(run, t.val, t.steps - at, at)


def test_the_truth_is_the_hypergradient_of_the_whole_run_and_leaves_the_run_where_it_is():
    t = task()
    H, window = window_of(t, 12)
    before = window.run.snapshot()
    found = payoff_online.truth(t, H, 28, window)
    want = hypergradient(t.run(), [t.batch(k) for k in range(40)], t.val)
    np.testing.assert_allclose(found.value, want.grad, rtol=1e-10)
    assert found.loss == pytest.approx(want.value)
    for name, value in window.run.snapshot().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_steps_heed_magnitude_error_and_what_was_expected():
    view = View(np.array([0.1, -10.0]), np.array([0.1, 0.0]), 1.0)
    np.testing.assert_allclose(payoff_online.sgd(0.5)(view), (0.05, -payoff_online.LONGEST))
    np.testing.assert_allclose(payoff_online.signal(view), (payoff_online.LONGEST / 2, -payoff_online.LONGEST))
    region, h = payoff_online.Region(), np.array([2.0, 0.0])
    first = region(View(h, h, 1.0))
    np.testing.assert_allclose(first, (payoff_online.STRIDE, 0.0))
    promised = 2.0 * payoff_online.STRIDE
    assert region(View(h, h, 1.0 - promised))[0] == 2 * first[0]  # kept what was promised
    assert region(View(h, h, 2.0))[0] == first[0]  # the loss rose instead
    assert region(View(h, h))[0] == first[0]  # nothing is expected: nothing is learned


def test_adam_outside_is_the_tuners_own():
    t = task(steps=100)
    want = Tuner(t.run(), Local(), steps=100).fit(t.batch, [t.val])
    strategy = payoff_online.Stepping(t, payoff_online.last, payoff_online.Adam())
    found = Tuner(t.run(), strategy, steps=100, outer=payoff_online.AS_GIVEN).fit(t.batch, [t.val])
    np.testing.assert_allclose(found.phi, want.phi, rtol=1e-12)
    assert np.abs(found.phi - t.space.phi0).max() > 0.1


def test_several_looks_are_taken_where_the_steps_lead_and_the_run_stays():
    t = task()
    H, window = window_of(t, 12)
    at = []
    look = lambda task, H, ahead, window: at.append(window.run.phi.copy()) or View(np.ones(3), np.ones(3))
    strategy = payoff_online.Stepping(t, look, lambda view: 0.1 * view.value, looks=3)
    found = strategy.look(H, 28, window)
    np.testing.assert_allclose(np.array(at) - at[0], [[0.0] * 3, [-0.1] * 3, [-0.2] * 3], atol=1e-12)
    np.testing.assert_allclose(found.value, 0.3)
    np.testing.assert_array_equal(window.run.phi, t.space.phi0)


def test_estimates_have_a_value_and_an_error_each():
    t = task(steps=60)
    H, window = window_of(t, 25)
    for name, estimate in payoff_online.ESTIMATES.items():
        view = estimate(t, H, 35, window)
        assert view.value.shape == view.error.shape == (3,), name
        assert np.isfinite(view.value).all(), name
        assert math.isfinite(view.loss) == (name in ("krylov", "truth")), name


# -- the page ----------------------------------------------------------------------------------------------------------


def online_rows(better):
    pairs = [(e, s) for e in payoff_online.ESTIMATES for s in payoff_online.STEPS] + [
        (n, "") for n in payoff_online.SEVERAL
    ]
    value = lambda e, s: better if (e, s) == ("truth", "signal to noise") else 1.2 if s == "sgd, clipped" else 1.0
    return [
        {"task": t, "seed": 10, "estimate": e, "step": s, "end": [1.0, value(e, s)]}
        for t in payoff_online.TASKS
        for e, s in pairs
    ]


def test_the_verdict_online_is_against_the_last_value_with_the_default_step():
    said = payoff_online.verdict({"results": {"online": online_rows(0.9)}})
    assert "signal to noise: last value +0.0 %" in said
    assert "truth -10.0 %" in said
    assert said.count("-10.0 %") == 1
    assert "sgd, clipped: last value +20.0 %" in said
    assert "once a window: last value, two steps of each +0.0 %" in said


def test_without_data_the_page_says_so():
    for name, block in payoff.BLOCKS.items():
        if "windows" not in name:
            assert block({"data": False, "results": {}}) == "Not measured: no data was given."


def test_ideas_clearly_below_the_aged_are_named():
    ideas = {"aged": 0.5, "x": 0.4, "y": 0.49}
    found = {"ideas": {n: dict.fromkeys(payoff_windows.PARTS, v) for n, v in ideas.items()}}
    said = payoff.windows_verdict({"results": {"windows": [found, found]}})
    assert said.count("clearly less: x (0.40).") == len(payoff_windows.PARTS)


def test_shares_of_loops_are_of_true_globals_cost():
    path = lambda m, *points: {"task": "knots", "seed": 10, "method": m, "trace": [[r, v, v] for r, v in points]}
    rows = [
        path("true global", (2.0, 0.9), (20.0, 0.5), (40.0, 0.5)),
        path("glocal", (1.0, 0.9), (9.9, 0.5), (30.0, 0.4), (40.0, 0.4)),
    ]
    found = payoff_restarts.standings(rows, "knots")
    assert list(found) == ["true global", "glocal"]
    assert found["glocal"].share == pytest.approx(0.5, rel=0.1)
    assert found["glocal"].third == pytest.approx(0.8)
    assert found["glocal"].end == pytest.approx(-0.2)
    made = {"results": {"restarts": [row | {"task": n, "method": m} for n, m, row in every(rows)]}}
    said = payoff_restarts.block(made)
    assert said.startswith("One seed.\n\n| loop |")
    assert said.count("\n") == len(payoff_restarts.LOOPS) + 3
    assert "| glocal | 50 % | 50 % | 50 % | 50 % | +80.0 % | -20.0 % | 0.500 | 0.400 |" in said
    assert "| last value, racing | 50 % | 50 % | 50 % | 50 % | +80.0 % | -20.0 % | - | - |" in said
    said = payoff_restarts.verdict(made)
    assert "or less, in the median: none. There true global stands +80.0 % above its end" in said
    for row in made["results"]["restarts"]:
        if row["method"] == "aged" and row["task"] != "lr 0.3":
            row["trace"] = [[1.0, 0.9, 0.9], [4.0, 0.5, 0.5], [40.0, 0.5, 0.5]]
        if row["method"] == "last value, racing" and row["task"] == "lr 0.3":
            row["trace"] = [[1.0, 0.9, 0.9], [40.0, 0.9, 0.9]]
    said = payoff_restarts.verdict(made)
    assert "or less, in the median: aged (19 %)." in said
    assert "and lowest, at +26.7 %: aged." in said
    there = [m for m in payoff_restarts.LOOPS if m not in ("true global", "last value, racing")]
    assert said.endswith(f"on all three tasks: {'; '.join(there)}.")


def every(rows):
    """The first row as true global's, the second as that of every other loop, on every task."""
    for name in payoff_restarts.TASKS:
        for m in payoff_restarts.OTHERS if name == "knots" else payoff_restarts.LOOPS:
            yield name, m, rows[m != "true global"]
