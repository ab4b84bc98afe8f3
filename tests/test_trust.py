"""The trust region: optima against SciPy on closed forms, bounds, symmetry, refused and rejected steps, bad input."""

import numpy as np
import pytest
import toys
from scipy.optimize import minimize as scipy_minimise

from koopman_hpo import AdapterError, HyperparameterError, Problem, ShapeError, Space, inner, log, logit, trust
from koopman_hpo.krylov import estimate
from koopman_hpo.krylov import forecast as krylov_forecast
from koopman_hpo.trust import minimise, propose

rng = np.random.default_rng(0)
GROUPS = (5, 7, 8)
P = sum(GROUPS)
WEIGHTS = np.repeat([2.0, 0.7, 0.1], GROUPS) * rng.normal(size=P)
X, XV = rng.normal(size=(60, P)), rng.normal(size=(200, P))
TRAIN, VAL = (X, X @ WEIGHTS + 3 * rng.normal(size=60)), (XV, XV @ WEIGHTS)
LOW, HIGH = 1e-2, 10.0
LR = 0.1


def ridge(order=range(P)):
    """Half the mean squared error, in both loops, with the features in some order; a penalty `l2` where it is named."""
    order = list(order)

    def grad_jvp(theta, hyper, Z, dhyper, batch):
        A, w = batch[0][:, order], hyper.get("l2", 0.0)
        r, n = A @ theta - batch[1], len(batch[1])
        dG = (Z @ A.T) @ A / n + w * Z
        if "l2" in dhyper:
            dG = dG + np.outer(dhyper["l2"], theta)
        return 0.5 * r @ r / n + 0.5 * w * theta @ theta, A.T @ r / n + w * theta, dG

    def outer(theta, hyper, batch):
        A = batch[0][:, order]
        r = A @ theta - batch[1]
        return 0.5 * r @ r / len(r), A.T @ r / len(r), {}

    return Problem(np.zeros(P), grad_jvp, outer, hyper=frozenset({"l2"}))


def closed(phi):
    """The outer loss of converged training and its gradient, one log weight decay a group."""
    w = np.repeat(np.exp(phi), GROUPS)
    H = X.T @ X / len(X) + np.diag(w)
    theta = np.linalg.solve(H, X.T @ TRAIN[1] / len(X))
    r = XV @ theta - VAL[1]
    adjoint = np.linalg.solve(H, XV.T @ r / len(r))
    return 0.5 * r @ r / len(r), np.add.reduceat(-w * theta * adjoint, np.cumsum([0, *GROUPS[:-1]]))


def decays(start=0.1, bounds=(LOW, HIGH), **options):
    values = np.full(3, start) if np.isscalar(start) else start
    return inner.sgd(ridge(), Space(weight_decay=log(values, bounds=bounds)), lr=LR, momentum=0.9, groups=GROUPS, **options)


def tuned(run, **settings):
    return minimise(run, TRAIN, VAL, **({"steps": 1000, "warm": True, "tol": 1e-5} | settings))


def reference(low=LOW, high=HIGH):
    ends = [(np.log(low), np.log(high))] * 3
    return scipy_minimise(closed, np.log(np.full(3, 0.1)), jac=True, bounds=ends, method="L-BFGS-B", options={"gtol": 1e-9})


@pytest.mark.parametrize(("start", "tolerance"), [(0.02, 0.3), (5.0, 0.03), (0.1, 1e-4)])
def test_finds_the_optimum_of_converged_training(start, tolerance):
    want, found = reference(), tuned(decays(start), tolerance=tolerance)
    assert "converged" in found.reason
    assert abs(closed(found.phi)[0] / want.fun - 1) < 1e-5
    np.testing.assert_allclose(found.phi, want.x, atol=0.03)
    assert found.value == pytest.approx(want.fun, rel=1e-5)
    assert np.linalg.norm(found.h - closed(found.phi)[1]) < np.linalg.norm(found.error)
    np.testing.assert_allclose(found.hyper["weight_decay"], np.exp(found.phi), rtol=1e-14)


def test_a_penalty_in_the_loss_is_the_same_as_weight_decay():
    in_loss = inner.sgd(ridge(), Space(l2=log(0.05)), lr=LR, momentum=0.9)
    in_step = inner.sgd(ridge(), Space(weight_decay=log(0.05)), lr=LR, momentum=0.9)
    a, b = tuned(in_loss), tuned(in_step)
    want = scipy_minimise(lambda u: closed(np.full(3, u[0]))[0], [np.log(0.05)], method="Nelder-Mead", tol=1e-10)
    np.testing.assert_allclose([a.phi[0], b.phi[0]], want.x[0], atol=0.02)


