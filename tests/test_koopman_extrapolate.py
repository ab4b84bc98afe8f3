"""Laws of `koopman.extrapolate`, its policies, and what it must reach."""

import dataclasses

import numpy as np
import pytest
import reference_koopman as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from koopman_hpo import koopman
from koopman_hpo.koopman import median, robust, sequence
from koopman_hpo.koopman.window import relative_gram

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None)
methods = pytest.mark.parametrize("method", koopman.METHODS)
BY_COORDINATE = {"aitken", "robust", "auto"}  # a median, and a ratio, of each coordinate: no rotations


def noisy(seed, m, q, noise=0.02):
    f = reference.planted(np.array([0.93, 0.85, 0.9 * np.exp(0.4j)]), m, q, seed)
    return f(np.arange(m)) + noise * np.random.default_rng(seed).normal(size=(m, q))


@methods
@few
@given(seed=seeds)
def test_is_equivariant_under_scales_and_offsets_of_each_coordinate(method, seed):
    rng = np.random.default_rng(seed)
    H = noisy(seed, 30, 3)
    a, b = rng.choice([-1, 1], 3) * 10.0 ** rng.uniform(-2, 2, 3), rng.normal(size=3)
    if method == "stationary":
        b = 0 * b  # the paper's rule has no intercept
    plain, moved = (koopman.extrapolate(X, 50, method, gate=np.inf) for X in (H, a * H + b))
    assert plain.accepted == moved.accepted
    np.testing.assert_allclose(moved.value, a * plain.value + b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    np.testing.assert_allclose(moved.error, np.abs(a) * plain.error, rtol=1e-3, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("method", sorted(set(koopman.METHODS) - BY_COORDINATE))
@few
@given(seed=seeds)
def test_is_equivariant_under_rotations_of_wide_trajectories(method, seed):
    H = noisy(seed, 20, 40)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(40, 40)))[0]
    plain, moved = (koopman.extrapolate(X, 50, method, gate=np.inf) for X in (H, H @ rotation))
    np.testing.assert_allclose(moved.value, plain.value @ rotation, atol=1e-5)


