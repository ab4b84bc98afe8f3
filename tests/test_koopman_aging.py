"""The aging law: `koopman.extrapolate(H, steps, age=...)`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from koopman_hpo_adapters.numpy import softmax_regression

from koopman_hpo import HyperparameterError, Space, inner, koopman, log, logit, trajectory
from koopman_hpo.koopman import aging

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=15, deadline=None)


def law(t, begun, gamma, lag):
    """h at the tangents' age t (n,), those begun at step `begun`: (n,)."""
    t = np.asarray(t, float)
    return (t - lag * (1 - np.exp(-t / lag))) * ((begun + t) / begun) ** -gamma


def windows(begun, gamma, lag, stop=100, m=50, steps=900):
    """A window (m, 3) of ages stop - m + 1 .. stop in three units, its truth, and its age."""
    scale = np.array([1.0, -1e3, 1e-6])
    t = np.arange(stop - m + 1, stop + 1)
    return law(t, begun, gamma, lag)[:, None] * scale, law([stop + steps], begun, gamma, lag) * scale, (begun + t[0], t[0])


@pytest.mark.parametrize(("begun", "stop"), [(30, 50), (600, 50), (1, 500)])  # before, long before, after the peak
@pytest.mark.parametrize("gamma", [1.6, 1.9, 2.2])
def test_a_planted_law_is_foreseen(begun, stop, gamma):
    H, truth, age = windows(begun, gamma, 9.0, stop)
    value, _ = aging.forecast(H, 900, aging.Age(*age))
    off = lambda value: np.abs(value / truth - 1).max()
    assert off(value) <= 0.75 * off(H[-1])  # the last value is off by a factor of 1.8 to 11


def test_real_hypergradients_are_foreseen_in_spite_of_mini_batches():
    rng = np.random.default_rng(7)
    X = rng.normal(size=(300, 20)) * np.arange(1, 21) ** -1.0
    y = np.argmax(X @ rng.normal(size=(20, 3)) + 0.3 * rng.normal(size=(300, 3)), axis=1)
    train, val = (X[:200], y[:200]), (X[200:], y[200:])
    order = np.random.default_rng(8).integers(0, 200, (600, 20))
    batches = [(train[0][i], train[1][i]) for i in order]
    for lr in (0.003, 0.1):
        run = inner.sgd(softmax_regression(20, 3), Space(lr=log(lr), momentum=logit(0.9)))
        every = trajectory(run, batches, val)
        error = lambda value, truth=every[-1]: np.linalg.norm(value - truth)
        H = every[50:100]
        known = error(koopman.extrapolate(H, 500, age=(51, 51)).value)
        assert known < 0.7 * error(H[-1])
        assert known < 0.7 * error(koopman.extrapolate(H, 500).value)  # which knows no age


@few
@given(seed=seeds)
def test_is_equivariant_under_scales_of_each_coordinate(seed):
    rng = np.random.default_rng(seed)
    H = windows(100, 2.0, 9.0)[0] * (1 + 0.1 * rng.normal(size=(50, 3)))
    a = rng.choice([-1, 1], 3) * 10.0 ** rng.uniform(-2, 2, 3)
    plain, scaled = (koopman.extrapolate(X, 500, age=(151, 51)) for X in (H, a * H))
    np.testing.assert_allclose(scaled.value, a * plain.value, rtol=1e-6)
    np.testing.assert_allclose(scaled.error, np.abs(a) * plain.error, rtol=1e-6)


def test_a_coordinate_is_forecast_alone_in_any_company():
    H = np.random.default_rng(0).normal(size=(30, 1500)).cumsum(axis=0)
    together = aging.forecast(H, 300, aging.Age(100, 31))
    alone = aging.forecast(H[:, -1:], 300, aging.Age(100, 31))
    np.testing.assert_allclose([x[-1] for x in together], [x[0] for x in alone], rtol=1e-9)


def test_ages_are_in_snapshots():
    """Every second snapshot at half the age is the same window."""
    H, _, (training, tangents) = windows(200, 2.0, 9.0, stop=300, m=100)
    fine, _ = aging.forecast(H, 600, aging.Age(training, tangents))
    coarse, _ = aging.forecast(H[1::2], 300, aging.Age((training + 1) / 2, (tangents + 1) / 2))
    np.testing.assert_allclose(coarse, fine, rtol=0.03)


def test_noise_alone_is_drawn_towards_zero():
    sizes = []
    for seed in range(40):
        H = np.random.default_rng(seed).normal(size=(50, 1))
        sizes.append(koopman.extrapolate(H, 900, age=(450, 51)).value[0])
    assert np.sqrt(np.mean(np.square(sizes))) < 0.2  # of the noise


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_the_stated_error_holds_the_truth_in_four_windows_of_five(noise):
    held = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        begun, stop = int(rng.integers(1, 500)), int(rng.integers(50, 500))
        H, truth, age = windows(begun, rng.normal(*aging.PRIOR), rng.uniform(1, 20), stop)
        H = H + noise * np.abs(H).mean(axis=0) * rng.normal(size=H.shape)
        found = koopman.extrapolate(H, 1000 - stop, age=age)
        held.append(np.abs(found.value - truth) <= found.error)
    assert np.mean(held) >= 0.8


def test_exponentials_without_noise_are_left_to_dmd():
    t = np.arange(200)[:, None]
    h = np.array([1.0, -2.0]) * (1 - 0.93**t)
    found = koopman.extrapolate(h[101:], 400, age=(501, 101))
    assert found.method == "dmd"
    np.testing.assert_allclose(found.value, [1.0, -2.0], rtol=1e-3)
    far = np.abs(found.value - aging.forecast(h[101:], 400, aging.Age(501, 101))[0])
    assert (found.error >= far).all()  # the other model's word counts


@few
@given(
    seed=seeds,
    m=st.integers(1, 30),
    steps=st.sampled_from([0, 1, 10**7]),
    old=st.one_of(st.floats(1e-3, 1e6), st.just(1e-12)),
)
def test_is_finite_for_any_window_horizon_and_age(seed, m, steps, old):
    H = np.random.default_rng(seed).normal(size=(m, 3)).cumsum(axis=0)
    H[:, 1] = 0.0
    H.flags.writeable = False
    for training in (old, 1e3 * old):
        found = koopman.extrapolate(H, steps, age=(training, old))
        assert np.isfinite(found.value).all()
        assert np.isfinite(found.error).all()
        assert found.value[1] == 0.0
        assert found.reason


@pytest.mark.parametrize(
    "age",
    [(1, 2), (1, 0), (0, 0), (1, 1e-13), (1e13, 1), (-1, -2), 5, (1, 2, 3), (np.nan, 1), (np.inf, 1), "old", (True, "x")],
)
def test_ages_that_make_no_sense_are_refused(age):
    with pytest.raises(HyperparameterError, match=r"koopman\.extrapolate: age must be two ages"):
        koopman.extrapolate(np.zeros((20, 2)), 10, age=age)