def test_a_learning_rate_is_tuned_for_runs_from_the_start():
    """T = 40: too few steps to converge, so that stopping early is part of it."""
    space = Space(lr=log(0.01, bounds=(1e-4, 0.2)), weight_decay=log(0.1, bounds=(LOW, HIGH)))
    run = inner.sgd(ridge(), space, momentum=0.5)

    def exact(phi):
        run.restore(begun)
        for _ in range(40):
            run.step(phi, TRAIN)
        return run.hypergradient(VAL)[:2]

    found, begun = tuned(run, steps=40, warm=False), run.snapshot()
    ends = list(zip(space.low, space.high, strict=True))
    want = scipy_minimise(exact, space.phi0, jac=True, bounds=ends, method="L-BFGS-B", options={"gtol": 1e-8})
    assert exact(found.phi)[0] == pytest.approx(want.fun, rel=1e-5)
    assert found.value == pytest.approx(exact(found.phi)[0], rel=1e-6)
    assert exact(space.phi0)[0] > 1.02 * want.fun


@pytest.mark.parametrize(("name", "off"), [("adam", 0.01), ("adamw", 0.06)])
def test_adaptive_rules_are_tuned_from_their_start(name, off):
    """Not to the last digit: what the preconditioner does within a stage is left out."""
    space = Space(lr=log(1e-3, bounds=(1e-4, 1.0)), weight_decay=log(0.1, bounds=(LOW, HIGH)))
    run = getattr(inner, name)(ridge(), space)

    def trained(phi):
        run.restore(start)
        for _ in range(100):
            run.step(phi, TRAIN)
        return run.hypergradient(VAL)

    start, found = run.snapshot(), tuned(run, steps=100, warm=False, tol=1e-3)
    true = trained(found.phi)
    assert abs(found.value / true.value - 1) < off
    assert true.value < 0.85 * trained(run.space.phi0).value
    assert np.abs(true.grad).max() < 0.08 * true.value


def test_a_window_of_all_steps_is_exact():
    run = inner.sgd(ridge(), Space(lr=log(0.01), weight_decay=log(0.1)), momentum=0.5)
    found = minimise(run, TRAIN, VAL, steps=30, window=30, looks=1)
    for _ in range(30):
        run.step(run.space.phi0, TRAIN)
    np.testing.assert_array_equal(found.h, run.hypergradient(VAL).grad)
    assert found.value == run.hypergradient(VAL).value
    np.testing.assert_array_equal(found.params, run.params)
    assert not found.error.any()
    assert found.steps == 30
    assert found.cost == 30 * (1 + 2) + 1


def test_the_error_tells_of_curvature_that_changes():
    train, val = ((A, np.where(A @ WEIGHTS > 0, 1.0, -1.0)) for A in (X, XV))
    run = inner.sgd(toys.logistic(np.zeros(P)), Space(lr=log(0.3), weight_decay=log(0.1)))
    found = minimise(run, train, val, steps=100, columns=P, tolerance=1e-6, looks=1)
    for _ in range(100):
        run.step(found.phi, train)
    off = np.linalg.norm(found.h - run.hypergradient(val).grad)
    assert 1e-3 * np.linalg.norm(found.h) < off < np.linalg.norm(found.error)


def test_predicts_what_training_with_the_result_gives():
    run = decays()
    found = tuned(run)
    for _ in range(1000):
        run.step(found.phi, TRAIN, tangents=False)
    assert run.hypergradient(VAL).value == pytest.approx(found.value, rel=1e-5)
    np.testing.assert_allclose(run.params, found.params, atol=2e-3)


def test_permuted_hyperparameters_give_the_permuted_result():
    order = (2, 0, 1)
    parts = np.split(np.arange(P), np.cumsum(GROUPS)[:-1])
    start = np.array([0.05, 0.1, 0.3])
    features, groups = np.concatenate([parts[i] for i in order]), tuple(GROUPS[i] for i in order)
    space = Space(weight_decay=log(start[list(order)], bounds=(LOW, HIGH)))
    moved = tuned(inner.sgd(ridge(features), space, lr=LR, momentum=0.9, groups=groups))
    np.testing.assert_allclose(moved.phi, tuned(decays(start)).phi[list(order)], atol=1e-5)