@methods
@few
@given(seed=seeds, m=st.integers(1, 30), q=st.integers(1, 4), steps=st.sampled_from([0, 1, 10**7]))
def test_is_real_finite_and_frozen_for_any_window_and_horizon(method, seed, m, q, steps):
    H = np.random.default_rng(seed).normal(size=(m, q)).cumsum(axis=0)
    H.flags.writeable = False
    forecast = koopman.extrapolate(H, steps, method)
    for array in (forecast.value, forecast.error):
        assert array.shape == (q,)
        assert array.dtype == np.float64
        assert np.isfinite(array).all()
    assert (forecast.error >= 0).all()
    assert forecast.reason
    assert forecast.method in koopman.METHODS
    if not forecast.accepted:
        np.testing.assert_array_equal(forecast.value, H[-1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        forecast.accepted = True


@methods
@pytest.mark.parametrize("q", [1, 3, 50])
def test_a_constant_trajectory_gives_itself_exactly(method, q):
    H = np.tile(np.random.default_rng(q).normal(size=q), (30, 1))
    forecast = koopman.extrapolate(H, 10**7, method)
    np.testing.assert_array_equal(forecast.value, H[-1])
    np.testing.assert_array_equal(forecast.error, 0)


@methods
def test_a_constant_coordinate_stays_beside_moving_ones(method):
    H = np.column_stack([noisy(0, 30, 2), np.full(30, 0.3), np.zeros(30)])
    forecast = koopman.extrapolate(H, 300, method, gate=np.inf)
    if method != "stationary":  # the paper's rule has no intercept
        np.testing.assert_allclose(forecast.value[2:], [0.3, 0.0], atol=1e-12)


@methods
@few
@given(seed=seeds, q=st.sampled_from([3, 60]))
def test_a_recorder_is_as_good_as_an_array(method, seed, q):
    H = noisy(seed, 20, q)
    recorder = koopman.Recorder(q, 25)
    for h in H:
        recorder.append(h)
    plain, same = koopman.extrapolate(H, 30, method), koopman.extrapolate(recorder, 30, method)
    assert (plain.accepted, plain.method) == (same.accepted, same.method)
    np.testing.assert_allclose(same.value, plain.value, atol=1e-5)
    np.testing.assert_allclose(same.error, plain.error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["dmd", "tls", "fb", "ar", "optdmd", "rre", "mpe", "affine"])
def test_noise_free_decay_is_extrapolated_exactly(method):
    f = reference.planted(np.array([0.8, 0.6 * np.exp(0.9j)]), 30, 4, 0)
    forecast = koopman.extrapolate(f(np.arange(30)), 300, method)
    assert forecast.accepted, forecast.reason
    np.testing.assert_allclose(forecast.value, f(329)[0], atol=1e-5)


def test_forward_backward_is_exact_without_noise():
    H = 0.95 ** np.arange(30)[:, None] * np.ones(2)  # PyDMD gives 0.9495
    forecast = koopman.extrapolate(H, 10, "fb")
    np.testing.assert_allclose(forecast.value, 0.95**39, rtol=1e-9)


def test_members_are_those_of_explicit_hankel_matrices():
    H = noisy(3, 40, 3, 0.1)
    G = relative_gram(H)
    for d, energy, rank in ((1, 0.9, 2), (10, 0.999, 6), (4, 0.99, 3)):
        w = robust.difference_weights(G, 25, d, energy, rank, 0.97)
        np.testing.assert_allclose(w @ H, reference.difference_dmd(H, 25, d, energy, rank, 0.97), atol=1e-7)
    blocks = H.reshape(10, 4, 3).mean(axis=1)
    want = reference.difference_dmd(blocks, 7, 2, 0.99, 3, 0.9)  # 25 steps and 1.5 to the last block's middle
    np.testing.assert_allclose(robust.blocks(G, 25) @ H, want, atol=1e-7)
    np.testing.assert_allclose(sequence.rre(G) @ H, reference.reduced_rank(reference.hankel(H, 12).T, 12)[-3:], atol=1e-6)


def test_all_weights_sum_to_one():
    G = relative_gram(noisy(1, 30, 3))
    rows = [*median.members(G, 40), sequence.rre(G), sequence.mpe(G), sequence.anderson(G), *sequence.thirds(30)]
    np.testing.assert_allclose([w.sum() for w in rows], 1.0, atol=1e-9)


def test_aitken_holds_its_ratio_in_bounds():
    means = np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.5, 3.0, 0.5, 1.0]])
    np.testing.assert_allclose(sequence.aitken(means), [2.0, 7.0, 0.5, 1.0])


def test_auto_says_what_it_decided_and_on_which_numbers():
    believed = koopman.extrapolate(noisy(0, 40, 3, 0.001), 400)
    assert believed.accepted
    assert believed.method == "dmd"
    assert f"{believed.move:.3g}" in believed.reason
    assert f"{believed.deviation:.3g}" in believed.reason
    assert believed.deviation < 0.5 * believed.move
    doubted = koopman.extrapolate(noisy(0, 40, 3, 0.1), 400, gate=1e-6)
    assert doubted.method == "robust"
    assert "not believed" in doubted.reason
    assert doubted.deviation >= 1e-6 * doubted.move


def test_a_closed_gate_or_a_short_window_keeps_the_last_value():
    H = noisy(0, 40, 3)
    refused = koopman.extrapolate(H, 400, "dmd", gate=1e-9)
    assert not refused.accepted
    assert refused.method == "last"
    assert "gate" in refused.reason
    np.testing.assert_array_equal(refused.value, H[-1])
    short = koopman.extrapolate(H[:4], 400)
    assert not short.accepted
    assert "4 snapshots" in short.reason
    np.testing.assert_array_equal(short.value, H[3])


