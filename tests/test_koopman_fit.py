"""Laws of `koopman.fit`."""

import dataclasses

import numpy as np
import pytest
import reference_koopman as reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from koopman_hpo import koopman
from koopman_hpo.koopman import poles, select

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=30, deadline=None)
# eigenvalues that a window of 40 snapshots can tell apart and that live long enough to be seen
separated = st.sampled_from(
    [
        (0.95,),
        (-0.8,),
        (0.93, 0.7),
        (0.94, 0.8, 0.5),
        (0.92 * np.exp(0.5j), 0.92 * np.exp(-0.5j)),
        (0.9, 0.93 * np.exp(0.4j), 0.93 * np.exp(-0.4j)),
        (0.95 * np.exp(0.2j), 0.95 * np.exp(-0.2j), 0.9 * np.exp(1.2j), 0.9 * np.exp(-1.2j)),
    ]
)


def nearest(found, wanted):
    return max(np.abs(np.asarray(found) - z).min() for z in wanted)


@few
@given(lam=separated, q=st.integers(1, 6), seed=seeds, automatic=st.booleans())
def test_recovers_planted_spectra(lam, q, seed, automatic):
    lam = np.array(lam, complex)
    f = reference.planted(lam, 40, q, seed)
    settings_ = {} if automatic else {"delays": 10, "rank": len(lam)}
    model = koopman.fit(f(np.arange(40)), **settings_)
    # squared singular values cost half of the digits of the weakest mode
    assert nearest(model.eigenvalues, lam) < 1e-4
    for steps in (0, 1, 40, 400):
        np.testing.assert_allclose(model.forecast(steps), f(39 + steps)[0], atol=1e-4)


@few
@given(lam=st.floats(0.6, 0.95), q=st.integers(1, 4), seed=seeds)
def test_recovers_a_defective_pair(lam, q, seed):
    a, b, c = np.random.default_rng(seed).normal(size=(3, q))
    f = lambda t: c + (a + b * t / 5) * lam**t
    H = np.stack([f(t) for t in range(40)])
    model = koopman.fit(H, rank=2, delays=8)
    assert np.abs(model.eigenvalues - lam).max() < 1e-3  # a double root splits by the root of the rounding
    for steps in (0, 5, 60, 400):
        np.testing.assert_allclose(model.forecast(steps), f(39 + steps), atol=1e-4)


@pytest.mark.parametrize("lam", [0.65625, 0.8])
def test_equal_eigenvalues_do_not_lose_a_mode(lam):
    t = np.arange(40)[:, None]
    H = 1 + np.array([1.0, 2.0]) * lam**t + np.array([-1.0, 0.5]) * t * lam**t
    twice = poles.bounded(np.array([lam, lam], complex), 0.99)
    fitted = poles.basis(twice, 0, 40, 1).T @ (select.fitted(twice, 40, 1) @ H)
    np.testing.assert_allclose(fitted, H, atol=1e-5)  # they are set 1e-6 apart


@few
@given(seed=seeds, a=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]), q=st.sampled_from([2, 5, 40]))
def test_is_equivariant_under_scale_shift_and_rotation(seed, a, sign, q):
    rng = np.random.default_rng(seed)
    f = reference.planted(np.array([0.93, 0.85, 0.9 * np.exp(0.4j)]), 30, q, seed)
    H = f(np.arange(30)) + 0.05 * rng.normal(size=(30, q))
    b, rotation = rng.normal(size=q), np.linalg.qr(rng.normal(size=(q, q)))[0]
    plain, moved = koopman.fit(H), koopman.fit(sign * a * H @ rotation + b)
    assert (plain.rank, plain.delays) == (moved.rank, moved.delays)
    for steps in (0, 7, 300):
        want = sign * a * plain.forecast(steps) @ rotation + b
        np.testing.assert_allclose(moved.forecast(steps), want, atol=1e-5 * a)