def test_keeps_within_the_bounds_and_ends_on_them():
    low, high = 0.05, 0.08
    run = decays(0.06, bounds=(low, high))
    found, want = tuned(run), reference(low, high)
    phi = found.history.phi
    assert (phi >= run.space.low).all()
    assert (phi <= run.space.high).all()
    np.testing.assert_allclose(found.phi, want.x, atol=1e-6)
    assert set(np.round(found.hyper["weight_decay"], 9)) == {low, high}


def test_the_run_stays_where_it_was_whatever_happens():
    calls = []

    def failing(theta, hyper, Z, dhyper, batch):
        calls.append(0)
        if len(calls) > 60:
            raise RuntimeError("interrupted")
        return sound.grad_jvp(theta, hyper, Z, dhyper, batch)

    sound = ridge()
    broken = Problem(sound.params, failing, sound.outer, hyper=frozenset())
    for problem in (sound, broken):
        run = inner.sgd(problem, Space(weight_decay=log(np.full(3, 0.1))), lr=LR, momentum=0.9, groups=GROUPS)
        for _ in range(5):
            run.step(run.space.phi0, TRAIN)
        before = run.snapshot()
        if problem is broken:
            with pytest.raises(RuntimeError, match="interrupted"):
                tuned(run)
        else:
            tuned(run)
        for name, array in run.snapshot().items():
            np.testing.assert_array_equal(array, before[name])


def test_every_decision_is_recorded():
    found = tuned(decays(5.0), tolerance=0.3)
    history, phi = found.history, np.log(np.full(3, 5.0))
    values = [history[0].value]
    for record in history:
        if record.accepted:
            phi = phi - record.move
            np.testing.assert_allclose(record.phi, phi, atol=1e-12)
            values.append(record.value)
        else:
            assert not record.move.any()
    np.testing.assert_allclose(found.phi, phi, atol=1e-12)
    assert (np.diff(values) < 0).all()
    assert (np.diff(history.step) > 0).all()
    assert history.step[-1] == found.cost
    assert "looked closer" in history.event


def test_a_step_that_is_worse_than_promised_is_not_taken():
    """An outer loss with a wall: beyond it every step disappoints, and the radius shrinks until there is none."""
    base = ridge()

    def outer(theta, hyper, batch):
        value, g, _ = base.outer(theta, hyper, batch)
        return value - 5 * np.log(hyper["l2"]) + 1e3 * (hyper["l2"] > 0.5), g, {"l2": -5 / hyper["l2"]}

    problem = Problem(base.params, base.grad_jvp, outer, hyper=frozenset({"l2"}))
    found = tuned(inner.sgd(problem, Space(l2=log(0.4)), lr=LR, momentum=0.9))
    assert found.hyper["l2"] <= 0.5
    assert "rejected" in found.history.event
    assert found.reason.startswith("stopped: no decrease within a radius")


def test_is_the_same_every_time():
    a, b = tuned(decays()), tuned(decays())
    np.testing.assert_array_equal(a.phi, b.phi)
    np.testing.assert_array_equal(a.params, b.params)
    assert a.cost == b.cost


def test_a_step_beyond_the_edge_of_stability_is_refused():
    """Stable below 3.8 / (largest curvature + decay): a decay of 1e3 would grow, wherever the slope points."""
    run = inner.sgd(
        toys.linear(np.ones(2), np.ones(2)), Space(weight_decay=log(1.0, bounds=(1e-2, 1e4))), lr=0.5, momentum=0.9
    )
    found = minimise(run, None, None, steps=500, warm=True)  # |theta| falls as 1 / decay: as much as is stable
    assert 5.0 < found.hyper["weight_decay"] <= 7.6
    assert any(event.startswith("refused: training grows") for event in found.history.event)
    assert np.isfinite(found.value)


