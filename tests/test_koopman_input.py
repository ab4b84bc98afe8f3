"""Bad input to the Koopman functions, and the recorder."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koopman_hpo import koopman
from koopman_hpo.errors import HyperparameterError, ShapeError

H = np.random.default_rng(0).normal(size=(20, 3)).cumsum(axis=0)


def with_nan(shape, where):
    X = np.ones(shape)
    X[where] = np.nan
    return X


@pytest.mark.parametrize("call", [koopman.fit, lambda x: koopman.extrapolate(x, 5)])
@pytest.mark.parametrize(
    ("snapshots", "says"),
    [
        (np.ones(5), r"\(m, q\)"),
        (np.ones((2, 3, 4)), r"\(m, q\)"),
        (np.empty((0, 3)), "Record more"),
        (np.empty((5, 0)), "at least 1 value"),
        (np.ones((20, 3)) * 1j, "real"),
        (np.full((20, 3), "a"), "real"),
        (np.array([[None] * 3] * 20), "real"),
        (with_nan((20, 3), (7, 1)), "snapshot 7"),
        (with_nan((20, 3), (0, 0)), "snapshot 0"),
        (with_nan((20, 300), (19, 299)), "snapshot 19"),
        (np.where(np.arange(20)[:, None] == 5, np.inf, np.ones((20, 300))), "snapshot 5"),
    ],
)
def test_a_bad_trajectory_is_refused_by_name(call, snapshots, says):
    with pytest.raises(ShapeError, match=says):
        call(snapshots)


def test_one_snapshot_that_is_not_finite_is_refused():
    for value in (np.nan, np.inf):
        with pytest.raises(ShapeError, match="finite"):
            koopman.extrapolate([[value]], 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 50}, r"min\(d q, m - d - 1\)"),
        ({"rank": 16, "delays": 5}, r"min\(d q, m - d - 1\)"),
        ({"rank": 2.0}, "whole"),
        ({"rank": "bic"}, "auto"),
        ({"delays": 0}, "1..18"),
        ({"delays": 19}, "1..18"),
        ({"delays": -1, "rank": 2}, "1..18"),
        ({"delays": "many"}, "whole"),
        ({"modes": "stationery"}, "Did you mean 'stationary'"),
        ({"growth": 0.0}, "growth"),
        ({"growth": np.nan}, "growth"),
        ({"growth": 21}, "growth"),
        ({"growth": "slow"}, "growth"),
    ],
)
def test_bad_settings_of_a_fit(options, says):
    with pytest.raises(HyperparameterError, match=says):
        koopman.fit(H, **options)


def test_too_few_snapshots_for_a_fit():
    with pytest.raises(ShapeError, match="at least 3"):
        koopman.fit(H[:2])
    assert koopman.fit(H[:3]).forecast(1).shape == (3,)


@pytest.mark.parametrize("steps", [-1, 1.5, "3", None, [-1, 2], [[1]], np.array([1.0])])
def test_steps_count_forward(steps):
    with pytest.raises(HyperparameterError, match="steps"):
        koopman.fit(H).forecast(steps)
    with pytest.raises(HyperparameterError, match="steps"):
        koopman.fit(H).error(steps)
    with pytest.raises(HyperparameterError, match="steps"):
        koopman.extrapolate(H, steps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "dmdd"}, "Did you mean 'dmd'"),
        ({"method": 3}, "method"),
        ({"gate": 0}, "gate"),
        ({"gate": None}, "gate"),
        ({"growth": -1}, "growth"),
        ({"growth": 11}, "growth"),
    ],
)
def test_bad_options_of_an_extrapolation(options, says):
    with pytest.raises(HyperparameterError, match=says):
        koopman.extrapolate(H, 5, **options)


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.float16, list, np.asfortranarray, lambda x: x[::-1][::-1]])
def test_any_real_array_will_do(kind):
    data = np.round(10 * H)
    given_ = kind(data) if kind in (list, np.asfortranarray) or not isinstance(kind, type) else data.astype(kind)
    np.testing.assert_allclose(koopman.fit(given_).forecast(5), koopman.fit(data).forecast(5), atol=1e-8)


# ---- the recorder -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 12), q=st.sampled_from([1, 3, 40, 2000]), single=st.booleans())
def test_a_recorder_holds_the_trajectory_and_its_gram_matrix(seed, m, q, single):
    X = np.random.default_rng(seed).normal(size=(m, q)).astype(np.float32 if single else np.float64)
    recorder = koopman.Recorder(q, 12, X.dtype)
    for h in X:
        recorder.append(h)
    assert len(recorder) == m
    assert recorder.snapshots.dtype == X.dtype
    np.testing.assert_array_equal(recorder.snapshots, X)
    D = X.astype(np.float64) - X[0]
    np.testing.assert_allclose(recorder.gram, D @ D.T, rtol=1e-4 if single else 1e-10, atol=1e-4 if single else 1e-10)
    for view in (recorder.snapshots, recorder.gram):
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1


@pytest.mark.parametrize("q", [3, 60])
@pytest.mark.parametrize("options", [{}, {"delays": 4, "rank": 3}, {"modes": "stationary"}, {"rank": "svht"}])
def test_a_recorded_fit_is_that_of_the_array(q, options):
    X = np.random.default_rng(1).normal(size=(20, q)).cumsum(axis=0)
    recorder = koopman.Recorder(q, 30)
    for h in X:
        recorder.append(h)
    plain, same = koopman.fit(X, **options), koopman.fit(recorder, **options)
    assert (plain.delays, plain.rank) == (same.delays, same.rank)
    for steps in (0, 5, 10**7):
        np.testing.assert_allclose(same.forecast(steps), plain.forecast(steps), rtol=1e-6, atol=1e-6)


def test_a_model_outlives_the_recorders_clear():
    recorder = koopman.Recorder(3, 20)
    for h in H:
        recorder.append(h)
    model = koopman.fit(recorder)
    want = koopman.fit(H).forecast(5)
    recorder.clear()
    assert len(recorder) == 0
    for h in H[::-1]:
        recorder.append(100 * h)
    np.testing.assert_allclose(model.forecast(5), want, atol=1e-9)


def test_a_recorder_refuses_what_it_cannot_hold():
    recorder = koopman.Recorder(3, 2)
    with pytest.raises(ShapeError, match="Record more"):
        koopman.extrapolate(recorder, 5)
    for bad in (np.ones(4), np.ones((1, 3)), np.ones(3) * 1j):
        with pytest.raises(ShapeError, match="3 real numbers"):
            recorder.append(bad)
    for bad in ([1.0, np.nan, 1.0], [np.inf, 1.0, 1.0]):
        with pytest.raises(ShapeError, match="snapshot 0"):
            recorder.append(bad)
    recorder.append([1.0, 2.0, 3.0])
    for bad in ([1.0, np.nan, 1.0], [1e200, 1.0, 1.0]):
        with pytest.raises(ShapeError, match="snapshot 1"):
            recorder.append(bad)
    recorder.append([1.0, 2.0, 3.5])
    with pytest.raises(ShapeError, match="full"):
        recorder.append([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(recorder.snapshots, [[1, 2, 3], [1, 2, 3.5]])
    for arguments in ((0, 5), (3, 0), (3, -1), (2.5, 5)):
        with pytest.raises(HyperparameterError):
            koopman.Recorder(*arguments)
    with pytest.raises(ShapeError, match="float32 or float64"):
        koopman.Recorder(3, 5, np.int64)


def test_importing_compiles_nothing():
    code = (
        "import numba.core.dispatcher as d\n"
        "d.Dispatcher.compile = lambda *a: 1 / 0\n"
        "import koopman_hpo.koopman, sys\n"
        "assert 'scipy.linalg' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