def test_the_papers_rule_falls_back_and_says_so():
    H = 0.7 ** np.arange(30)[:, None] * np.ones(2)
    forecast = koopman.extrapolate(H, 100, "stationary")
    assert not forecast.accepted
    assert "no eigenvalue" in forecast.reason
    np.testing.assert_array_equal(forecast.value, H[-1])


# ---- what it must reach -------------------------------------------------------------------------------------------


def family(kind, m, rng):
    """t -> (len(t), 3): constant and decaying transients that are still there at the end of the window."""
    c, a, b = rng.normal(size=(3, 3))
    slow, fast = np.exp(-1 / (m * rng.uniform(0.3, 1.0))), np.exp(-1 / (m * rng.uniform(0.05, 0.3)))
    turn = 2 * np.pi * rng.uniform(0.5, 3.0) / m
    column = lambda t: np.asarray(t, float)[:, None]
    return {
        "one real mode": lambda t: c + a * slow ** column(t),
        "two real modes": lambda t: c + a * slow ** column(t) + b * fast ** column(t),
        "pair": lambda t: c + slow ** column(t) * (a * np.cos(turn * column(t)) + b * np.sin(turn * column(t))),
        "defective": lambda t: c + (a + b * 4 * column(t) / m) * np.sqrt(slow * fast) ** column(t),
    }[kind]


@pytest.mark.parametrize("m", [25, 50])
def test_ten_windows_ahead_the_error_is_a_quarter_of_the_last_values(m):
    all_errors, all_last = [], []
    for kind in ("one real mode", "two real modes", "pair", "defective"):
        errors, last = [], []
        for seed in range(50):
            rng = np.random.default_rng(seed)
            f = family(kind, m, rng)
            H, truth = f(np.arange(m)) + 1e-2 * rng.normal(size=(m, 3)), f([11 * m - 1])[0]
            errors.append(np.linalg.norm(koopman.extrapolate(H, 10 * m).value - truth))
            last.append(np.linalg.norm(H[-1] - truth))
        assert np.median(errors) <= 0.35 * np.median(last), kind
        all_errors += errors
        all_last += last
    assert np.median(all_errors) <= 0.25 * np.median(all_last)


def hard(kind, m, rng):
    """A window (m, 3) that holds nothing to extrapolate, and the value ten windows later."""
    t, direction = np.arange(11 * m), rng.normal(size=3)
    if kind == "white noise":
        return rng.normal(size=(m, 3)), np.zeros(3)
    if kind == "noisy constant":
        return 1 + 1e-3 * rng.normal(size=(m, 3)), np.ones(3)
    if kind == "random walk":
        X = rng.normal(size=(11 * m, 3)).cumsum(axis=0)
    elif kind == "growth":
        X = np.outer(1.03**t, direction)
    elif kind == "ramp":
        X = np.outer(t, direction)
    else:
        X = np.outer(1.02**t * np.cos(0.3 * t), direction)
    return X[:m], X[-1]


HARD = ("white noise", "noisy constant", "random walk", "growth", "ramp", "growing oscillation")


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("m", [4, 10, 12, 25, 50])
def test_is_never_worse_than_twice_the_last_value_where_there_is_nothing_to_gain(kind, m):
    errors, last = [], []
    for seed in range(40):
        H, truth = hard(kind, m, np.random.default_rng(seed))
        value = koopman.extrapolate(H, 10 * m).value
        errors.append(np.linalg.norm(value - truth))
        last.append(np.linalg.norm(H[-1] - truth))
        reach = np.abs(H - H.mean(axis=0)).max(axis=0)  # a single draw may be unlucky, but stays near the window
        assert (np.abs(value - H.mean(axis=0)) <= 10 * reach).all()
    assert np.median(errors) <= 2 * np.median(last)
    assert np.sqrt(np.mean(np.square(errors))) <= 2 * np.sqrt(np.mean(np.square(last)))