def test_a_start_that_diverges_is_given_up_for_a_smaller_step():
    space = Space(lr=log(3.0), weight_decay=log(0.1, bounds=(LOW, HIGH)))
    found = tuned(inner.sgd(ridge(), space, momentum=0.5), steps=40, warm=False, looks=25)
    assert found.history.event[0].startswith("refused: training grows")
    assert found.history.natural[1, 0] == pytest.approx(1.0)
    assert np.isfinite(found.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    base = ridge()

    def outer(theta, hyper, batch):
        value, g, _ = base.outer(theta, hyper, batch)
        return (bad if hyper["l2"] > 0.06 else value), g, {}

    problem = Problem(base.params, base.grad_jvp, outer, hyper=frozenset({"l2"}))
    found = tuned(inner.sgd(problem, Space(l2=log(0.05)), lr=LR, momentum=0.9))
    assert "refused: not finite" in found.history.event
    assert found.hyper["l2"] <= 0.06
    assert np.isfinite(found.value)
    stuck = tuned(inner.sgd(problem, Space(l2=log(0.07)), lr=LR, momentum=0.9))
    assert stuck.reason == "stopped: not finite at the start"
    assert np.isnan(stuck.value)
    assert len(stuck.history) == 1


def test_proposes_the_minimiser_of_its_model():
    draw = np.random.default_rng(3)
    B, h = toys.spd(draw, 5), draw.normal(size=5)
    free, promised = propose(B, h, np.full(5, -9.0), np.full(5, 9.0))
    np.testing.assert_allclose(free, -np.linalg.solve(B, h), rtol=1e-9)
    assert promised == pytest.approx(0.5 * h @ np.linalg.solve(B, h))
    s, _ = propose(B, h, np.full(5, -0.2), np.full(5, 0.3))
    slope = h + B @ s
    assert np.abs(slope[(s > -0.2 + 1e-9) & (s < 0.3 - 1e-9)]).max(initial=0) < 1e-9
    assert (slope[s <= -0.2 + 1e-9] >= 0).all()
    assert (slope[s >= 0.3 - 1e-9] <= 0).all()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"steps": 0}, HyperparameterError, "steps"),
        ({"window": 1001}, HyperparameterError, "window"),
        ({"columns": 2}, HyperparameterError, "columns"),
        ({"stages": 31}, HyperparameterError, "stages"),
        ({"tolerance": 0.0}, HyperparameterError, "tolerance"),
        ({"tolerance": 1.0}, HyperparameterError, "tolerance"),
        ({"tol": -1.0}, HyperparameterError, "tol"),
        ({"looks": 0}, HyperparameterError, "looks"),
        ({"warm": "no"}, HyperparameterError, "warm"),
        ({"phi": np.zeros(2)}, ShapeError, "phi"),
        ({"phi": np.full(3, np.nan)}, HyperparameterError, "finite"),
    ],
)
def test_refuses_what_makes_no_sense(change, error, says):
    run = decays()
    run.step(run.space.phi0, TRAIN)
    before = run.snapshot()
    with pytest.raises(error, match=says):
        tuned(run, **change)
    for name, array in run.snapshot().items():
        np.testing.assert_array_equal(array, before[name])


def test_refuses_runs_it_cannot_predict():
    with pytest.raises(AdapterError, match="needs a run of the core"):
        tuned(object())
    with pytest.raises(AdapterError, match="adagrad has no frozen step"):
        tuned(inner.adagrad(ridge(), Space(lr=log(0.1))))
    with pytest.raises(HyperparameterError, match="random directions"):
        tuned(decays(directions=2))
    momentum = inner.sgd(ridge(), Space(lr=log(0.1), momentum=logit(0.9)))
    with pytest.raises(HyperparameterError, match="'lr' does not matter"):
        tuned(momentum)
    with pytest.raises(HyperparameterError, match="'beta2' acts on the preconditioner alone"):
        tuned(inner.adam(ridge(), Space(beta2=logit(0.99))))
    schedule = inner.sgd(ridge(), Space(weight_decay=log([0.1, 0.2], knots=(0, 5))), lr=LR)
    with pytest.raises(HyperparameterError, match="a schedule is over"):
        tuned(schedule)


def test_a_look_costs_no_more_than_all_steps_and_back(monkeypatch):
    """Of few steps all are taken where a prediction has cost more than that, and h is exact from then on."""
    space = Space(lr=log(0.05, bounds=(1e-3, 0.2)), weight_decay=log(0.1, bounds=(LOW, HIGH)))
    run = inner.sgd(ridge(), space, momentum=0.5)
    asked = []
    truly = trust.krylov.exactly
    monkeypatch.setattr(trust.krylov, "exactly", lambda *a: asked.append(a[-1]) or truly(*a))
    found = tuned(run, steps=10, warm=False)
    costs = np.diff([0, *found.history.step])
    assert asked == [10] * (len(costs) - 1)
    np.testing.assert_array_equal(costs[1:], 3 * 10 + 1)
    assert costs[0] > 3 * 10
    assert not found.error.any()
    assert "converged" in found.reason
    asked.clear()
    tuned(run, steps=1000, warm=False, looks=5)
    assert not asked


