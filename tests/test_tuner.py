"""The outer loop: updates, guard, modes, resume, and what it refuses."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import toys
from koopman_hpo_adapters.numpy import mlp

from koopman_hpo import (
    CheckpointError,
    DivergenceWarning,
    Global,
    Glocal,
    Guard,
    History,
    HyperparameterError,
    Local,
    Problem,
    ShapeError,
    Space,
    Tuner,
    checkpoint,
    hypergradient,
    inner,
    log,
    logit,
    outer,
)
from koopman_hpo.guard import coherence, flips
from koopman_hpo.outer import Outer

BATCHES, VAL = toys.batches(1, 40), [toys.data(7)]
SPACE = Space(lr=log(0.01), momentum=logit(0.8), l2=log(0.1))


def make(strategy=None, space=SPACE, options=None, **settings):
    run = inner.sgd(toys.logistic(np.linspace(-1, 1, 5)), space, **(options or {}))
    return Tuner(run, strategy, **{"steps": 120, "window": 20} | settings)


def same(a, b):
    left, right = a.arrays(), b.arrays()
    return left.keys() == right.keys() and all(
        np.array_equal(left[k], right[k], equal_nan=left[k].dtype.kind == "f") for k in left
    )


@pytest.mark.parametrize("strategy", [Local(), Glocal(), Global(), Local(mode="restart"), Glocal(mode="restart")])
def test_tunes_to_the_end_and_records_every_window(strategy):
    tuner = make(strategy, runs=4)
    result = tuner.fit(BATCHES, VAL)
    n = 6 if strategy.mode == "online" else 4
    assert result.reason == "finished"
    assert tuner.done
    assert len(result.history) == n
    assert result.history.phi.shape == result.history.estimate.shape == (n, 3)
    assert (result.history.event == "").all()
    assert np.isfinite(result.params).all()
    assert result.hyper == SPACE.natural(result.phi)
    assert result.steps == 120 if strategy.mode == "online" else result.steps > 120


def test_moves_against_the_hypergradient_of_the_window():
    tuner = make(Local())
    want = hypergradient(make().inner, [BATCHES[t] for t in range(20)], VAL[0]).grad
    for t in range(20):
        tuner.step(BATCHES[t], VAL[0])
    row = tuner.history[0]
    assert np.array_equal(row.h, want)
    assert np.array_equal(row.estimate, want)
    # the first step of Adam has the size lr, here .005 a step of the window
    np.testing.assert_allclose(row.move, 0.1 * np.sign(want), rtol=1e-6)
    assert np.array_equal(tuner.phi, SPACE.phi0 - row.move)


def test_restarts_take_strides_of_one_size_however_short_the_run():
    for cut in (0.1, 0.5):
        tuner = make(Local(mode="restart", cut=cut), runs=1)
        move = tuner.fit(BATCHES, VAL).history.move[0]
        np.testing.assert_allclose(np.abs(move), 0.6, rtol=1e-6)


def test_exact_restarts_find_the_best_regularisation():
    """Training loss 1/2 (t - 3)^2 + l2/2 t^2, outer 1/2 (t - 1)^2: training ends at t = 3 / (1 + l2), so l2 = 2."""

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        return 0.0, theta - 3 + hyper["l2"] * theta, Z * (1 + hyper["l2"]) + np.outer(dhyper["l2"], theta)

    problem = Problem(np.zeros(1), grad_jvp, lambda th, h, b: (0.5 * np.sum((th - 1) ** 2), th - 1, {}))
    tuner = Tuner(inner.sgd(problem, Space(l2=log(0.1)), lr=0.2), Global(), steps=60, runs=40)
    result = tuner.fit([None], [None])
    assert result.hyper["l2"] == pytest.approx(2.0, rel=0.05)
    assert result.params[0] == pytest.approx(1.0, rel=0.02)


def test_a_loop_of_ones_own_equals_fit():
    mine, theirs = make(Glocal()), make(Glocal())
    for t in range(120):
        mine.step(BATCHES[t % 40], VAL[0])
    theirs.fit(BATCHES, VAL)
    assert same(mine.history, theirs.history)
    with pytest.raises(RuntimeError, match="has ended"):
        mine.step(BATCHES[0], VAL[0])


@pytest.mark.parametrize("batches", [BATCHES, lambda t: BATCHES[t % 40], iter(BATCHES * 3)])
def test_batches_come_from_a_list_a_function_or_an_iterator(batches):
    assert same(make(Local()).fit(batches, VAL).history, make(Local()).fit(BATCHES, VAL).history)


def test_one_outer_batch_a_window():
    seen = []
    tuner = make(Glocal())
    tuner.fit(BATCHES, lambda n: seen.append(n) or VAL[0])
    assert seen == [0, 1, 2, 3, 4, 5]


def test_bounds_hold():
    space = Space(lr=log(0.01, bounds=(0.0099, 0.0101)), l2=log(0.1, bounds=(0.09, 0.11)))
    history = make(Local(), space).fit(BATCHES, VAL).history
    lr, l2 = np.exp(history.phi.T)
    assert lr.min() >= 0.0099 * (1 - 1e-12)
    assert lr.max() <= 0.0101 * (1 + 1e-12)
    assert l2.min() >= 0.09 * (1 - 1e-12)
    assert l2.max() <= 0.11 * (1 + 1e-12)
    np.testing.assert_allclose(history.phi[:-1] - history.move[:-1], history.phi[1:])


def test_callbacks_see_the_tuner_after_every_window():
    seen = []
    make(Local(), callbacks=[lambda t: seen.append((t.used, t.done))]).fit(BATCHES, VAL)
    assert seen == [(20 * n, n == 6) for n in range(1, 7)]


@pytest.mark.parametrize("make_outer", [outer.adam, outer.sgd, outer.sign])
def test_outer_optimizers_step_at_most_their_clip(make_outer):
    optimizer, rng = make_outer(), np.random.default_rng(0)
    state = optimizer.init(3)
    for scale in 10.0 ** rng.uniform(-6, 6, 50):
        step, state = optimizer.update(scale * rng.normal(size=3), state, 0.1)
        assert np.abs(step).max() <= 0.2 + 1e-15
    assert state.steps == 50


class Spy:
    """A strategy that notes what it is asked and believes the last value."""

    def __init__(self, mode="online", snapshots=1, cut=0.5):
        self.mode, self.snapshots, self.cut, self.asked = mode, snapshots, cut, []

    def estimate(self, H, ahead):
        self.asked.append((len(H), ahead))
        return Local().estimate(H, 0)


class Forgetful(Spy):
    def estimate(self, H, ahead):
        return H[-1]


def test_a_strategy_is_told_how_far_the_end_is():
    spy = Spy(snapshots=10)
    make(spy, steps=110).fit(BATCHES, VAL)  # ten snapshots of two steps a window, and a last window of ten steps
    assert spy.asked == [(10, 45), (10, 35), (10, 25), (10, 15), (10, 5), (10, 0)]
    spy = Spy("restart", 10)
    make(spy, runs=2).fit(BATCHES, VAL)
    assert spy.asked == [(10, 10), (10, 10)]


@pytest.mark.parametrize(("window", "snapshots"), [(41, 25), (64, 25), (20, 7)])
def test_snapshots_are_evenly_spaced_up_to_the_windows_end(window, snapshots):
    history = make(Spy(snapshots=snapshots), steps=window, window=window).fit(BATCHES, VAL).history
    steps = history.trajectory_step
    assert steps[-1] == window
    assert len(set(np.diff(steps))) == 1


def test_tangents_are_forgotten_by_rho_a_step():
    tuner, twin = make(Local(), forget=0.9), make(Local())
    for t in range(20):
        tuner.step(BATCHES[t], VAL[0])
        twin.inner.step(SPACE.phi0, BATCHES[t])
    np.testing.assert_allclose(tuner.inner.tangents, 0.9**20 * twin.inner.tangents, rtol=1e-13)


def test_outer_adam_is_adam():
    rng, state, adam = np.random.default_rng(0), outer.adam().init(2), outer.adam(b1=0.3, b2=0.9, clip=1e9)
    m, v = np.zeros(2), np.zeros(2)
    for t in range(1, 8):
        h = rng.normal(size=2)
        m, v = 0.3 * m + 0.7 * h, 0.9 * v + 0.1 * h**2
        step, state = adam.update(h, state, 0.2)
        np.testing.assert_allclose(step, 0.2 * m / (1 - 0.3**t) / np.sqrt(v / (1 - 0.9**t)), rtol=1e-10)


def test_a_short_last_window_takes_a_short_step():
    history = make(Local(), steps=50, window=20).fit(BATCHES, VAL).history
    assert np.abs(history.move[-1]).max() <= 2 * 0.005 * 10 + 1e-15
    assert np.abs(history.move[0]).max() > 0.09


def test_a_forecast_is_kept_within_its_clip(monkeypatch):
    from koopman_hpo import koopman

    real = koopman.extrapolate
    far = lambda H, ahead, method: replace(real(H, 0, "last"), value=np.full(3, 1e9))
    monkeypatch.setattr(koopman, "extrapolate", far)
    history = make(Glocal(clip=2.0)).fit(BATCHES, VAL).history
    top = np.abs(history.trajectory[:20]).max(axis=0)
    np.testing.assert_allclose(history.estimate[0], 2 * top)


def test_the_best_window_is_kept_beside_the_last():
    result = make(Local(), steps=110).fit(BATCHES, VAL)
    i = int(result.history.value.argmin())
    assert result.best.value == result.history.value[i]
    assert np.array_equal(result.best.phi, result.history.phi[i])
    run = make().inner
    run.restore(run.snapshot() | {"theta": result.best.params})
    assert run.problem.outer(result.best.params, {"l2": np.exp(result.best.phi[2])}, VAL[0])[0] == pytest.approx(
        result.best.value, rel=1e-12
    )


def test_restart_returns_the_best_full_run():
    result = make(Global(), runs=6, space=Space(lr=log(0.05), l2=log(1e-3))).fit(BATCHES, VAL)
    values = result.history.value
    assert result.value <= values.min()
    assert result.value == result.best.value
    if result.value == values.min():
        assert np.array_equal(result.phi, result.history.phi[values.argmin()])


def test_random_directions_are_fresh_in_every_run():
    space = Space(lr=log([0.01] * 5), l2=log(0.1))
    tuner = make(Global(), space, {"directions": 2, "groups": (1,) * 5}, runs=6)
    estimates = tuner.fit(BATCHES, VAL).history.estimate
    assert np.linalg.matrix_rank(estimates) == 6  # one draw of two directions would span two dimensions for ever


# -- when things go wrong ----------------------------------------------------------------------------------------------


def blow_up(lr=1e6, **settings):
    """Gradient descent on a quadratic, which explodes for lr > 2."""
    problem = toys.quadratic(np.eye(3), np.zeros(3), np.ones(3))
    return Tuner(inner.sgd(problem, Space(lr=log(lr))), Local(), **{"steps": 400, "window": 10} | settings)


def test_divergence_is_rolled_back_until_training_works():
    tuner = blow_up()
    with np.errstate(all="ignore"):
        result = tuner.fit([None], [None])
    events = [e for e in result.history.event if e]
    assert len(events) >= 12  # 1e6 / 3^12 = 1.9
    assert all(e.startswith("rolled back") for e in events)
    assert result.value < 1e-3
    assert result.hyper["lr"] < 2
    assert result.reason == "finished"
    assert np.isfinite(result.params).all()
    np.testing.assert_allclose(result.history.phi[0] - result.history.phi[1], np.log(3))


def test_a_rollback_returns_to_the_windows_start_bit_for_bit():
    tuner = blow_up(lr=0.5)
    for _ in range(10):
        tuner.step(None, None)
    good = tuner.inner.params
    tuner.phi = np.log([1e300])
    with np.errstate(all="ignore"):
        while len(tuner.history) < 2:
            tuner.step(None, None)
    assert np.array_equal(tuner.inner.params, good)
    assert not tuner.inner.tangents.any()
    assert "inner loss is" in tuner.history.event[1] or "validation loss" in tuner.history.event[1]


def test_divergence_that_nothing_can_stop_ends_tuning_with_the_last_good_parameters():
    problem = toys.quadratic(np.eye(3), np.zeros(3), np.ones(3))
    tuner = Tuner(inner.sgd(problem, Space(momentum=logit(0.5)), lr=1e9), Local(), steps=400, window=10)
    with np.errstate(all="ignore"), pytest.warns(DivergenceWarning, match="Tune lr"):
        result = tuner.fit([None], [None])
    assert result.reason.startswith("stopped: 3 rollbacks")
    assert (result.params == 1).all()
    assert result.steps < 400
    assert result.history.event[-1].endswith("stopped")


def test_a_refused_validation_batch_leaves_the_window_open():
    tuner = make(Local())
    for t in range(19):
        tuner.step(BATCHES[t], VAL[0])
    with pytest.raises(TypeError, match="unpack"):
        tuner.step(BATCHES[19], None)
    assert (tuner.used, tuner.state.window.done, len(tuner.history)) == (19, 19, 0)
    tuner.step(BATCHES[19], VAL[0])
    assert len(tuner.history) == 1


def test_a_hypergradient_that_was_not_finite_for_a_moment_is_rolled_back():
    tuner = make(Glocal())
    real = tuner.inner.hypergradient
    tuner.inner.hypergradient = lambda b: real(b)._replace(grad=np.full(3, np.inf if tuner.used == 4 else 1e-3))
    for t in range(20):
        tuner.step(BATCHES[t], VAL[0])
    assert tuner.history.event[0] == "rolled back: hypergradient is not finite"


def test_patience_is_limited():
    tuner = blow_up(lr=1e9, guard=Guard(patience=4))
    with np.errstate(all="ignore"), pytest.warns(DivergenceWarning, match="smaller lr"):
        assert tuner.fit([None], [None]).reason.startswith("stopped: 4 rollbacks")


def test_without_a_guard_only_what_is_not_finite_is_rolled_back():
    tuner = blow_up(lr=3.0, guard=None, steps=50)
    tuner.fit([None], [None])
    assert (tuner.history.event == "").all()
    assert tuner.history.value[-1] > 1.5


def test_a_hypergradient_that_promises_too_much_is_recorded_and_not_used():
    tuner = make(Local(), guard=Guard(excess=1e-9))
    result = tuner.fit(BATCHES, VAL)
    assert all(e.startswith("not used, excess") for e in result.history.event)
    assert np.array_equal(result.phi[1:], SPACE.phi0[1:])
    np.testing.assert_allclose(result.history.move, [[np.log(3), 0, 0]] * 6)  # only the step size shrinks
    assert np.isfinite(result.history.estimate).all()


def test_training_does_not_stay_at_the_edge_of_stability():
    # gradient descent at lr 2 on a quadratic of curvature 1: |theta| stays, h grows without bound
    result = blow_up(lr=1.999).fit([None], [None])
    assert any("excess" in e for e in result.history.event)
    assert result.value < 1e-6


def test_chaos_needs_growth_and_flips():
    guard, h = Guard(), np.array([0.1])
    flipping, steady = np.array([[1.0], [-1.0]] * 10), np.ones((20, 1))
    assert guard.doubt(h, 0.1, 1.0, 0.01, flipping).startswith("chaos")
    assert guard.doubt(h, 0.1, 1.0, 0.01, steady) == ""
    assert guard.doubt(h, 0.1, 1.0, 0.001, flipping) == ""
    assert guard.doubt(h, 0.1, 1.0, np.nan, flipping) == ""
    assert guard.doubt(100 * h, 0.2, 1.0, np.nan, steady).startswith("excess")
    assert guard.doubt(100 * h, 0.2, 0.0, np.nan, steady) == ""  # no scale to compare with


def test_coherence_tells_a_steady_sign_from_a_coin_toss():
    H = np.array([[1.0, 1.0, 0.0], [2.0, -1.0, 0.0]] * 6)
    np.testing.assert_allclose(coherence(H), [1.0, 0.0, 1.0])
    assert flips(H) == 1.0
    assert flips(H[:, :1]) == 0.0
    assert flips(H[:4]) == 0.0


def test_a_restart_that_diverges_begins_again_with_a_smaller_lr():
    tuner = blow_up(lr=100.0, steps=30, runs=12)
    tuner = Tuner(tuner.inner, Global(), steps=30, runs=12)
    with np.errstate(all="ignore"):
        result = tuner.fit([None], [None])
    assert result.history.event[0].startswith("rolled back")
    assert result.value < 1e-3


def test_the_horizon_doubles_when_outer_gradients_oppose_each_other():
    class Flip:
        mode, snapshots, cut, sign = "restart", 1, 0.1, 1.0

        def estimate(self, H, ahead):
            Flip.sign *= -1
            return replace(Local().estimate(H, 0), value=np.full(3, Flip.sign))

    tuner, cuts = make(Flip(), runs=6), []
    tuner.callbacks = (lambda t: cuts.append(t.cut),)
    tuner.fit(BATCHES, VAL)
    assert cuts == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_random_directions_tune_too():
    space = Space(lr=log([0.01] * 5), l2=log(0.1))
    tuner = make(Glocal(), space, {"directions": 2, "groups": (1,) * 5})
    directions = [tuner.inner.directions]
    tuner.callbacks = (lambda t: directions.append(t.inner.directions),)
    result = tuner.fit(BATCHES, VAL)
    assert result.reason == "finished"
    assert not np.array_equal(directions[0], directions[1])


class Push:
    """A strategy for restarts that asks for a larger step size, come what may."""

    mode, snapshots, cut = "restart", 1, 0.1

    def __init__(self, pull):
        self.pull = pull

    def estimate(self, H, ahead):
        return replace(Local().estimate(H, 0), value=np.array([-self.pull]))


def test_a_final_run_that_diverges_is_repeated_with_a_smaller_step():
    """Cut to ten steps, lr 1.9 is fine and the update to 2.6 is never tried: the final run finds out."""
    tuner = blow_up(lr=1.9)
    tuner = Tuner(tuner.inner, Push(1.0), steps=200, runs=1)
    result = tuner.fit([None], [None])
    assert result.history.event[-1].startswith("final run rolled back")
    assert result.value < 1e-9
    assert result.hyper["lr"] < 2
    assert result.reason == "finished"


def test_a_final_run_that_cannot_be_saved_leaves_the_best_run_before_it():
    problem = toys.quadratic(np.eye(3), np.zeros(3), np.ones(3))
    run = inner.sgd(problem, Space(momentum=logit(0.1)), lr=2.15)  # stable for lr < 2 (1 + momentum)
    tuner = Tuner(run, Push(-1.0), steps=4000, runs=1, outer=outer.sgd(1.0))  # one step down, to momentum .04
    with np.errstate(all="ignore"), pytest.warns(DivergenceWarning, match="final run diverged"):
        result = tuner.fit([None], [None])
    assert result.value == result.history.value[0] < 1.5
    assert np.isfinite(result.params).all()
    assert result.best.steps == 400
    assert np.array_equal(result.phi, result.history.phi[0])


def test_fitting_again_changes_nothing():
    tuner = make(Global(), runs=2)
    first = tuner.fit(BATCHES, VAL)
    again = tuner.fit(BATCHES, VAL)
    assert (first.steps, first.value) == (again.steps, again.value)


def test_a_doubted_restart_begins_again_with_a_smaller_step():
    result = make(Global(), guard=Guard(excess=1e-9), runs=3).fit(BATCHES, VAL)
    assert all(e.startswith("not used, excess") for e in result.history.event)
    np.testing.assert_allclose(result.history.phi[:, 0], np.log(0.01) - np.log(3) * np.arange(3))


def test_a_doubted_restart_with_nothing_to_shrink_follows_the_sign():
    space = Space(momentum=logit(0.9), l2=log(0.013))
    history = make(Global(), space, {"lr": 0.01}, guard=Guard(excess=1e-9), runs=3).fit(BATCHES, VAL).history
    assert (history.event == "").all()
    assert (history.move != 0).all()


def test_shrinking_moves_the_step_size_alone():
    rng = np.random.default_rng(0)
    space = Space(lr=log(0.1, bounds=(0.05, 1)), momentum=logit(0.7), l2=log(0.013))
    for _ in range(50):
        phi = space.phi0 + 0.1 * rng.normal(size=3)
        shrunk = Guard().shrunk(space, phi)
        assert np.array_equal(shrunk[1:], phi[1:])
        assert np.exp(shrunk[0]) == pytest.approx(max(np.exp(phi[0]) / 3, 0.05))


class Doubting(Guard):
    """Finds the windows of these numbers excessive: those that end with these numbers of hypergradients recorded."""

    windows = (2, 5)

    def doubt(self, h, lr, start, growth, recent):
        return "excess: planted" if len(recent) in self.windows else ""


def test_an_early_excess_begins_training_again_and_a_late_one_goes_on():
    tuner = make(Local(), guard=Doubting(again=0.5))
    first, shrink = tuner.inner.params.copy(), np.array([np.log(3), 0, 0])
    for t in range(120):
        tuner.step(BATCHES[t % 40], VAL[0])
        if t == 39:
            assert np.array_equal(tuner.inner.params, first)
            assert tuner.inner.tangent_norm() == 0
        if t == 99:
            assert not np.array_equal(tuner.inner.params, first)
    history = tuner.history
    assert [e[:21] for e in history.event] == ["", "rolled back: excess: ", "", "", "not used, excess: pla", ""]
    np.testing.assert_allclose(history.phi[2], history.phi[1] - shrink)
    np.testing.assert_allclose(history.phi[5], history.phi[4] - shrink)
    assert tuner.used == 120


def test_early_rollbacks_in_a_row_shrink_faster_and_faster():
    with np.errstate(all="ignore"):
        history = blow_up(1e9, guard=Guard(again=0.1)).fit([None], [None]).history
    assert all(e.startswith("rolled back") for e in history.event[:7])
    want = np.log(3) * np.where(history.step[:7] <= 40, [1, 2, 3, 3, 3, 3, 3], 1)
    np.testing.assert_allclose(history.move[:7, 0], want, rtol=1e-12)
    assert len(set(want)) == 3  # late ones among them


@pytest.mark.parametrize("fall", [0.5, 1.0, 2.0])
def test_the_step_size_falls_no_faster_than_a_decay_over_what_is_left(fall):
    """Every estimate asks for less lr by far: lr is a power of the linear decay, exactly; the others move as they like."""
    tuner = make(Local(), outer=outer.sgd(5.0, clip=1.0), guard=Guard(fall=fall))
    tuner.strategy = Always(np.array([1.0, 0.3, -0.2]))
    phi = tuner.fit(BATCHES, VAL).history.phi
    left = 120 - 20 * np.arange(6)
    np.testing.assert_allclose(np.exp(phi[:, 0]), 0.01 * ((left + 1) / 121) ** fall, rtol=1e-12)
    np.testing.assert_allclose(phi[1, 1:], SPACE.phi0[1:] - [1.5, -1.0])


def test_the_step_size_rises_as_if_nothing_limited_its_fall():
    space = Space(lr=log([0.01, 0.02]), momentum=logit(0.8))
    phi, target = space.phi0, space.phi0 + np.array([0.7, -0.7, -2.0])
    moved = Guard(fall=1.0).slowed(space, phi, target, 10, 9)
    np.testing.assert_allclose(moved, [target[0], phi[1] - np.log(2), target[2]])
    assert Guard().slowed(space, phi, target, 10, 9) is target
    np.testing.assert_array_equal(Guard(fall=1e6).slowed(space, phi, target, 10, 9), target)
    floor = Space(lr=log([0.01, 0.02], bounds=(1e-3, 1)), momentum=logit(0.8))
    np.testing.assert_allclose(Guard(shrink=1e200).shrunk(floor, phi, 3)[:2], np.log(1e-3))


class Always:
    """A strategy with one answer."""

    mode, snapshots, cut = "online", 1, 0.1

    def __init__(self, value):
        self.value = value

    def estimate(self, H, ahead):
        return replace(Local().estimate(H, 0), value=self.value)


@pytest.mark.parametrize("stop", [10, 30, 50])
def test_a_resumed_run_knows_where_training_began(stop):
    """Resumed by a tuner whose own run stands elsewhere, before and after training has begun again."""
    guard = Doubting(again=0.5, fall=1.0)
    object.__setattr__(guard, "windows", (2, 3))
    whole, first = make(Local(), guard=guard), make(Local(), guard=guard)
    for t in range(120):
        whole.step(BATCHES[t % 40], VAL[0])
    for t in range(stop):
        first.step(BATCHES[t % 40], VAL[0])
    moved = inner.sgd(toys.logistic(np.linspace(-1, 1, 5)), SPACE)
    moved.step(SPACE.phi0, BATCHES[3])
    second = Tuner(moved, Local(), steps=120, window=20, guard=guard)
    second.restore(first.snapshot())
    for t in range(stop, 120):
        second.step(BATCHES[t % 40], VAL[0])
    assert [bool(e) for e in whole.history.event] == [False, True, True, False, False, False]
    assert same(second.history, whole.history)
    assert np.array_equal(second.inner.params, whole.inner.params)


def test_the_outer_optimizer_forgets_after_a_rollback():
    tuner = blow_up(lr=3.0, steps=20)
    tuner.state = tuner.state._replace(outer=tuner.outer.init(1)._replace(square=np.array([1e30]), steps=5))
    for _ in range(10):
        tuner.step(None, None)
    assert tuner.history.event[0].startswith("rolled back")
    assert tuner.state.outer.steps == 0
    assert tuner.state.outer.square == 0


@pytest.mark.parametrize("window", [20, 30, 40, 200])
def test_chaos_is_seen_at_any_window(window):
    """Tangents that double in a hundred steps and a hypergradient that flips, seen through the tuner."""
    tuner = make(Spy(snapshots=20), steps=800, window=window)
    tuner.inner.tangent_norm = lambda: 2.0 ** (tuner.used / 100)
    tuner.inner.hypergradient = lambda batch, real=tuner.inner.hypergradient: real(batch)._replace(
        grad=np.full(3, 1e-3 * (-1) ** tuner.used)
    )
    tuner.every = 1
    events = tuner.fit(BATCHES, VAL).history.event
    assert any(e.startswith("not used, chaos: tangents grow by 0.0069") for e in events)


def test_a_loss_that_starts_at_zero_has_no_scale_to_stray_from():
    assert Guard().stray("loss", 1e-9, 0.0) == ""
    assert Guard().stray("loss", 1.6, 1.0) != ""
    assert Guard().stray("loss", -0.4, -1.0) != ""
    assert Guard().stray("loss", -0.6, -1.0) == ""


# -- interrupted -------------------------------------------------------------------------------------------------------


class Once:
    """Wraps a method so that its n-th call raises, before it does anything or after, and no other does."""

    def __init__(self, owner, name, n, error=KeyboardInterrupt, late=False):
        self.real, self.left, self.error, self.late = getattr(owner, name), n, error, late
        object.__setattr__(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        out = self.real(*args, **kwargs) if self.left or self.late else None
        if self.left == 0:
            raise self.error("interrupted")
        return out


def whole_and_interrupted(strategy, spoil):
    """Results of a run that goes through, and of one that fails once on its way and is begun again."""
    want, cut = make(strategy, runs=3).fit(BATCHES, VAL), make(strategy, runs=3)
    spoil(cut)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(BATCHES, VAL)
    return want, cut


def equal(a, b):
    return (
        same(a.history, b.history)
        and np.array_equal(a.params, b.params)
        and np.array_equal(a.phi, b.phi)
        and (a.value, a.steps, a.reason) == (b.value, b.steps, b.reason)
    )


@pytest.mark.parametrize("strategy", [Local(), Glocal(), Glocal(mode="restart")])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: Once(t.strategy, "estimate", 2),
        lambda t: Once(t.strategy, "estimate", 2, late=True),
        lambda t: Once(t.inner, "hypergradient", 4),
        lambda t: Once(t.inner, "hypergradient", 4, late=True),
        lambda t: Once(t.inner, "tangent_norm", 2),
        lambda t: Once(t.inner, "step", 27),
    ],
)
def test_a_run_that_fails_on_its_way_goes_on_as_if_nothing_had_been(tmp_path, strategy, spoil):
    want, cut = whole_and_interrupted(replace(strategy), spoil)
    path = checkpoint.save(tmp_path / "cut.npz", cut)
    assert equal(cut.fit(BATCHES, VAL), want)
    resumed = checkpoint.load(path, make(replace(strategy), runs=3))
    assert equal(resumed.fit(BATCHES, VAL), want)


@pytest.mark.parametrize("strategy", [Local(), Glocal()])
def test_a_run_that_refuses_to_forget_has_recorded_nothing(strategy):
    want, cut = whole_and_interrupted(replace(strategy), lambda t: Once(t.inner, "forget", 2))
    assert equal(cut.fit(BATCHES, VAL), want)


def test_an_outer_optimizer_that_fails_leaves_the_window_open():
    whole, cut = make(Local()), make(Local())
    real, calls = cut.outer.update, []
    cut.outer = cut.outer._replace(update=lambda *a: calls.append(1) or (1 / 0 if len(calls) == 2 else real(*a)))
    with pytest.raises(ZeroDivisionError):
        cut.fit(BATCHES, VAL)
    assert (cut.used, len(cut.history)) == (39, 1)
    assert equal(cut.fit(BATCHES, VAL), whole.fit(BATCHES, VAL))


def test_a_callback_that_fails_does_not_undo_the_window():
    cut = make(Local(), callbacks=[lambda t: 1 / 0])
    with pytest.raises(ZeroDivisionError):
        cut.fit(BATCHES, VAL)
    cut.callbacks = ()
    assert equal(cut.fit(BATCHES, VAL), make(Local()).fit(BATCHES, VAL))


@pytest.mark.parametrize("n", [1, 5, 100])
def test_an_interrupted_final_run_is_begun_again(tmp_path, n):
    want, cut = make(Global(), runs=2).fit(BATCHES, VAL), make(Global(), runs=2)
    Once(cut.inner, "step", 240 + n)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(BATCHES, VAL)
    path = checkpoint.save(tmp_path / "cut.npz", cut)
    assert equal(cut.fit(BATCHES, VAL), want)
    assert equal(checkpoint.load(path, make(Global(), runs=2)).fit(BATCHES, VAL), want)


def test_the_next_call_settles_a_step_whose_hypergradient_failed():
    one, two = make(Local()), make(Local())
    for t in range(20):
        one.step(BATCHES[t], VAL[0])
    for t in range(19):
        two.step(BATCHES[t], VAL[0])
    with pytest.raises(TypeError, match="unpack"):
        two.step(BATCHES[19], None)
    assert two.inner.t == 20
    two.step("not looked at", VAL[0])
    assert same(one.history, two.history)
    assert np.array_equal(one.inner.params, two.inner.params)


def test_callbacks_may_come_from_a_generator():
    seen = []
    make(Local(), callbacks=(call for call in [lambda t: seen.append(t.used)])).fit(BATCHES, VAL)
    assert seen == [20, 40, 60, 80, 100, 120]


def test_a_run_belongs_to_one_tuner():
    one = make(Local())
    two = Tuner(one.inner, Local(), steps=120, window=20)
    one.step(BATCHES[0], VAL[0])
    with pytest.raises(RuntimeError, match="a run of its own"):
        two.step(BATCHES[0], VAL[0])


def test_a_copy_is_a_tuner_of_its_own():
    one = make(Glocal())
    for t in range(30):
        one.step(BATCHES[t], VAL[0])
    two = copy.deepcopy(one)
    first = one.fit(BATCHES, VAL)
    assert two.used == 30
    assert equal(two.fit(BATCHES, VAL), first)
    assert two.inner.problem.params is not None


def test_a_snapshot_stays_as_it_is():
    tuner = make(Local(), steps=400)
    for t in range(20):
        tuner.step(BATCHES[t], VAL[0])
    saved = tuner.snapshot()
    before = repr(saved)
    tuner.fit(BATCHES, VAL)
    assert repr(saved) == before


def test_the_growth_of_tangents_is_not_measured_across_runs():
    tuner = make(Global(), runs=3)
    sizes = []
    tuner.callbacks = (lambda t: sizes.append(len(t.state.norms)),)
    tuner.fit(BATCHES, VAL)
    assert sizes == [0, 0, 0]


def test_an_estimate_that_is_not_finite_is_recorded_and_not_used():
    class Lost(Spy):
        def estimate(self, H, ahead):
            return replace(super().estimate(H, ahead), value=np.full(3, np.nan))

    result = make(Lost()).fit(BATCHES, VAL)
    assert (result.history.event == "not used, the estimate is not finite").all()
    assert np.array_equal(result.phi, SPACE.phi0)


def test_a_run_that_never_had_a_good_window_says_so():
    tuner = blow_up(lr=1e9, steps=60)
    with np.errstate(all="ignore"), pytest.warns(DivergenceWarning, match="every window was rolled back"):
        result = tuner.fit([None], [None])
    assert np.isnan(result.value)
    assert result.reason == "finished, but every window was rolled back"
    assert (result.params == 1).all()


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Local(), Glocal(), Global(), Glocal(mode="restart")])
@pytest.mark.parametrize("at", [0, 1, 20, 33, 119])
@pytest.mark.parametrize("options", [{}, {"directions": 2, "seed": 5}])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, strategy, at, options):
    whole, cut = (make(strategy, options=options, runs=3) for _ in range(2))
    want = whole.fit(BATCHES, VAL)
    for t in range(at):
        if not cut.done:  # a restart cut short ends sooner
            cut.step(BATCHES[t % 40], VAL[0])
    path = checkpoint.save(tmp_path / "run.npz", cut)
    fresh = make(strategy, options=options, runs=3)
    fresh.inner.run(SPACE.phi0, BATCHES[:2], VAL[0])  # whatever it did before is replaced
    got = checkpoint.load(path, fresh).fit(BATCHES, VAL)
    assert same(got.history, want.history)
    assert np.array_equal(got.params, want.params)
    assert np.array_equal(got.phi, want.phi)
    assert (got.value, got.steps, got.reason) == (want.value, want.steps, want.reason)


def test_a_resumed_run_remembers_its_rollbacks(tmp_path):
    whole, cut, fresh = blow_up(), blow_up(), blow_up()
    with np.errstate(all="ignore"):
        want = whole.fit([None], [None])
        for _ in range(35):
            cut.step(None, None)
        checkpoint.save(tmp_path / "run.npz", cut)
        got = checkpoint.load(tmp_path / "run.npz", fresh).fit([None], [None])
    assert same(got.history, want.history)


def test_a_history_survives_its_file(tmp_path):
    history = make(Glocal()).fit(BATCHES, VAL).history
    assert same(History.load(history.save(tmp_path / "h.npz")), history)
    assert not list(tmp_path.glob(".*"))  # no temporary file stays


def test_a_history_knows_its_natural_values(tmp_path):
    history = make(Local()).fit(BATCHES, VAL).history
    loaded = History.load(history.save(tmp_path / "h.npz"))
    for i, row in enumerate(loaded.natural):
        assert dict(zip(SPACE.names, row, strict=True)) == pytest.approx(SPACE.natural(history.phi[i]))


def write(path, content):
    path.write_bytes(content)
    return path


def foreign(path):
    np.savez(path, a=np.ones(3))
    return path


def pickled(path):
    np.savez(path, a=np.array([{}], dtype=object))
    return path


def truncated(path):
    checkpoint.save(path, make())
    path.write_bytes(path.read_bytes()[:-200])
    return path


def versioned(path):
    from koopman_hpo import files

    version, files.VERSION = files.VERSION, 99
    try:
        return checkpoint.save(path, make())
    finally:
        files.VERSION = version


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p, "no file"),
        (lambda p: write(p, b""), "corrupt"),
        (lambda p: write(p, b"hello"), "corrupt"),
        (foreign, "not written by koopman_hpo"),
        (pickled, "corrupt"),
        (truncated, "corrupt"),
        (versioned, "version 99"),
        (make().history.save, "holds a history"),
        (lambda p: checkpoint.save(p, make(steps=121)), "steps was 121"),
        (lambda p: checkpoint.save(p, make(Local())), "strategy"),
        (lambda p: checkpoint.save(p, make(space=Space(lr=log(0.01)))), "space was"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_moves(tmp_path, spoil, says):
    tuner, twin = make(), make()
    for t in range(30):
        tuner.step(BATCHES[t], VAL[0])
        twin.step(BATCHES[t], VAL[0])
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load(spoil(tmp_path / "x.npz"), tuner)
    assert np.array_equal(tuner.inner.params, twin.inner.params)
    assert same(tuner.history, twin.history)


def test_another_model_is_refused_and_nothing_moves(tmp_path):
    path = checkpoint.save(tmp_path / "x.npz", make())
    other = Tuner(inner.sgd(toys.logistic(np.ones(7)), SPACE), None, steps=120, window=20)
    with pytest.raises(CheckpointError, match=r"groups=\(5,\)"):
        checkpoint.load(path, other)
    assert other.used == 0


def refused(tmp_path, change, says):
    """A checkpoint with one entry changed is refused, and the tuner stays as it is."""
    saved, tuner, twin = make(), make(), make()
    for t in range(30):
        for each in (saved, tuner, twin):
            each.step(BATCHES[t], VAL[0])
    snapshot = saved.snapshot()
    change(snapshot)
    with pytest.raises((CheckpointError, ShapeError), match=says):
        tuner.restore(snapshot)
    assert equal(tuner.fit(BATCHES, VAL), twin.fit(BATCHES, VAL))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(mean=np.zeros(2)), "mean does not fit"),
        (lambda s: s.update(square=np.full(3, np.nan)), "square does not fit"),
        (lambda s: s.update(phi=np.full(3, np.inf)), "phi does not fit"),
        (lambda s: s.update(H=np.zeros((1, 2))), "H does not fit"),
        (lambda s: s.update(H=np.zeros((99, 3))), "window does not fit"),
        (lambda s: s["meta"]["window"].update(done=20), "window does not fit"),
        (lambda s: s["meta"]["window"].pop("done") and None, "used does not fit|window does not fit"),
        (lambda s: s["meta"]["scalars"].update(cut=7.0), "cut does not fit"),
        (lambda s: s["meta"]["scalars"].update(norms=[[1]]), "something is missing"),
        (lambda s: s["meta"]["scalars"].update(surprise=1), "something is missing"),
        (lambda s: s["meta"].pop("best"), "something is missing"),
        (lambda s: s.pop("meta"), "meta"),
        (lambda s: s.pop("start/theta"), "theta must be"),
        (lambda s: s.pop("inner/t"), "t must be"),
        (lambda s: s.update({"inner/Z": np.zeros((3, 4))}), "Z must be"),
        (lambda s: s.update({"best/params": np.zeros(2)}), "best/params does not fit"),
        (lambda s: s.update({"history/labels": np.array(["a", "b", "c"])}), "history is of"),
    ],
)
def test_a_snapshot_that_is_not_whole_is_refused_and_nothing_moves(tmp_path, change, says):
    refused(tmp_path, change, says)


def test_a_run_along_random_directions_is_not_an_exact_one(tmp_path):
    random = make(options={"directions": 3, "seed": 1})
    with pytest.raises(CheckpointError, match="directions"):
        checkpoint.load(checkpoint.save(tmp_path / "x.npz", random), make())


@pytest.mark.parametrize("other", [{"activation": "relu"}, {"l2": 0.2}, {"class_weights": [1.0, 2.0, 1.0]}])
def test_a_checkpoint_of_another_model_of_the_same_size_is_refused(tmp_path, other):
    ready = lambda **terms: Tuner(inner.sgd(mlp((4, 3, 3), **terms), Space(lr=log(0.1))), steps=40, window=20)
    path = checkpoint.save(tmp_path / "x.npz", ready())
    assert checkpoint.load(path, ready(seed=5)).used == 0  # where it starts is in the file
    with pytest.raises(CheckpointError, match="inner was"):
        checkpoint.load(path, ready(**other))


def test_settings_may_be_numpy_numbers(tmp_path):
    tuner = make(Local(), steps=np.int64(120), window=np.int32(20), runs=np.int16(3), forget=np.float32(0.5))
    path = checkpoint.save(tmp_path / "x.npz", tuner)
    assert checkpoint.load(path, make(Local(), runs=3, forget=0.5)).used == 0


def test_a_strategy_without_a_repr_can_be_resumed(tmp_path):
    path = checkpoint.save(tmp_path / "x.npz", make(Push(1.0)))
    checkpoint.load(path, make(Push(1.0)))
    with pytest.raises(CheckpointError, match=r"Push\(pull=1.0\)"):
        checkpoint.load(path, make(Push(2.0)))


def optimizer(make_inner, **fixed):
    return Tuner(make_inner(toys.logistic(np.ones(5)), SPACE, **fixed), steps=120, window=20)


@pytest.mark.parametrize(
    "other",
    [
        lambda: optimizer(inner.sgd, nesterov=True),
        lambda: optimizer(inner.sgd, dampening=0.5),
        lambda: Tuner(optimizer(inner.sgd).inner, steps=120, window=20, outer=outer.adam(clip=9)),
        lambda: make(space=Space(lr=logit(0.01), momentum=logit(0.8), l2=log(0.1))),
        lambda: make(space=Space(lr=log(0.01, bounds=(1e-3, 1)), momentum=logit(0.8), l2=log(0.1))),
    ],
)
def test_a_run_under_other_rules_is_refused(tmp_path, other):
    path = checkpoint.save(tmp_path / "x.npz", optimizer(inner.sgd))
    with pytest.raises(CheckpointError, match="when it was saved"):
        checkpoint.load(path, other())


def test_other_shares_are_other_rules(tmp_path):
    shared = lambda *shares: make(space=Space(lr=log(0.01, shares=shares), momentum=logit(0.8), l2=log(0.1)))
    path = checkpoint.save(tmp_path / "x.npz", shared(1))
    assert checkpoint.load(path, shared(1)).state.used == 0
    with pytest.raises(CheckpointError, match="when it was saved"):
        checkpoint.load(path, shared(2))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path / "x.npz", make())
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, make())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: make(steps=0), HyperparameterError, "steps must be"),
        (lambda: make(steps=10, window=11), HyperparameterError, "longer than the run"),
        (lambda: make(window=0), HyperparameterError, "window must be"),
        (lambda: make(window=2.5), HyperparameterError, "window must be"),
        (lambda: make(every=0), HyperparameterError, "every must be"),
        (lambda: make(every=21), HyperparameterError, "records nothing"),
        (lambda: make(forget=1.5), HyperparameterError, "forget"),
        (lambda: make(mode="onlin"), HyperparameterError, "'online' or 'restart'"),
        (lambda: make(Global(), mode="online"), HyperparameterError, "Global needs mode='restart'"),
        (lambda: make(phi=np.zeros(2)), ShapeError, r"\(q,\)"),
        (lambda: make("glocal"), HyperparameterError, "strategy"),
        (lambda: make(outer="adam"), HyperparameterError, "outer must be"),
        (lambda: make(guard=True), HyperparameterError, "guard must be"),
        (lambda: make(guard=Guard(shrink_names=("momentun",))), HyperparameterError, "Did you mean 'momentum'"),
        (lambda: make(callbacks=3), HyperparameterError, "callbacks must be"),
        (lambda: make(callbacks=[3]), HyperparameterError, "callbacks must be"),
        (lambda: make(forget="x"), HyperparameterError, "forget"),
        (lambda: make(phi="x"), ShapeError, "phi must be"),
        (lambda: make(Glocal), HyperparameterError, "strategy must be"),
        (lambda: checkpoint.save("x.npz", 3), CheckpointError, "must be a Tuner"),
        (lambda: Tuner(np.ones(3), steps=10), HyperparameterError, "must be an Inner"),
        (lambda: make(space=Space(), options={"lr": 0.1}), HyperparameterError, "nothing to tune"),
        (lambda: Glocal(method="afine"), HyperparameterError, "Did you mean"),
        (lambda: Glocal(clip=0), HyperparameterError, "clip"),
        (lambda: Global(mode="online"), HyperparameterError, "Global"),
        (lambda: Guard(factor=0.5), HyperparameterError, "factor > 1"),
        (lambda: outer.adam(-1.0), HyperparameterError, "lr must be positive"),
        (lambda: outer.adam(b1=1.0), HyperparameterError, "b1"),
        (lambda: outer.sgd(clip=0), HyperparameterError, "clip"),
        (lambda: make().fit([], VAL), ShapeError, "batches is empty"),
        (lambda: make().fit(iter([]), VAL), ShapeError, "batches is empty"),
        (lambda: make(Local()).fit(iter(BATCHES), VAL), ShapeError, "ran out"),
        (lambda: make().fit(BATCHES[0], VAL), ShapeError, r"write \[batch\]"),
        (lambda: make().fit(BATCHES, VAL[0]), ShapeError, r"val_batches must be a list"),
        (lambda: make().fit(BATCHES, 3), ShapeError, "val_batches must be"),
        (lambda: blow_up().step(None, "nan"), ShapeError, "validation batch"),
        (lambda: make().restore({}), CheckpointError, "meta"),
        (lambda: make().restore(None), CheckpointError, "meta"),
        (lambda: checkpoint.load("x.npz", None), CheckpointError, "must be a Tuner"),
        (lambda: make(forget=True), HyperparameterError, "forget"),
        (lambda: setattr(make(), "phi", np.zeros(2)), ShapeError, "phi must have"),
        (lambda: make(Forgetful()).fit(BATCHES, VAL), HyperparameterError, "must return a Forecast"),
        (
            lambda: make(outer=Outer("x", outer.adam().init, lambda h, s, lr: (h[:1], s), 0.1)).fit(BATCHES, VAL),
            HyperparameterError,
            "finite step",
        ),
        (lambda: checkpoint.save("/nowhere/x.npz", make()), CheckpointError, "does not exist"),
    ],
)
def test_bad_input_is_refused_with_advice(call, error, says):
    with pytest.raises(error, match=says):
        call()
