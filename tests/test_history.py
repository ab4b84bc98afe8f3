"""`History.learned` and `Result.learned`: where a run learned most."""

from __future__ import annotations

import math

import numpy as np
import pytest
import toys

from koopman_hpo import Global, History, Local, Space, Tuner, inner, log, logit
from koopman_hpo.history import Record


def history(*windows):
    """Of windows (phi, value), phi a number."""
    made = History(("lr",), ("log",))
    for phi, value in windows:
        nothing = np.full(1, np.nan)
        made.append(Record(1, 1, np.array([phi]), *(nothing,) * 5, 0.5, value, False, "last", "", ""))
    return made


def test_it_is_weighed_by_what_each_window_took_off_the_lowest_loss():
    e = math.e
    found = history((-5.0, e**2), (-2.0, e), (0.0, math.inf), (-1.0, 1.0), (-9.0, 1.1), (-9.0, 1.0))
    assert found.learned(e**2) == pytest.approx([(-2.0 - 1.0) / 2])
    assert found.learned(e**4) == pytest.approx([(-5.0 * 2 - 2.0 - 1.0) / 4])
    assert found.learned(e) == pytest.approx([-1.0])


def test_scaling_the_loss_leaves_it():
    windows = [(-3.0, 2.0), (-2.0, 0.7), (-1.0, 0.9), (0.5, 0.1)]
    scaled = history(*[(phi, 1e-9 * value) for phi, value in windows])
    np.testing.assert_allclose(scaled.learned(3e-9), history(*windows).learned(3.0), rtol=1e-12)


def test_losses_that_are_not_above_zero_count_by_themselves():
    assert history((-4.0, 1.0), (-1.0, -2.0)).learned(2.0) == pytest.approx([(-4.0 * 1 - 1.0 * 3) / 4])
    assert history((-4.0, 1.0), (-1.0, 0.0)).learned(4.0) == pytest.approx([(-4.0 * 3 - 1.0 * 1) / 4])


@pytest.mark.parametrize("values", [(math.nan, 2.0), (5.0, 6.0), (math.inf, math.nan)])
def test_where_nothing_was_learned_it_is_the_last(values):
    found = history((-2.0, values[0]), (-3.0, values[1]))
    got = found.learned(1.0)
    assert got == [-3.0]
    got[0] = 7.0  # a copy
    assert found.phi[-1] == [-3.0]


BATCHES, VAL = toys.batches(1, 40), [toys.data(7)]


def run():
    return inner.sgd(toys.logistic(np.linspace(-1, 1, 5)), Space(lr=log(1e-3), momentum=logit(0.5), l2=log(0.1)))


def test_an_online_result_has_it_in_natural_values():
    r = run()
    before = r.hypergradient(VAL[0]).value
    tuner = Tuner(r, Local(), steps=200, window=10)
    result = tuner.fit(BATCHES, VAL)
    assert result.learned == r.space.natural(r.space.clip(tuner.history.learned(before)))
    assert 1e-3 < result.learned["lr"] < result.hyper["lr"]


def test_before_the_first_window_and_of_restarts_it_is_hyper():
    made = Tuner(run(), Local(), steps=200, window=10).result
    assert made.learned == made.hyper
    assert made.learned is not made.hyper  # neither follows where the other is changed
    result = Tuner(run(), Global(), steps=20, runs=3).fit(BATCHES, VAL)
    assert result.learned == result.hyper
    assert result.learned["lr"] != pytest.approx(1e-3)