def test_steps_of_what_fades_with_training_are_shorter(monkeypatch):
    """A loss that falls for ever: the box grows, but not in lr."""
    boxes, truly = [], trust.propose
    monkeypatch.setattr(trust, "propose", lambda B, h, low, high: boxes.append(high - low) or truly(B, h, low, high))
    space = Space(lr=log(1e-5, bounds=(1e-9, 1e-1)), weight_decay=log(1e-2, bounds=(1e-9, 1e2)))
    tuned(inner.sgd(ridge(), space, momentum=0.5), steps=30, warm=False, looks=6)
    np.testing.assert_allclose(np.max(boxes, axis=0), [2 * trust.PASSING, 2 * trust.LONGEST])


# -- what the estimate must tell ------------------------------------------------------------------------------------


def test_closer_looks_that_do_not_help_are_not_asked_for(monkeypatch):
    """The error of h is overstated and stays: steps are tried all the same, and their own decrease judges them."""

    def look(self, phi, after, tolerance, stages, trained=False):
        self.cost += 1
        h = phi + 1.0
        end = self.run.params, "", "", self.run.snapshot(), tolerance, stages
        return trust.Look(phi, 1 + 0.5 * h @ h, 0.0, h, np.full(3, 5.0), 0.0, *end)

    monkeypatch.setattr(trust.Horizon, "look", look)
    found = tuned(decays(), warm=False)
    np.testing.assert_allclose(found.phi, -1, atol=1e-3)
    assert list(found.history.event).count("looked closer") == 1


def test_the_estimate_predicts_the_outer_loss_and_the_parameters():
    run = decays()
    found = estimate(run, TRAIN, VAL, 300, columns=P)
    for _ in range(300):
        run.step(run.space.phi0, TRAIN)
    np.testing.assert_allclose(found.params, run.params, rtol=1e-8)
    assert found.outer_loss == pytest.approx(run.hypergradient(VAL).value, rel=1e-10)
    assert abs(found.missed) < 1e-10 * found.outer_loss
    assert max(found.bends) < 1e-8
    want = np.linalg.eigvalsh(LR * (X.T @ X / len(X) + 0.1 * np.eye(P)))[-1] / 3.8
    assert found.edge == pytest.approx(want, rel=1e-6)


def test_where_nothing_moves_the_estimate_has_no_edge_and_misses_nothing():
    still = toys.linear(np.zeros(2), np.zeros(2))
    run = inner.sgd(still, Space(lr=log(0.1)), momentum=0.9)
    found = estimate(run, None, None, 50, columns=3)
    assert found.basis == (0,) * len(found.stages)
    assert found.edge == found.missed == found.outer_loss == 0
    np.testing.assert_array_equal(found.params, np.zeros(2))


def test_what_spaces_miss_is_told_and_mostly_mended():
    """After a step of phi, as in a search."""
    run, phi = decays(3.0), np.log([1.5, 6.0, 9.0])
    for _ in range(1000):
        run.step(run.space.phi0, TRAIN)
    run.forget(0)
    run.restore(run.snapshot() | {"phi": phi})
    value, h = closed(phi)
    hvps, errors = [], []
    for tolerance in (0.3, 0.03, 3e-3):
        found = estimate(run, TRAIN, VAL, 3000, columns=P - 1, stages=1, tolerance=tolerance)
        mended, plain = abs(found.outer_loss - value), abs(found.outer_loss - found.missed - value)
        assert mended < 0.5 * plain
        assert mended < 0.5 * abs(found.missed)
        hvps.append(found.hvps)
        errors.append(np.linalg.norm(found.estimate - h))
        assert errors[-1] < 2 * np.linalg.norm(np.hypot(found.error, found.missed))
    assert hvps[0] < hvps[1] <= hvps[2]
    assert errors[2] < 0.1 * min(errors[:2])


def test_what_is_missed_is_not_added_where_it_is_more_than_the_loss(monkeypatch):
    run = inner.sgd(ridge(), Space(weight_decay=log(0.1)), lr=LR)
    honest, backward = estimate(run, TRAIN, VAL, 50), krylov_forecast.roll.backward
    monkeypatch.setattr(krylov_forecast.roll, "backward", lambda *given: backward(*given)._replace(missed=-50.0))
    found = estimate(run, TRAIN, VAL, 50)
    assert found.missed == -50.0
    assert found.outer_loss == pytest.approx(honest.outer_loss - honest.missed)