@few
@given(seed=seeds, m=st.integers(3, 30), q=st.integers(1, 4), modes=st.sampled_from(["decaying", "stationary"]))
def test_real_in_real_out_finite_and_bounded_at_any_horizon(seed, m, q, modes):
    H = np.random.default_rng(seed).normal(size=(m, q)).cumsum(axis=0)
    model = koopman.fit(H, modes=modes)
    up = np.flatnonzero(model.eigenvalues.imag > 0)
    np.testing.assert_array_equal(model.eigenvalues[up].conj(), model.eigenvalues[up + 1])
    assert np.all(np.abs(model.eigenvalues) <= 1 - (0.2 / m if modes == "decaying" else 0) + 1e-12)
    for steps in (0, 1, 10**7):
        value, error = model.forecast(steps), model.error(steps)
        assert value.dtype == error.dtype == np.float64
        assert value.shape == error.shape == (q,)
        assert np.isfinite(value).all()
        assert np.isfinite(error).all()
        assert (error >= 0).all()
    if modes == "decaying":
        scale = np.abs(model.forecast(0) - model.limit()).max() + np.abs(H).max()
        np.testing.assert_allclose(model.forecast(10**7), model.limit(), atol=1e-9 * scale)


@few
@given(seed=seeds, m=st.integers(3, 40), q=st.sampled_from([1, 3, 50]), scale=st.sampled_from([1e-12, 0.1, 1e9]))
def test_a_constant_trajectory_gives_itself_exactly(seed, m, q, scale):
    h = scale * np.random.default_rng(seed).normal(size=q)
    H = np.tile(h, (m, 1))
    recorder = koopman.Recorder(q, m)
    for row in H:
        recorder.append(row)
    for data in (H, recorder):
        for modes in ("decaying", "stationary"):
            model = koopman.fit(data, modes=modes)
            for steps in (0, 3, 10**7):
                np.testing.assert_array_equal(model.forecast(steps), h if modes == "decaying" else model.limit())
            np.testing.assert_allclose(model.limit(), h, rtol=1e-12)
            np.testing.assert_array_equal(model.error(5) <= 1e-12 * np.abs(h), True)


@few
@given(seed=seeds, rank=st.integers(1, 4))
def test_closed_form_is_stepping(seed, rank):
    H = np.random.default_rng(seed).normal(size=(20, 3)).cumsum(axis=0)
    model = koopman.fit(H, delays=5, rank=rank)
    state = model.modes.copy()
    for steps in range(30):
        stepped = model.constant + state.sum(axis=0)
        scale = np.abs(model.modes).max() + np.abs(model.constant).max()
        np.testing.assert_allclose(stepped.imag, 0, atol=1e-10 * scale)
        np.testing.assert_allclose(model.forecast(steps), stepped.real, atol=1e-8 * scale)
        state = model.eigenvalues[:, None] * state
    several = model.forecast(np.arange(30))
    np.testing.assert_allclose(several, [model.forecast(k) for k in range(30)], atol=1e-8 * scale)


def test_forecast_zero_is_the_fitted_value_at_the_last_snapshot():
    rng = np.random.default_rng(0)
    clean = reference.planted(np.array([0.9]), 30, 2, 1)(np.arange(30))
    np.testing.assert_allclose(koopman.fit(clean).forecast(0), clean[-1], atol=1e-9)
    noisy = clean + 0.1 * rng.normal(size=clean.shape)
    model = koopman.fit(noisy, delays=5, rank=1)
    want = reference.affine_forecast(noisy, model.eigenvalues, 0)
    np.testing.assert_allclose(model.forecast(0), want, atol=1e-9)
    assert np.abs(model.forecast(0) - noisy[-1]).max() > 1e-3  # smoothed, not the last snapshot


def test_growth_is_forbidden_and_its_bound_exposed():
    t = np.arange(20)
    H = np.column_stack([1.2**t, t])
    for growth in (0.1, 0.2, 1.0):
        model = koopman.fit(H, growth=growth)
        assert np.abs(model.eigenvalues).max() <= 1 - growth / 20 + 1e-12
        assert np.isfinite(model.forecast(10**7)).all()


def test_the_error_covers_the_truth_about_as_often_as_it_says():
    hits = []
    for seed in range(60):
        f = reference.planted(np.array([0.93, 0.93 * np.exp(0.3j)]), 30, 2, seed)
        H = f(np.arange(30)) + 0.02 * np.random.default_rng(seed).normal(size=(30, 2))
        model = koopman.fit(H)
        hits.extend(np.abs(model.forecast(300) - f(329)[0]) < 2 * model.error(300))
    assert np.mean(hits) > 0.8


def test_rank_by_hard_threshold_finds_the_signal():
    f = reference.planted(np.array([0.95, 0.9 * np.exp(0.5j)]), 60, 3, 3)
    H = f(np.arange(60)) + 0.01 * np.random.default_rng(0).normal(size=(60, 3))
    model = koopman.fit(H, rank="svht")
    assert model.rank == 3
    assert model.delays == 15


def test_the_papers_rule_keeps_only_modes_near_one_and_says_when_there_are_none():
    t = np.arange(40)[:, None]
    with_unit = 2.0 + 0.7**t * np.array([[1.0, 3.0]])
    model = koopman.fit(with_unit, modes="stationary")
    assert model.note == ""
    np.testing.assert_allclose(model.forecast(100), [2.0, 2.0], atol=1e-6)
    decaying = 0.7**t * np.array([[1.0, 3.0]])
    model = koopman.fit(decaying, modes="stationary")
    assert "no eigenvalue" in model.note
    np.testing.assert_array_equal(model.forecast(100), decaying[-1])


# ---- mistakes of PyDMD that must not come back ------------------------------------------------------------------


def test_the_constant_is_an_exact_eigenvalue_one():
    t = np.arange(30)[:, None]
    H = np.array([3.0, -1.0]) + np.array([1.0, 2.0]) * 0.9**t
    model = koopman.fit(H)
    np.testing.assert_allclose(model.constant, [3.0, -1.0], atol=1e-9)
    np.testing.assert_allclose(model.forecast(10**7), [3.0, -1.0], atol=1e-9)


def test_real_exponents_are_not_merged_into_a_pair():
    t = np.arange(40)[:, None]
    H = np.exp(-0.1 * t) * np.array([1.0, 0.5]) + np.exp(-0.5 * t) * np.array([-1.0, 1.0])
    rates = np.sort(-np.log(koopman.fit(H, delays=4, rank=2).eigenvalues.real))
    np.testing.assert_allclose(rates, [0.1, 0.5], rtol=1e-5)


def test_a_far_forecast_materialises_no_steps():
    H = 0.9 ** np.arange(30)[:, None] * np.ones(100)
    model = koopman.fit(H)
    assert model.forecast(np.array([10**7, 10**15])).shape == (2, 100)  # stepping would not end


def test_a_fit_changes_neither_settings_nor_data():
    H = np.random.default_rng(0).normal(size=(20, 3)).cumsum(axis=0)
    H.flags.writeable = False
    model = koopman.fit(H, delays=4, rank=2)
    again = koopman.fit(H, delays=4, rank=2)
    np.testing.assert_array_equal(model.eigenvalues, again.eigenvalues)
    assert (model.delays, model.rank) == (4, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.rank = 3


@pytest.mark.parametrize("q", [3, 60])
def test_a_model_outlives_the_array_it_was_fitted_to(q):
    H = np.random.default_rng(0).normal(size=(20, q)).cumsum(axis=0)
    model, again = koopman.fit(H), koopman.fit(H.copy())
    H[:] = np.nan
    np.testing.assert_array_equal(model.forecast(5), again.forecast(5))
    np.testing.assert_array_equal(model.error(5), again.error(5))


@given(scale=st.sampled_from([1e-100, 1e100]), seed=seeds)
@few
def test_extreme_units_make_no_difference(scale, seed):
    H = np.random.default_rng(seed).normal(size=(20, 2)).cumsum(axis=0)
    assume(np.isfinite(H).all())
    plain, scaled = koopman.fit(H), koopman.fit(scale * H)
    np.testing.assert_allclose(scaled.forecast(7) / scale, plain.forecast(7), rtol=1e-6, atol=1e-6)
